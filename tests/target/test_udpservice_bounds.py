# SPDX-License-Identifier: GPL-2.0-or-later
"""What the target's end of a datagram call holds, and for how long, has a bound."""

import errno
import os
import socket
from collections.abc import Iterator

import pytest
from helpers import no_fds_left
from udpservice_bench import UdpBench, udp_port, udp_server

from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.mux import FlowCode
from qubes_fwd_qrexec.relay.flowqueue import CALL_BYTES
from qubes_fwd_qrexec.target.udpflow import ANSWERED_S, UNANSWERED_S


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with udp_server() as sock:
        yield sock


@pytest.fixture
def bench(server: socket.socket) -> Iterator[UdpBench]:
    port = udp_port(server)
    with no_fds_left(), UdpBench(TargetPorts(port, port)) as bench:
        yield bench


def test_an_idle_flow_ends_sooner_if_the_server_has_never_answered(
    bench: UdpBench, server: socket.socket
) -> None:
    _, silent = bench.ask(udp_port(server))
    server.recv(100)
    _, answered = bench.ask(udp_port(server))
    server.sendto(b"answer", server.recvfrom(100)[1])
    bench.run(lambda: answered.datagrams)
    bench.pass_s(UNANSWERED_S - 1)
    assert (silent.code, answered.code) == (None, None)
    bench.pass_s(2)
    assert (silent.code, answered.code) == (FlowCode.DONE, None)
    bench.pass_s(ANSWERED_S - UNANSWERED_S - 2)
    assert answered.code is None
    bench.pass_s(2)
    assert answered.code is FlowCode.DONE
    assert not bench.service.carries_any


def test_what_moves_either_way_puts_the_end_of_a_flow_off(bench: UdpBench, server: socket.socket) -> None:
    flow_id, kept = bench.ask(udp_port(server))
    _, client = server.recvfrom(100)
    for _ in range(3):
        bench.pass_s(UNANSWERED_S - 2)
        bench.listener.send(flow_id, b"more", 0)
        bench.settle()
    for _ in range(3):
        server.sendto(b"answer", client)
        bench.settle()
        bench.pass_s(ANSWERED_S - 2)
        bench.said_s = bench.clock.now
    assert kept.code is None
    assert kept.datagrams == [b"answer"] * 3


def test_a_server_that_floods_costs_a_bounded_amount_and_no_other_flow_its_turn(
    bench: UdpBench, server: socket.socket
) -> None:
    _, flooded = bench.ask(udp_port(server))
    _, victim = server.recvfrom(100)
    _, other = bench.ask(udp_port(server))
    _, client = server.recvfrom(100)
    for _ in range(5000):
        server.sendto(bytes(1400), victim)
    server.sendto(b"answer", client)
    bench.run(lambda: other.datagrams)
    assert len(flooded.datagrams) < 5000
    bench.settle()
    bench.pass_s(2)
    to_server, to_listener = bench.listener.lost_there
    assert to_server == 0
    assert to_listener + len(flooded.datagrams) == 5000


def test_a_listener_side_that_reads_nothing_costs_a_bounded_amount(
    bench: UdpBench, server: socket.socket
) -> None:
    bench.ask(udp_port(server))
    _, victim = server.recvfrom(100)
    mux = bench.service.mux
    for _ in range(1000):
        server.sendto(bytes(8000), victim)
        bench.service.loop.run_once(0.0)
    assert mux.bytes_waiting <= 1 << 20
    assert mux.dropped_full > 0
    assert bench.service.carries_any
    bench.clock.advance(1.0)
    bench.settle()
    bench.pass_s(2)
    to_server, to_listener = bench.listener.lost_there
    assert (to_server, to_listener >= mux.dropped_full + mux.dropped_old) == (0, True)


def test_a_listener_side_that_floods_and_reads_nothing_is_served_and_costs_a_bounded_amount(
    bench: UdpBench, server: socket.socket
) -> None:
    flows = [bench.ask(udp_port(server))[0] for _ in range(10)]
    for _ in flows:
        server.recv(100)
    peer, mux = bench.listener.connection, bench.service.mux
    for number in range(1000):  # its loop is turned no more, so that it reads nothing
        peer.send_datagrams(flows[number % 10], bytes(1400))
        bench.call.send(b"".join(peer.data_to_send()))
        bench.service.loop.run_once(0.0)
        _, client = server.recvfrom(2000)
        server.sendto(bytes(8000), client)
        bench.service.loop.run_once(0.0)
        assert mux.bytes_waiting <= CALL_BYTES
    assert mux.dropped_full > 0
    assert len(mux.flows) == 10


def test_a_server_that_reads_nothing_costs_nothing_here(bench: UdpBench, server: socket.socket) -> None:
    flow_id, kept = bench.ask(udp_port(server))
    for _ in range(2000):
        bench.listener.send(flow_id, bytes(1400), 0)
        bench.settle()
    assert (bench.service.mux.bytes_waiting, kept.code) == (0, None)
    assert bench.service.kept_bytes < 8000


def test_a_flood_of_flows_takes_a_bounded_number_of_sockets(server: socket.socket) -> None:
    port, flows_max = udp_port(server), 5000
    made: list[int] = []

    def counted(family: int) -> socket.socket:
        made.append(family)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with no_fds_left(), UdpBench(TargetPorts(port, port), flows_max=flows_max, new=counted) as bench:
        ends = [bench.open(port)[1] for _ in range(flows_max)]
        bench.run(lambda: all(kept.code is FlowCode.OVER_LIMIT for kept in ends))
        assert len(made) <= 2 * 4000
        assert len(made) < 2 * flows_max


def test_first_datagrams_are_kept_for_the_next_address_within_a_bound() -> None:
    with udp_server() as server:
        port = udp_port(server)
        with no_fds_left(), UdpBench(TargetPorts(port, port), flows_max=200) as bench:
            for _ in range(100):
                flow_id, _ = bench.open(port)
                for _ in range(4):
                    bench.listener.send(flow_id, bytes(60_000), 0)
                bench.settle()
            assert 0 < bench.service.kept_bytes <= 4 << 20
            bench.pass_s(UNANSWERED_S + 1)
            assert bench.service.kept_bytes == 0
