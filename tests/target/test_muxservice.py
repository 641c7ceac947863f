# SPDX-License-Identifier: GPL-2.0-or-later
"""The target's end, with a mux instead of the exposed qube and real servers on loopback."""

import errno
import os
import socket
from collections.abc import Iterator
from ipaddress import ip_address

import pytest
from helpers import free_port, listening_socket, no_fds_left, port_of
from service_bench import ServiceBench, full_server

from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.mux import Origin, ProxyVersion, ResetCode
from qubes_fwd_qrexec.relay.copy import abort, half_close
from qubes_fwd_qrexec.relay.leg_end import LegEnd
from qubes_fwd_qrexec.relay.socketbuffers import START_BYTES
from qubes_fwd_qrexec.target import connecting, muxservice
from qubes_fwd_qrexec.target.proxyheader import header


@pytest.fixture
def bench(server: socket.socket) -> Iterator[ServiceBench]:
    port = port_of(server)
    with no_fds_left(), ServiceBench(TargetPorts(port, port)) as bench:
        yield bench


# Streams


def test_a_stream_is_a_connection_to_the_server(bench: ServiceBench, server: socket.socket) -> None:
    client, leg = bench.connect(port_of(server))
    far = bench.accept(server)
    with client, far:
        bench.until(lambda: leg.is_joined)
        client.send(b"request")
        assert bench.read(far, 7) == b"request"
        far.send(b"answer")
        half_close(far)
        half_close(client)
        assert bench.read_to_end(client) == (b"answer", "EOF")
        assert bench.read_to_end(far) == (b"", "EOF")
        bench.until(lambda: not bench.service.mux.legs and not bench.near.legs)


def test_the_sockets_buffers_are_set(bench: ServiceBench, server: socket.socket) -> None:
    """docs/behaviours.md, 17."""
    client, leg = bench.connect(port_of(server))
    with client, bench.accept(server):
        bench.until(lambda: leg.is_joined)
        (far,) = bench.service.mux.legs.values()
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            assert far.sock.getsockopt(socket.SOL_SOCKET, option) == 2 * START_BYTES
        assert far.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        leg.abort_from_here()
        bench.until(lambda: not bench.service.mux.legs)


def test_ipv6_is_tried_when_ipv4_refuses() -> None:
    with listening_socket("::1") as server:
        port = port_of(server)
        with ServiceBench(TargetPorts(port, port)) as bench:
            client, leg = bench.connect(port)
            with client, bench.accept(server):
                bench.until(lambda: leg.is_joined)


def test_nobody_listening_is_a_refusal_and_nothing_was_read() -> None:
    """docs/behaviours.md, 21: within no time at all by the loop's own clock."""
    port = free_port()
    with no_fds_left(), ServiceBench(TargetPorts(port, port)) as bench:
        client, leg = bench.connect(port, first=b"unread")
        with client, leg.sock:
            bench.is_time_still = True
            bench.until(lambda: bench.near_owner.refusals)
            assert bench.near_owner.refusals == [(leg, ResetCode.REFUSED)]
            assert leg.sock.recv(100) == b"unread"


def test_a_full_accept_queue_is_a_timeout() -> None:
    """docs/behaviours.md, 22."""
    with no_fds_left(), full_server() as port, ServiceBench(TargetPorts(port, port)) as bench:
        bench.is_time_still = True
        client, leg = bench.connect(port)
        with client, leg.sock:
            bench.until(lambda: bench.service.is_connecting)
            bench.clock.advance(9.9)
            bench.turn()
            assert not bench.near_owner.refusals
            bench.clock.advance(0.1)
            bench.until(lambda: bench.near_owner.refusals == [(leg, ResetCode.TIMEOUT)])
        assert not bench.service.is_connecting


def test_an_abandoned_request_leaves_no_connection_behind() -> None:
    with no_fds_left(), full_server() as port, ServiceBench(TargetPorts(port, port)) as bench:
        client, leg = bench.connect(port)
        bench.until(lambda: bench.service.is_connecting)
        abort(client)
        bench.until(lambda: leg.ended is LegEnd.LOCAL_RESET)
        bench.until(lambda: not bench.service.is_connecting)


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EMFILE, ResetCode.OVER_LIMIT), (errno.EAFNOSUPPORT, ResetCode.UNREACHABLE)],
)
def test_without_a_free_socket_the_stream_is_refused(
    bench: ServiceBench, server: socket.socket, monkeypatch: pytest.MonkeyPatch, number: int, code: ResetCode
) -> None:
    def refuse(_family: int) -> socket.socket:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(connecting, "new_socket", refuse)
    assert bench.refusal(port_of(server)) is code


