# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls for one connection to servers that are not at localhost."""

import socket
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from helpers import BOUND_S, listening_socket, port_of
from single_calls import ByProgram
from test_service import receive_all

from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.relay.copy import half_close

Write = Callable[[str], Path]


@pytest.fixture
def named(unix_server: socket.socket, name_servers: Write) -> socket.socket:
    """A server on a UNIX socket, to which port 80 goes."""
    name_servers(f"tcp 80 unix:{unix_server.getsockname()}")
    unix_server.settimeout(BOUND_S)
    return unix_server


def test_a_call_reaches_a_unix_server_and_both_ends_pass_each_way(
    single_calls: ByProgram, named: socket.socket
) -> None:
    with closing(single_calls.call("80")) as called, named.accept()[0] as far:
        far.settimeout(BOUND_S)
        called.stdin.send(b"request")
        half_close(called.stdin)
        assert receive_all(far) == b"request"
        far.send(b"answer")
        half_close(far)
        assert receive_all(called.stdout) == b"answer"
        assert called.end() == (0, "")


def test_a_unix_server_that_closes_after_its_answer_has_ended_cleanly(
    single_calls: ByProgram, named: socket.socket
) -> None:
    with closing(single_calls.call("80")) as called:
        with named.accept()[0] as far:
            far.send(b"answer")
        assert receive_all(called.stdout) == b"answer"
        half_close(called.stdin)
        assert called.end() == (0, "")


def test_a_unix_server_that_closes_without_reading_all_is_status_74(
    single_calls: ByProgram, named: socket.socket
) -> None:
    with closing(single_calls.call("80")) as called:
        called.stdin.send(b"request")
        with named.accept()[0] as far:
            far.settimeout(BOUND_S)
            assert far.recv(1, socket.MSG_PEEK) == b"r"
        assert called.end() == (ExitStatus.SERVER_RESET, "")


def test_a_call_reaches_a_server_at_another_address(name_servers: Write, single_calls: ByProgram) -> None:
    with listening_socket("127.0.0.2") as server:
        name_servers(f"tcp {port_of(server)} 127.0.0.2")
        server.settimeout(BOUND_S)
        with closing(single_calls.call(str(port_of(server)))) as called, server.accept()[0] as far:
            far.send(b"answer")
            half_close(far)
            assert receive_all(called.stdout) == b"answer"


def test_a_call_for_a_port_whose_line_is_wrong_says_which(
    server: socket.socket, name_servers: Write, single_calls: ByProgram
) -> None:
    path = name_servers(f"tcp {port_of(server)} nosuch0")
    with closing(single_calls.call(str(port_of(server)))) as called:
        status, said = called.end()
    assert status == ExitStatus.SERVER_REFUSED
    assert said.startswith(f"qubes.ForwardTCP: port {port_of(server)}: {path}:1: ")
