# SPDX-License-Identifier: GPL-2.0-or-later
"""Thousands of clients at once, with every program a process."""

import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakeclient import FakeClient
from helpers import free_port, is_listening, port_of, write_config
from processes import Connection, Way, until

CROWD = 5000
# More than one source may hold, so that some of them are refused.
SOURCES = ("127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4")
ALL_S = 600.0
NEEDED = CROWD + 200


@pytest.fixture
def many_files() -> Iterator[None]:
    """The test holds all the clients itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < 2 * NEEDED:
        pytest.skip(f"a process may have {hard} files open here, and {2 * NEEDED} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * NEEDED), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def greet(server: socket.socket, over: threading.Event) -> None:
    """Say something to everybody, and end."""
    server.settimeout(0.1)
    while not over.is_set():
        try:
            connection, _ = server.accept()
        except TimeoutError:
            continue
        with connection:
            connection.send(b"hello")


class Crowd:
    """Clients that connect all at once, and wait for what comes."""

    def __init__(self, port: int) -> None:
        self.ends: Counter[str] = Counter()
        self._poll = select.epoll()
        self._waiting: dict[int, tuple[socket.socket, bytearray]] = {}
        for number in range(CROWD):
            sock = socket.socket()
            sock.setblocking(False)
            sock.bind((SOURCES[number % len(SOURCES)], 0))
            sock.connect_ex(("127.0.0.1", port))
            self._waiting[sock.fileno()] = (sock, bytearray())
            self._poll.register(sock, select.EPOLLIN)

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def turn(self) -> None:
        for fd, _ in self._poll.poll(0.05):
            sock, got = self._waiting[fd]
            try:
                data = sock.recv(64)
                got += data
                how = None if data else "data" if got == b"hello" else f"EOF after {bytes(got)!r}"
            except ConnectionResetError:
                how = "RST"
            if how is not None:
                self.ends[how] += 1
                self._poll.unregister(sock)
                del self._waiting[fd]
                sock.close()

    def close(self) -> None:
        for sock, _ in self._waiting.values():
            sock.close()
        self._poll.close()


@pytest.mark.usefixtures("many_files", "mux_call_home")
def test_five_thousand_clients_each_end_with_data_or_reset_and_a_stream_goes_on(tmp_path: Path) -> None:
    """docs/behaviours.md, 35."""
    config, client = tmp_path / "config", FakeClient(tmp_path, "serve").command
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as still, socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(4096)
        still.settimeout(ALL_S)
        way, port = Way(free_port(), still), free_port()
        for name, listen_port, target_port in (
            ("still", way.listen_port, way.target_port),
            ("crowd", port, port_of(server)),
        ):
            key = f"fwd.work.{name}"
            write_config(config, listen_port, target_port, key=key, transport="mux")
        command = [sys.executable, "-m", "qubes_fwd_qrexec.listener", f"--config={config}"]
        with subprocess.Popen(
            [*command, f"--qrexec-client={' '.join(client)}"], stderr=subprocess.PIPE
        ) as listener:
            greeting = threading.Thread(target=greet, args=(server, over))
            greeting.start()
            try:
                until(lambda: is_listening(port) and is_listening(way.listen_port))
                with way.connect() as stream:
                    ends, most = _rush(port, stream)
            finally:
                over.set()
                greeting.join()
                os.kill(listener.pid, signal.SIGTERM)
                os.kill(listener.pid, signal.SIGTERM)
                _, stderr = listener.communicate(timeout=ALL_S)
    assert set(ends) <= {"data", "RST"}
    assert ends.total() == CROWD
    assert ends["data"] > 0
    # No echo took as long as half of the crowd: the stream does not wait until all others are served.
    assert most < CROWD / 2
    assert b"Traceback" not in stderr


def _rush(port: int, stream: Connection) -> tuple["Counter[str]", int]:
    """How the crowd's connections ended, and how many at most while the stream beside them echoed once.

    That is no time, which says more of the machine's other load.
    """
    most = 0
    stream.echo()
    crowd = Crowd(port)
    deadline = time.monotonic() + ALL_S
    while crowd and time.monotonic() < deadline:
        crowd.turn()
        before = crowd.ends.total()
        stream.echo()
        crowd.turn()
        most = max(most, crowd.ends.total() - before)
    crowd.close()
    return crowd.ends, most
