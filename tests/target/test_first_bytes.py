# SPDX-License-Identifier: GPL-2.0-or-later
"""What a client sends before its stream is accepted, from its socket to the server's."""

import os
import select
import socket
from collections.abc import Iterator

import pytest
from helpers import no_fds_left, port_of, tcp_pair
from mux_bench import BOUND_S, ORIGIN, PORTS, MuxBench
from mux_peer import PeerBench
from service_bench import ServiceBench

from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.mux import OpenReceived, ProxyVersion, ResetCode, Role
from qubes_fwd_qrexec.mux.limits import MAX_FIRST_BYTES
from qubes_fwd_qrexec.relay.backlog import MAX_BYTES
from qubes_fwd_qrexec.relay.copy import abort, half_close
from qubes_fwd_qrexec.relay.leg_end import LegEnd
from qubes_fwd_qrexec.target.proxyheader import header


@pytest.fixture
def bench(server: socket.socket) -> Iterator[ServiceBench]:
    port = port_of(server)
    with no_fds_left(), ServiceBench(TargetPorts(port, port)) as bench:
        yield bench


@pytest.mark.parametrize("length", [1, MAX_FIRST_BYTES, MAX_FIRST_BYTES + 1, 20_000])
def test_all_of_it_arrives_once_and_in_order(bench: ServiceBench, server: socket.socket, length: int) -> None:
    first, more = os.urandom(length), os.urandom(5_000)
    client, leg = bench.connect(port_of(server), first=first)
    with client, bench.accept(server) as far:
        bench.until(lambda: leg.is_joined)
        client.sendall(more)
        half_close(client)
        assert bench.read_to_end(far) == (first + more, "EOF")
        assert leg.sent == len(first + more)
        far.sendall(b"answer")
        half_close(far)
        assert bench.read_to_end(client) == (b"answer", "EOF")
        bench.until(lambda: leg.ended is LegEnd.DONE)
        bench.until(lambda: bench.is_all_back)


def test_an_end_behind_it_is_that_end(bench: ServiceBench, server: socket.socket) -> None:
    client, _ = bench.connect(port_of(server), first=b"question")
    half_close(client)
    with client, bench.accept(server) as far:
        assert bench.read_to_end(far) == (b"question", "EOF")


def test_an_abort_behind_it_is_that_abort(bench: ServiceBench, server: socket.socket) -> None:
    client, leg = bench.connect(port_of(server), first=b"question")
    abort(client)
    with bench.accept(server) as far:
        assert bench.read_to_end(far) == (b"question", "RST")
        assert leg.ended is LegEnd.LOCAL_RESET


@pytest.mark.parametrize("version", [ProxyVersion.V1, ProxyVersion.V2])
def test_the_server_is_told_first_who_connected(
    bench: ServiceBench, server: socket.socket, version: ProxyVersion
) -> None:
    client, _ = bench.connect(port_of(server), version, first=b"question")
    half_close(client)
    with client, bench.accept(server) as far:
        assert bench.read_to_end(far) == (header(version, ORIGIN) + b"question", "EOF")


def open_requests(bench: PeerBench, *firsts: bytes) -> list[bytes]:
    """Ask for a stream of each client, which has sent that; what came with each request."""
    for first in firsts:
        client, accepted = tcp_pair()
        bench.socks[len(bench.socks) + 1] = client
        client.sendall(first)
        arrived = select.poll()
        arrived.register(accepted, select.POLLIN)
        assert not first or arrived.poll(1000 * BOUND_S)
        assert bench.mux.open(PORTS.start, ORIGIN, accepted) is not None
    bench.turn()
    return [event.first for event in bench.hear() if isinstance(event, OpenReceived)]


def test_it_comes_with_the_request_as_far_as_that_takes_it() -> None:
    with PeerBench(Role.LISTENER) as bench:
        first = os.urandom(MAX_FIRST_BYTES + 1)
        assert open_requests(bench, b"", b"hello", first) == [b"", b"hello", first[:-1]]


def test_where_much_waits_already_it_waits_for_its_turn_as_well() -> None:
    count = MAX_BYTES // MAX_FIRST_BYTES + 10
    with PeerBench(Role.LISTENER, max_streams=count) as bench:
        bench.fill_call()
        for _ in range(count):
            client, accepted = tcp_pair()
            bench.socks[len(bench.socks) + 1] = client
            client.sendall(bytes(MAX_FIRST_BYTES))
            assert bench.mux.open(PORTS.start, ORIGIN, accepted) is not None
        assert MAX_BYTES < bench.mux.backlog.bytes_queued < MAX_BYTES + 10 * MAX_FIRST_BYTES


def test_a_client_whose_stream_is_asked_for_again_loses_no_byte_and_sends_none_twice() -> None:
    with no_fds_left(), MuxBench() as bench:
        client, accepted = tcp_pair()
        client.sendall(b"question")
        arrived = select.poll()
        arrived.register(accepted, select.POLLIN)
        assert arrived.poll(1000 * BOUND_S)
        refused = bench.open_on(accepted)
        assert refused is not None
        bench.until(lambda: bench.far_owner.requested)
        bench.far.refuse(1, ResetCode.LEASE_OVER)
        bench.until(lambda: bench.near_owner.refusals)
        assert refused.sent == 0
        client.sendall(b", and more")
        again = bench.open_on(accepted)
        assert again is not None
        bench.until(lambda: len(bench.far_owner.requested) == 2)
        first = bench.far_owner.requested[1].first
        server, connected = tcp_pair()
        with client, server:
            assert bench.far.accept(2, connected) is not None
            bench.until(lambda: again.is_joined)
            half_close(client)
            rest, how = bench.read_to_end(server)
            assert (first + rest, how) == (b"question, and more", "EOF")
            assert again.sent == len(first + rest)
