# SPDX-License-Identifier: GPL-2.0-or-later
"""What the process for all calls is given, and the socket that it is given it on."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers import BOUND_S, no_fds_left, unix_pair

from qubes_fwd_qrexec.target.handover import HandoverError, SocketError, adopt, listen_on, receive
from qubes_fwd_qrexec.target.localserver import ServiceError


@pytest.fixture
def control() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The program's end of a connection, and the process's."""
    with no_fds_left():
        program, process = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process.setblocking(False)
        with program, process:
            yield program, process


Control = tuple[socket.socket, socket.socket]


def test_a_call_comes_with_its_words_and_its_descriptors(control: Control) -> None:
    program, process = control
    with pytest.raises(BlockingIOError):
        receive(process)
    with ExitStack() as undo:
        near, far = (undo.enter_context(sock) for sock in unix_pair())
        reader, writer = os.pipe()
        undo.callback(os.close, reader)
        socket.send_fds(program, [b"1 8080 sys-net 4711"], [far.fileno(), far.fileno(), writer])
        os.close(writer)
        handed = receive(process)
        assert handed is not None
        with handed:
            assert handed.untrusted_words == ["8080", "sys-net", "4711"]
            stdin, stdout = handed.sockets()
            assert not stdin.getblocking()
            assert not stdout.getblocking()
            near.send(b"x")
            assert stdin.recv(2) == b"x"
            stdout.send(b"y")
            assert near.recv(2) == b"y"
            os.write(handed.stderr, b"z")
            assert os.read(reader, 2) == b"z"


@pytest.mark.parametrize(
    ("untrusted", "count"),
    [
        (b"1 80 sys-net 1", 2),
        (b"1 80 sys-net 1", 0),
        (b"2 80 sys-net 1", 3),
        (b"1 80 sys-net", 3),
        (b"1 80 sys-net 1 1", 3),
        (b"\xff", 3),
        (b"1 " + b"x" * 1000, 3),
    ],
)
def test_what_is_no_call_is_refused_and_nothing_of_it_stays_open(
    control: Control, untrusted: bytes, count: int
) -> None:
    program, process = control
    socket.send_fds(program, [untrusted], [program.fileno()] * count)
    with pytest.raises(HandoverError, match=f"with {count} descriptors is no call"):
        receive(process)


def test_a_program_that_is_gone_is_no_error(control: Control) -> None:
    program, process = control
    program.close()
    assert receive(process) is None


def test_a_connection_that_is_broken_is_an_error(control: Control) -> None:
    program, process = control
    process.send(b"unread")
    program.close()
    with pytest.raises(HandoverError, match="Connection reset by peer"):
        receive(process)


@pytest.mark.parametrize("number", [0, 1])
def test_stdin_and_stdout_have_to_be_sockets(control: Control, number: int) -> None:
    program, process = control
    with open(os.devnull, "r+b") as nothing:
        fds = [program.fileno()] * 3
        fds[number] = nothing.fileno()
        socket.send_fds(program, [b"1 80 sys-net 1"], fds)
    handed = receive(process)
    assert handed is not None
    with handed, pytest.raises(ServiceError, match=f"file descriptor {number} is not a socket"):
        handed.sockets()


# The socket


def test_the_socket_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with listen_on(path):
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_socket_left_over_is_replaced_and_anything_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listen_on(path).close()
    with listen_on(path), pytest.raises(SocketError, match="Address already in use"):
        listen_on(path)
    path.unlink()
    path.write_text("mine")
    with pytest.raises(SocketError, match="Address already in use"):
        listen_on(path)
    assert path.read_text() == "mine"


def test_only_a_listening_unix_socket_for_packets_is_adopted(tmp_path: Path) -> None:
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stream.bind(str(tmp_path / "stream"))
    stream.listen()
    mute = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for wrong in (stream, mute):
        with pytest.raises(SocketError, match="not a listening UNIX socket for packets"):
            adopt(wrong.detach())
    with adopt(listen_on(tmp_path / "socket").detach()) as listening:
        assert not listening.getblocking()


_ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_FDS"] = sys.argv[2]
os.environ["LISTEN_PID"] = sys.argv[3] or str(os.getpid())
os.execv(sys.executable, [sys.executable, "-m", "qubes_fwd_qrexec.service", "--activated"])
"""


def activated(fd: int, fds: str = "1", pid: str = "") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", _ACTIVATE, str(fd), fds, pid]
    return subprocess.Popen(command, pass_fds=[fd], stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("fds", "pid", "words"), [("2", "", "LISTEN_FDS"), ("1", "1", "LISTEN_PID"), ("x", "", "LISTEN_FDS")]
)
def test_descriptors_for_somebody_else_are_refused(tmp_path: Path, fds: str, pid: str, words: str) -> None:
    with listen_on(tmp_path / "socket") as listening, activated(listening.fileno(), fds, pid) as process:
        _, stderr = process.communicate(timeout=BOUND_S)
    assert process.returncode == 1
    assert words in stderr.decode()


def test_a_path_that_cannot_be_bound_is_status_1() -> None:
    command = [sys.executable, "-m", "qubes_fwd_qrexec.service", "--socket", "/nonexistent/socket"]
    ended = subprocess.run(command, capture_output=True, check=False, timeout=BOUND_S)
    assert ended.returncode == 1
    assert b"/nonexistent/socket" in ended.stderr
