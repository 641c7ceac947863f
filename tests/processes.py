# SPDX-License-Identifier: GPL-2.0-or-later
"""A lab in which every program is a process, as users run it: broker, listener, clients and services."""

import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from bounds import BOUND_S
from dom0 import forward
from helpers import free_port, is_listening

from bench.memory import descendants, is_agent
from qubes_fwd_qrexec.lab import asking, daemon
from qubes_fwd_qrexec.lab.session import LabSession, open_session

TARGET, EXPOSED = "work", "sys-net"
# As the programs are started, with constants of their own.
_WITH_CONSTANTS = """
import importlib, json, sys
for name, value in json.loads(sys.argv.pop(1)).items():
    module, _, constant = name.rpartition(".")
    module = importlib.import_module("qubes_fwd_qrexec." + module)
    assert hasattr(module, constant), name
    setattr(module, constant, value)
from qubes_fwd_qrexec.relay.loop import Loop
after, slowness = Loop.after, float(sys.argv.pop(1))
Loop.after = lambda loop, delay_s, callback, end: after(loop, delay_s * slowness, callback, end)
sys.exit(importlib.import_module("qubes_fwd_qrexec." + sys.argv.pop(1)).main())
"""


def with_constants(program: str, *, slowness: float = 1.0, **constants: float) -> list[str]:
    """A program by its module, and constants by ``folder__module__NAME``, as a command line.

    ``slowness``: every timer of its loop takes so many times as long (`loop_time.slow_timers`).
    """
    named = {name.replace("__", "."): value for name, value in constants.items()}
    return [sys.executable, "-c", _WITH_CONSTANTS, json.dumps(named), str(slowness), program]


def until(condition: Callable[[], object], bound_s: float = BOUND_S) -> None:
    """Wait, within the bound, for something without an event."""
    deadline = time.monotonic() + bound_s
    while not condition():
        assert time.monotonic() < deadline, "it does not come true"
        time.sleep(0.005)


class Connection:
    """A client's connection and the server's end of it."""

    def __init__(self, client: socket.socket, far: socket.socket) -> None:
        self.client = client
        self.far = far
        for sock in (client, far):
            sock.settimeout(BOUND_S)

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.far.close()

    def echo(self) -> None:
        """Raises ConnectionError if either is lost."""
        for source, sink in ((self.client, self.far), (self.far, self.client)):
            source.sendall(b"x")
            data = sink.recv(64)
            if not data:
                raise ConnectionAbortedError("an end of file")
            assert data == b"x"


class Way:
    """A forward: the exposed port, and the listening socket of the server in the target."""

    def __init__(self, listen_port: int, server: socket.socket) -> None:
        self.listen_port = listen_port
        self.server = server
        self.target_port = int(server.getsockname()[1])

    @property
    def mux_call(self) -> str:
        return f"qubes.ForwardTCP+{self.target_port}+mux"

    def client(self, source: str = "127.0.0.1") -> socket.socket:
        """Connected, and it may have been aborted since: a connect that waits would fail then."""
        with ExitStack() as undo:
            client = undo.enter_context(socket.socket())
            client.bind((source, 0))
            client.setblocking(False)
            with suppress(BlockingIOError):
                client.connect(("127.0.0.1", self.listen_port))
            assert select.select([], [client], [], BOUND_S)[1]
            client.settimeout(BOUND_S)
            undo.pop_all()
        return client

    def connect(self, source: str = "127.0.0.1") -> Connection:
        with ExitStack() as undo:
            client = undo.enter_context(self.client(source))
            connection = Connection(client, self.server.accept()[0])
            undo.pop_all()
        return connection

    def connect_again(self) -> Connection:
        """Try until there is a connection through to the server."""
        deadline = time.monotonic() + BOUND_S
        while time.monotonic() < deadline:
            client = self.client()
            ready, _, _ = select.select([self.server, client], [], [], BOUND_S)
            if self.server in ready:
                connection = Connection(client, self.server.accept()[0])
                with suppress(ConnectionError):
                    connection.echo()
                    return connection
                connection.far.close()
            client.close()
            select.select([self.server], [], [], 0.02)
        raise AssertionError("no connection comes through")


def assert_reset(sock: socket.socket) -> None:
    """The next news is an abort, and there was no byte before it."""
    try:
        data = sock.recv(64)
    except ConnectionResetError:
        return
    raise AssertionError(f"{data!r} instead of an abort")


