# SPDX-License-Identifier: GPL-2.0-or-later
"""The end of a datagram call at the target: by its lease, by dom0's word, and when it is lost."""

import socket
from collections.abc import Iterator

import pytest
from helpers import no_fds_left
from udpservice_bench import UdpBench, udp_port, udp_server

from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.mux import FlowCode, GoawayCode
from qubes_fwd_qrexec.target.callservice import LEASE_S


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with udp_server() as sock:
        yield sock


@pytest.fixture
def bench(server: socket.socket) -> Iterator[UdpBench]:
    port = udp_port(server)
    with no_fds_left(), UdpBench(TargetPorts(port, port)) as bench:
        yield bench


def test_past_its_lease_it_takes_no_flow_and_ends_those_it_has(
    bench: UdpBench, server: socket.socket
) -> None:
    flow_id, kept = bench.ask(udp_port(server))
    for _ in range(10):
        bench.listener.send(flow_id, b"more", 0)
        bench.settle()
        bench.pass_s(LEASE_S / 10 - 0.1)
    assert kept.code is None
    bench.listener.send(flow_id, b"more", 0)
    bench.settle()
    bench.pass_s(3)
    bench.run(lambda: bench.owner.problems)
    assert bench.owner.drained is GoawayCode.LEASE_OVER
    assert kept.code is FlowCode.LEASE_OVER
    bench.pass_s(2)
    assert (bench.service.is_over, bench.service.problem, bench.service.carries_any) == (True, None, False)


def test_what_drains_takes_no_more_and_goes_on_past_its_lease_to_its_deadline(
    bench: UdpBench, server: socket.socket
) -> None:
    flow_id, kept = bench.ask(udp_port(server))
    bench.word.drain_left_s = 2 * LEASE_S
    bench.service.look()
    bench.run(lambda: bench.owner.drained)
    assert bench.listener.room == 0
    while bench.word.drain_left_s > 20:
        bench.pass_s(20)
        bench.word.drain_left_s -= 20
        bench.listener.send(flow_id, b"more", 0)
        bench.settle()
    assert kept.code is None
    bench.word.drain_left_s = 0.0
    bench.clock.advance(31)
    bench.run(lambda: bench.owner.problems == ["dom0 has ended it"])
    assert kept.code is FlowCode.REVOKED


def test_what_is_no_longer_allowed_ends_when_it_looks(bench: UdpBench, server: socket.socket) -> None:
    _, kept = bench.ask(udp_port(server))
    bench.word.is_allowed = False
    bench.service.look()
    bench.run(lambda: bench.owner.problems == ["dom0 has ended it"])
    assert kept.code is FlowCode.REVOKED
    assert bench.listener.is_revoked


def test_a_lost_call_ends_it_and_every_flow(bench: UdpBench, server: socket.socket) -> None:
    bench.ask(udp_port(server))
    assert bench.service.carries_any
    bench.listener.abandon()
    bench.call.shutdown(socket.SHUT_RDWR)
    bench.run(lambda: bench.service.is_over)
    assert not bench.service.carries_any
    assert bench.service.run() == "the byte stream ended without a final GOAWAY"
