# SPDX-License-Identifier: GPL-2.0-or-later
"""A mux call's service as the agent starts it, and callers that do not keep to the protocol."""

import contextlib
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from bounds import BOUND_S
from helpers import listening_socket, port_of
from loop_time import SLOWNESS
from processes import with_constants

from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.mux import Connection, Hello, Origin, ProxyVersion, wire
from qubes_fwd_qrexec.relay.copy import half_close

ORIGIN = Origin(ip_address("192.0.2.1"), 40000, ip_address("198.51.100.2"), 80)
HELLO = bytes(wire.encode_hello(Hello(65536, bytes(16))))
WINDOW = 32768


pytestmark = pytest.mark.usefixtures("mux_call_home")


class Called:
    """The program, with one socket for both ways of its call and another for stderr."""

    def __init__(self, directory: Path, argument: str, redirect: str = "", slowness: float = 1.0) -> None:
        self.call, theirs = socket.socketpair()
        program = shlex.join(with_constants("service", slowness=slowness))
        command = f'exec {program} "$1" {redirect}'
        environment = {"QREXEC_REMOTE_DOMAIN": "sys-net", "QUBES_FORWARD_RUN_DIR": str(directory / "run")}
        with theirs:
            self.process = subprocess.Popen(
                ["/bin/sh", "-c", command, "sh", argument],
                stdin=theirs,
                stdout=theirs,
                stderr=subprocess.PIPE,
                env=os.environ | environment,
            )
        self.call.settimeout(BOUND_S)

    def end(self) -> tuple[int, str]:
        _, stderr = self.process.communicate(timeout=BOUND_S)
        return self.process.returncode, stderr.decode()

    def read_to_end(self) -> bytes:
        data = b""
        while chunk := self.call.recv(65536):
            data += chunk
        return data

    def __enter__(self) -> "Called":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.call.close()


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with listening_socket() as sock:
        sock.settimeout(BOUND_S)
        yield sock


def frame(kind: int, payload: bytes = b"", stream_id: int = 0, flags: int = 0) -> bytes:
    return wire.HEADER.pack(kind << 8 | flags, len(payload), stream_id) + payload


def assert_one_line(message: str) -> None:
    """For a log: short, printable, and with the service's name."""
    assert re.fullmatch(r"qubes\.ForwardTCP: [ -~]{1,190}\n", message), message


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (b"", "without a final GOAWAY"),
        (HELLO[:3], "without a final GOAWAY"),
        (HELLO[:-1], "without a final GOAWAY"),
        (HELLO, "without a final GOAWAY"),
        (HELLO + frame(2, bytes(43), 1)[:20], "without a final GOAWAY"),
    ],
    ids=["nothing", "half a header", "half a HELLO", "a HELLO alone", "half a frame"],
)
def test_an_end_that_was_not_agreed_is_status_125_with_the_reason(
    tmp_path: Path, server: socket.socket, sent: bytes, words: str
) -> None:
    with Called(tmp_path, f"{port_of(server)}+mux") as called:
        called.call.sendall(sent)
        half_close(called.call)
        status, message = called.end()
    assert status == ExitStatus.TROUBLE
    assert words in message
    assert_one_line(message)


_NOT_YET = wire.encode_hello(Hello(1 << 16, bytes(16), min_version=7, max_version=7))
GARBAGE = {
    "http": (b"GET / HTTP/1.1\r\nHost: \x1b[31m\r\n\r\n", "unknown frame type 71"),
    "zeros": (bytes(4096), "unknown frame type 0"),
    "ones": (b"\xff" * 4096, "unknown frame type 255"),
    "a PING before HELLO": (frame(8, bytes(8)), "PING before HELLO"),
    "a second HELLO": (HELLO + HELLO, "a second HELLO"),
    "another magic": (HELLO.replace(wire.MAGIC, b"qfwd\n\x1b\xff\0"), "the HELLO begins with"),
    "a version that is not yet": (_NOT_YET, "the peer speaks versions 7 to 7"),
    "flags": (HELLO + frame(8, bytes(8), flags=1), "the flags of a frame are 0x01"),
    "a stream that is not open": (HELLO + frame(4, b"x", stream_id=1), "DATA on stream 1"),
    "credit for nobody": (HELLO + frame(5, b"\0\0\0\1", stream_id=7), "CREDIT on stream 7"),
    "a long frame": (HELLO + wire.HEADER.pack(4 << 8, (1 << 16) - 1, 1), "DATA of 65535 bytes"),
}


@pytest.mark.parametrize(("sent", "words"), GARBAGE.values(), ids=GARBAGE)
def test_a_violation_ends_the_call_at_once_with_status_125(
    tmp_path: Path, server: socket.socket, sent: bytes, words: str
) -> None:
    """docs/behaviours.md, 47 and 48. Its other end is open all the while, and it waits neither for that nor
    for a timer: those take a hundred times as long here."""
    with Called(tmp_path, f"{port_of(server)}+mux", slowness=SLOWNESS) as called:
        assert called.call.recv(len(HELLO) + 100)
        called.call.sendall(sent)
        status, message = called.end()
    assert status == ExitStatus.TROUBLE
    assert words in message
    assert_one_line(message)
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.accept()