class World:
    """Made by `open_world`; forwards are added first, and then the listener is started."""

    def __init__(self, session: LabSession, directory: Path, undo: ExitStack) -> None:
        self.session = session
        self.lab = session.lab
        self._undo = undo
        self._log = directory / "listener.log"
        self._listener: subprocess.Popen[bytes] | None = None
        self._ways: list[Way] = []

    def forward(self, transport: str = "mux", receive_buffer_bytes: int = 0) -> Way:
        server = self._undo.enter_context(socket.socket())
        if receive_buffer_bytes:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        server.bind(("127.0.0.1", 0))
        server.listen(1024)
        server.settimeout(BOUND_S)
        way = Way(free_port(), server)
        forward(
            self.lab,
            *("add", TARGET, f"{way.listen_port}:{way.target_port}", f"--name=w{len(self._ways)}"),
            *("--from=any", "--listen=127.0.0.1", f"--via={EXPOSED}", "--mode=qrexec"),
            f"--transport={transport}",
        )
        self._ways.append(way)
        return way

    def start_listener(
        self, *, slowness: float = 1.0, options: tuple[str, ...] = (), **constants: float
    ) -> None:
        place = self.lab.qube_dir(EXPOSED)
        client = shlex.join([str(self.lab.client_program), f"--agent-socket={place.agent_socket}"])
        words = [
            *with_constants("listener", slowness=slowness, **constants),
            *(f"--config={place.vm_config}", f"--qrexec-client={client}", *options),
        ]
        with self._log.open("wb") as log:
            self._listener = self.session.start(self.session.in_qube(EXPOSED, *words), stderr=log)
        until(lambda: all(is_listening(way.listen_port) for way in self._ways))

    def serve_with(self, name: str, *command: str) -> None:
        """Have the target serve ``name`` by another program."""
        service = self.lab.qube_dir(TARGET).service_dirs[0] / name
        service.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$1"\n')
        service.chmod(0o755)

    @property
    def listener(self) -> int:
        assert self._listener is not None
        return self._listener.pid

    @property
    def broker(self) -> int:
        pid = daemon.broker_pid(self.lab)
        assert pid is not None
        return pid

    @property
    def clients(self) -> list[int]:
        """The qrexec clients that the listener has started."""
        return descendants([self.listener])

    @property
    def services(self) -> list[int]:
        """Not the agents' processes that start them and wait for them."""
        return [pid for pid in descendants([self.broker]) if not is_agent(pid)]

    def kill_listener(self) -> None:
        """It would let connections finish first."""
        if self._listener is not None:
            self._listener.kill()
            self._listener.wait()

    def turn(self, **knobs: Any) -> None:
        """Set knobs of the lab; they hold from the next call on."""
        with self.lab.locked():
            self.lab.write_knobs(replace(self.lab.knobs(), **knobs))

    def reload(self) -> None:
        assert self._listener is not None
        self._listener.send_signal(signal.SIGHUP)

    def lose_calls(self) -> None:
        assert asking.ask(self.lab, {"do": "drop", "share": 1.0})["dropped"]

    def calls(self) -> int:
        """How many calls the broker has under way to the target."""
        return int(asking.ask(self.lab, {"do": "status"})["calls"].get(TARGET, 0))

    def said(self, words: str) -> int:
        """How many lines of the listener's log say so."""
        return sum(words in line for line in self._log.read_text().splitlines())

    def asked(self, name: str) -> int:
        """How many calls of a service the broker has refused, or seen end."""
        lines = self.lab.log_file.read_text().splitlines()
        ends = (" refused: ", " ended with ")
        return sum(f" {name} to " in line and any(end in line for end in ends) for line in lines)


@contextmanager
def open_world(directory: Path) -> Iterator[World]:
    with open_session(daemon.Network.LOOPBACK) as session, ExitStack() as undo:
        world = World(session, directory, undo)
        undo.callback(world.kill_listener)
        yield world


def kill(pids: list[int]) -> None:
    """One may have ended with another: what hands a call over ends with the process that serves it."""
    assert pids
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wanted_cpu_s(pid: int) -> float:
    """How long it has had a processor or waited for one that others had, all its threads together."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(sum(map(int, thread.read_text().split()[:2])) for thread in threads) / 1e9