def test_a_socket_that_cannot_be_watched_is_an_abort(
    bench: ServiceBench, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "too many")

    monkeypatch.setattr(bench.service.loop, "watch_for", refuse)
    client, leg = bench.connect(port_of(server))
    with client, bench.accept(server) as far:
        bench.until(lambda: leg.ended is LegEnd.REMOTE_RESET)
        assert bench.is_aborted(client)
        assert bench.is_aborted(far)


def test_a_port_that_nobody_listens_on_never_answers_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening_socket() as sock:
        port = port_of(sock)
    real = connecting.new_socket

    def unlucky(family: int) -> socket.socket:
        sock = real(family)
        if family == socket.AF_INET:
            sock.bind(("127.0.0.1", port))
        return sock

    monkeypatch.setattr(connecting, "new_socket", unlucky)
    with ServiceBench(TargetPorts(port, port)) as bench:
        assert bench.refusal(port) is ResetCode.REFUSED


def test_a_budget_without_room_is_a_refusal(bench: ServiceBench, server: socket.socket) -> None:
    bench.far_budget.streams = bench.far_budget.streams_max
    assert bench.refusal(port_of(server)) is ResetCode.OVER_LIMIT
    bench.far_budget.streams = 0
    with bench.accept(server) as far:
        assert bench.is_aborted(far)


# The PROXY protocol


@pytest.mark.parametrize("version", [ProxyVersion.V1, ProxyVersion.V2])
@pytest.mark.parametrize("client_address", ["192.0.2.1", "::ffff:192.0.2.1", "2001:db8::1"])
def test_the_server_is_told_first_who_connected(
    bench: ServiceBench, server: socket.socket, version: ProxyVersion, client_address: str
) -> None:
    """docs/behaviours.md, 44."""
    origin = Origin(ip_address(client_address), 40_000, ip_address("2001:db8::2"), 80)
    if "." in client_address:
        origin = Origin(origin.client, origin.client_port, ip_address("198.51.100.2"), 80)
    client, _ = bench.connect(port_of(server), version, origin)
    own = b"PROXY TCP4 6.6.6.6 6.6.6.6 6 6\r\n"
    with client, bench.accept(server) as far:
        client.send(own)
        expected = header(version, origin)
        assert bench.read(far, len(expected) + len(own)) == expected + own


def test_a_server_that_does_not_take_the_whole_header_is_aborted(
    bench: ServiceBench, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header that is cut could pass for data; no new socket's buffer takes one of 16 MiB."""
    monkeypatch.setattr(muxservice, "header", lambda *_: bytes(16 << 20))
    client, leg = bench.connect(port_of(server), ProxyVersion.V2)
    with client, bench.accept(server) as far:
        client.send(b"data")
        assert bench.read_to_end(far)[1] == "RST"
        assert bench.is_aborted(client)
        assert leg.ended is LegEnd.REMOTE_RESET


# The range


def test_every_port_of_the_range_is_reached_and_no_other() -> None:
    with listening_socket() as first, listening_socket() as second:
        low, high = sorted((port_of(first), port_of(second)))
        by_port = {port_of(first): first, port_of(second): second}
        with ServiceBench(TargetPorts(low, high)) as bench:
            for port in (low, high):
                client, _ = bench.connect(port)
                with client, bench.accept(by_port[port]):
                    pass
    with listening_socket() as inside, listening_socket() as outside:
        ports = TargetPorts(port_of(inside), port_of(inside))
        # A listener that lies about the ports of its call: the whole mux call ends.
        with ServiceBench(ports, asked=TargetPorts(1, 65535)) as bench:
            client, leg = bench.connect(port_of(outside))
            bench.until(lambda: bench.near_owner.is_over and bench.service.is_over)
            assert leg.ended is LegEnd.REMOTE_RESET
            problem = f"OPEN to port {port_of(outside)}, which is none of this call's ports"
            assert bench.service.problem == problem
            with pytest.raises(BlockingIOError):
                outside.accept()
            client.close()
            leg.sock.close()