class MuxCall:
    """The caller's end, spoken by hand, with one stream open."""

    def __init__(self, called: Called, server: socket.socket) -> None:
        self.called = called
        port = port_of(server)
        self.connection = Connection(Hello(65536, bytes(16)), range(port, port + 1))
        self.until(lambda: self.connection.open_room)
        self.stream_id = self.connection.open_stream(port, ORIGIN, WINDOW, ProxyVersion.OFF)
        self.send()
        self.far = server.accept()[0]
        self.far.settimeout(BOUND_S)
        self.until(lambda: self.connection.send_limit(self.stream_id))

    def send(self) -> None:
        for chunk in self.connection.data_to_send():
            self.called.call.sendall(chunk)

    def until(self, condition: object) -> None:
        assert callable(condition)
        self.send()
        while not condition():
            for _ in self.connection.receive_data(self.called.call.recv(65536)):
                pass
            self.send()


def test_a_violation_is_an_abort_of_every_stream(tmp_path: Path, server: socket.socket) -> None:
    with Called(tmp_path, f"{port_of(server)}+mux") as called:
        mux_call = MuxCall(called, server)
        with mux_call.far as far:
            mux_call.connection.send_data(mux_call.stream_id, b"before it")
            mux_call.send()
            assert far.recv(100) == b"before it"
            called.call.sendall(frame(99))
            with pytest.raises(ConnectionResetError):
                far.recv(1)
            assert called.read_to_end()  # its last word, and nothing is left of the call
        status, message = called.end()
    assert status == ExitStatus.TROUBLE
    assert_one_line(message)


def test_a_caller_that_takes_nothing_more_is_an_abort_of_every_stream(
    tmp_path: Path, server: socket.socket
) -> None:
    """The call's output is closed, and its input is not."""
    with Called(tmp_path, f"{port_of(server)}+mux") as called:
        mux_call = MuxCall(called, server)
        with mux_call.far as far:
            called.call.shutdown(socket.SHUT_RD)
            far.sendall(b"news")
            with pytest.raises(ConnectionResetError):
                far.recv(1)
        status, message = called.end()
    assert status == ExitStatus.TROUBLE
    assert "takes nothing more" in message
    assert_one_line(message)


def test_without_a_stderr_the_status_says_it(tmp_path: Path, server: socket.socket) -> None:
    with Called(tmp_path, f"{port_of(server)}+mux", "2>&-") as called:
        called.call.sendall(bytes(100))
        assert called.end() == (ExitStatus.TROUBLE, "")


@pytest.mark.parametrize(
    "argument", ["80\n+mux", "\x1b[2J+mux", "80-79+mux", "80+mux+80", "+mux", "\u202e80"]
)
def test_a_bad_argument_is_status_2_on_one_line_and_nothing_was_read(tmp_path: Path, argument: str) -> None:
    with Called(tmp_path, argument) as called:
        called.call.sendall(HELLO)
        status, message = called.end()
        assert status == ExitStatus.BAD_ARGUMENT
        assert_one_line(message)
        # The kernel tells that what was sent was there to the end.
        with pytest.raises(ConnectionResetError):
            called.call.recv(1)


def test_a_flood_that_is_no_protocol_is_not_read_to_its_end(tmp_path: Path, server: socket.socket) -> None:
    with Called(tmp_path, f"{port_of(server)}+mux") as called:
        called.call.setblocking(False)
        sent = 0
        poll = select.poll()
        poll.register(called.call, select.POLLOUT)
        deadline = time.monotonic() + BOUND_S
        try:
            while time.monotonic() < deadline:
                poll.poll(BOUND_S * 1000)
                sent += called.call.send(b"\x55" * 65536)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert sent < 4 << 20
        assert called.end()[0] == ExitStatus.TROUBLE


# However it was started


def test_signals_that_were_blocked_at_its_start_end_it(tmp_path: Path) -> None:
    """docs/behaviours.md, 53: else dom0 could not."""
    signals = {signal.SIGTERM, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        called = Called(tmp_path, "8080+mux")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with called:
        assert called.call.recv(len(HELLO))
        called.process.terminate()
        assert called.process.wait(BOUND_S) == 0


@pytest.mark.parametrize("argument", ["nonsense", "8080"])
def test_an_error_with_a_closed_stderr_never_goes_into_the_data(tmp_path: Path, argument: str) -> None:
    with Called(tmp_path, argument, "2>&-") as called:
        assert called.read_to_end() == b""
        assert called.end()[0] != 0


def test_an_error_that_the_caller_does_not_read_keeps_it_from_nothing(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(65536))
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"x")
    os.set_blocking(writing, True)
    done = subprocess.run(
        [sys.executable, "-m", "qubes_fwd_qrexec.service", "x"], stderr=writing, timeout=BOUND_S, check=False
    )
    assert done.returncode == ExitStatus.BAD_ARGUMENT
    os.close(reading)
    os.close(writing)
