# SPDX-License-Identifier: GPL-2.0-or-later
"""Servers that answer and have left before the service looks: each way to them sees what a client would.

The kernel answers for a listening server, and keeps what it had sent before its RST to be read. A client
that connects to it directly is the judge.
"""

import contextlib
import socket
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
from helpers import BOUND_S, listening_socket, no_fds_left, port_of, tcp_pair
from test_muxservice import ServiceBench

from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.mux import ProxyVersion, ResetCode
from qubes_fwd_qrexec.relay.copy import abort, half_close
from qubes_fwd_qrexec.target import localserver
from qubes_fwd_qrexec.target.localserver import ServiceError

Leave = Callable[[socket.socket], None]
LAST_WORDS = b"421 too many connections\r\n"


def says_and_aborts(sock: socket.socket) -> None:
    sock.send(LAST_WORDS)
    abort(sock)


def says_ends_and_aborts(sock: socket.socket) -> None:
    sock.send(LAST_WORDS)
    half_close(sock)
    abort(sock)


def says_and_closes(sock: socket.socket) -> None:
    sock.send(LAST_WORDS)
    sock.close()


def ends_and_aborts(sock: socket.socket) -> None:
    half_close(sock)
    abort(sock)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with listening_socket() as sock:
        sock.settimeout(BOUND_S)
        yield sock


def read_to_end(sock: socket.socket) -> tuple[bytes, str]:
    data = b""
    try:
        while chunk := sock.recv(65536):
            data += chunk
    except ConnectionResetError:
        return data, "RST"
    return data, "EOF"


def seen_directly(leave: Leave) -> tuple[bytes, str]:
    client, accepted = tcp_pair()
    with client:
        leave(accepted)
        client.setblocking(True)
        return read_to_end(client)


LEAVES = pytest.mark.parametrize(
    "leave",
    [says_and_aborts, says_ends_and_aborts, says_and_closes, ends_and_aborts],
    ids=lambda leave: leave.__name__,
)


@contextlib.contextmanager
def leaving(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, server: socket.socket, leave: Leave
) -> Iterator[list[int]]:
    """Within the block the server has left by the time a connect returns; the families that were tried."""
    tried: list[int] = []

    class Late(socket.socket):
        def connect(self, address: tuple[str, int]) -> None:  # type: ignore[override]
            tried.append(self.family)
            try:
                super().connect(address)
            finally:
                leave(server.accept()[0])

    with monkeypatch.context() as patch:
        patch.setattr(module.socket, "socket", Late)
        yield tried


# Streams of a mux call


@LEAVES
@pytest.mark.parametrize("proxy", [ProxyVersion.OFF, ProxyVersion.V1])
def test_a_mux_calls_client_sees_what_it_would_directly(
    server: socket.socket, monkeypatch: pytest.MonkeyPatch, leave: Leave, proxy: ProxyVersion
) -> None:
    port = port_of(server)
    with no_fds_left(), ServiceBench(TargetPorts(port, port)) as bench:
        client, leg = bench.connect(port, proxy)
        with client:
            with leaving(monkeypatch, localserver, server, leave):
                bench.until(lambda: leg.is_joined)
            assert bench.read_to_end(client) == seen_directly(leave)
            half_close(client)
            bench.until(lambda: not bench.service.mux.legs and not bench.near.legs)


def test_a_mux_calls_server_that_aborts_without_a_word_is_an_abort_and_no_other_is_tried(
    server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = port_of(server)
    with no_fds_left(), ServiceBench(TargetPorts(port, port)) as bench:
        client, leg = bench.connect(port)
        with client, leg.sock:
            with leaving(monkeypatch, localserver, server, abort) as tried:
                bench.until(lambda: bench.near_owner.refusals)
            assert bench.near_owner.refusals == [(leg, ResetCode.ABORTED)]
            assert tried == [socket.AF_INET]
            assert not bench.service.is_connecting


# What waits for its answer (`servertrials`)


@LEAVES
def test_what_it_has_left_can_be_read(
    server: socket.socket, monkeypatch: pytest.MonkeyPatch, leave: Leave
) -> None:
    with no_fds_left():
        with leaving(monkeypatch, localserver, server, leave):
            connected = localserver.connect(port_of(server))
        with connected:
            assert read_to_end(connected) == seen_directly(leave)


def test_an_abort_without_a_word_is_status_74_and_no_other_is_tried(
    server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with no_fds_left(), leaving(monkeypatch, localserver, server, abort) as tried:
        with pytest.raises(ServiceError, match="Connection reset by peer") as caught:
            localserver.connect(port_of(server))
        assert caught.value.status is ExitStatus.SERVER_RESET
        assert tried == [socket.AF_INET]
