# SPDX-License-Identifier: GPL-2.0-or-later
"""Single calls, by the program and by the server of calls, to servers that are not at localhost."""

import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import trio
from helpers import BOUND_S, listening_socket, no_fds_left, port_of
from test_service import Called, receive_all
from test_socketservice import agent, read_all

from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.relay.copy import half_close

Write = Callable[[str], Path]


@pytest.fixture
def named(unix_server: socket.socket, name_servers: Write) -> socket.socket:
    """A server on a UNIX socket, to which port 80 goes."""
    name_servers(f"tcp 80 unix:{unix_server.getsockname()}")
    unix_server.settimeout(BOUND_S)
    return unix_server


def test_a_call_reaches_a_unix_server_and_both_ends_pass_each_way(named: socket.socket) -> None:
    with closing(Called("80")) as called, named.accept()[0] as far:
        far.settimeout(BOUND_S)
        called.stdin.send(b"request")
        half_close(called.stdin)
        assert receive_all(far) == b"request"
        far.send(b"answer")
        half_close(far)
        assert receive_all(called.stdout) == b"answer"
        assert called.end() == (0, "")


def test_a_unix_server_that_closes_after_its_answer_has_ended_cleanly(named: socket.socket) -> None:
    with closing(Called("80")) as called:
        with named.accept()[0] as far:
            far.send(b"answer")
        assert receive_all(called.stdout) == b"answer"
        half_close(called.stdin)
        assert called.end() == (0, "")


def test_a_unix_server_that_closes_without_reading_all_is_status_74(named: socket.socket) -> None:
    with closing(Called("80")) as called:
        called.stdin.send(b"request")
        with named.accept()[0] as far:
            far.settimeout(BOUND_S)
            assert far.recv(1, socket.MSG_PEEK) == b"r"
        assert called.end() == (ExitStatus.SERVER_RESET, "")


def test_a_call_reaches_a_server_at_another_address(name_servers: Write) -> None:
    with listening_socket("127.0.0.2") as server:
        name_servers(f"tcp {port_of(server)} 127.0.0.2")
        server.settimeout(BOUND_S)
        with closing(Called(str(port_of(server)))) as called, server.accept()[0] as far:
            far.send(b"answer")
            half_close(far)
            assert receive_all(called.stdout) == b"answer"


def test_a_call_for_a_port_whose_line_is_wrong_says_which(server: socket.socket, name_servers: Write) -> None:
    path = name_servers(f"tcp {port_of(server)} nosuch0")
    with closing(Called(str(port_of(server)))) as called:
        status, said = called.end()
    assert status == ExitStatus.SERVER_REFUSED
    assert said.startswith(f"qubes.ForwardTCP: port {port_of(server)}: {path}:1: ")


async def test_a_call_to_the_server_of_calls_reaches_a_unix_server_that_closes_after_its_answer(
    tmp_path: Path, unix_server: socket.socket, name_servers: Write
) -> None:
    name_servers(f"tcp 80 unix:{unix_server.getsockname()}")
    with no_fds_left():
        async with agent(tmp_path) as qrexec, qrexec.call(b"qubes.ForwardTCP+80 sys-net\0early") as call:
            with trio.fail_after(BOUND_S):
                await trio.lowlevel.wait_readable(unix_server)
                with unix_server.accept()[0] as far:
                    await trio.lowlevel.wait_readable(far)
                    assert far.recv(5) == b"early"
                    far.send(b"answer")
            assert await read_all(call) == b"answer"
            assert qrexec.server.calls == 1
            await call.send_eof()
