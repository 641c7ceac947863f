# SPDX-License-Identifier: GPL-2.0-or-later
"""The end of a mux call at the target: by its lease, by dom0's word, and when it is lost."""

import socket
from collections.abc import Iterator

import pytest
from helpers import no_fds_left, port_of
from service_bench import ServiceBench, full_server

from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.mux import GoawayCode
from qubes_fwd_qrexec.relay.leg_end import LegEnd
from qubes_fwd_qrexec.target import connecting
from qubes_fwd_qrexec.target.callservice import LEASE_S


@pytest.fixture
def bench(server: socket.socket) -> Iterator[ServiceBench]:
    port = port_of(server)
    with no_fds_left(), ServiceBench(TargetPorts(port, port)) as bench:
        yield bench


def test_past_its_lease_it_takes_no_stream_and_cuts_those_it_has(server: socket.socket) -> None:
    """docs/behaviours.md, 53: so what dom0 no longer allows is over then, even if nobody hears of it."""
    port = port_of(server)
    with ServiceBench(TargetPorts(port, port), lease_s=300) as bench:
        bench.is_time_still = True
        client, _ = bench.connect(port)
        with client, bench.accept(server) as far:
            bench.clock.advance(299)
            bench.turn()
            assert not bench.near_owner.drained
            bench.clock.advance(2)
            bench.until(lambda: bench.near_owner.is_over)
            assert bench.near_owner.drained == [GoawayCode.LEASE_OVER]
            bench.is_time_still = False
            assert bench.is_aborted(client)
            assert bench.is_aborted(far)
        bench.until(lambda: bench.service.is_over)
        assert bench.service.problem is None


def test_without_streams_the_end_of_the_lease_is_an_agreed_end(server: socket.socket) -> None:
    port = port_of(server)
    with ServiceBench(TargetPorts(port, port), lease_s=300) as bench:
        bench.is_time_still = True
        bench.clock.advance(301)
        bench.until(lambda: bench.near_owner.is_over)
        assert bench.near_owner.drained == [GoawayCode.LEASE_OVER]
        assert bench.near_owner.problem is None


def test_a_server_that_is_being_asked_when_the_lease_ends_is_given_up() -> None:
    with full_server() as port, ServiceBench(TargetPorts(port, port)) as bench:
        bench.is_time_still = True
        bench.clock.advance(LEASE_S - 5)
        bench.turn()
        client, _ = bench.connect(port)
        bench.until(lambda: bench.service.is_connecting)
        bench.clock.advance(6)
        bench.until(lambda: bench.near_owner.is_over)
        assert not bench.service.is_connecting
        bench.is_time_still = False
        with client:
            assert bench.is_aborted(client)


def test_what_dom0_has_allowed_again_begins_the_lease_anew(
    bench: ServiceBench, server: socket.socket
) -> None:
    bench.is_time_still = True
    client, leg = bench.connect(port_of(server))
    with client, bench.accept(server):
        for _ in range(3):
            bench.clock.advance(LEASE_S - 10)
            bench.said_s = bench.clock.now
            bench.turn()
        bench.clock.advance(LEASE_S - 10)
        bench.turn()
        assert bench.near.open_room
        assert leg.is_joined
        bench.clock.advance(20)
        bench.until(lambda: bench.near_owner.is_over)


def test_what_drains_takes_no_more_and_goes_on_past_its_lease_to_its_deadline(
    bench: ServiceBench, server: socket.socket
) -> None:
    bench.is_time_still = True
    client, leg = bench.connect(port_of(server))
    with client, bench.accept(server) as far:
        bench.until(lambda: leg.is_joined)
        bench.word.drain_left_s = 2000.0
        bench.service.look()
        bench.until(lambda: bench.near_owner.drained)
        assert not bench.near.open_room
        for _ in range(30):
            bench.clock.advance(LEASE_S / 10)
            bench.word.drain_left_s -= LEASE_S / 10
            bench.turn()
        assert leg.ended is None
        client.send(b"x")
        assert bench.read(far, 1) == b"x"
        bench.word.drain_left_s = 0.0
        bench.clock.advance(31)
        bench.until(lambda: bench.near_owner.is_over)
        assert bench.near_owner.problem == "dom0 has ended it"
        bench.is_time_still = False
        assert bench.is_aborted(client)
        assert bench.is_aborted(far)


def test_what_may_go_on_after_all_goes_on_as_long_as_dom0_says_yes(
    bench: ServiceBench, server: socket.socket
) -> None:
    bench.is_time_still = True
    client, leg = bench.connect(port_of(server))
    with client, bench.accept(server):
        bench.until(lambda: leg.is_joined)
        bench.word.drain_left_s = 20.0
        bench.service.look()
        bench.word.drain_left_s = None
        bench.service.look()
        bench.clock.advance(100)
        bench.turn()
        assert leg.ended is None
        bench.said_s = bench.clock.now
        bench.clock.advance(LEASE_S - 50)
        bench.turn()
        assert leg.ended is None
        bench.clock.advance(100)
        bench.until(lambda: bench.near_owner.is_over)


def test_what_is_no_longer_allowed_ends_when_it_looks(bench: ServiceBench, server: socket.socket) -> None:
    client, _ = bench.connect(port_of(server))
    with client, bench.accept(server) as far:
        bench.word.is_allowed = False
        bench.service.look()
        assert bench.is_aborted(client)
        assert bench.is_aborted(far)
        bench.until(lambda: bench.service.is_over)
        assert bench.near_owner.problem == "dom0 has ended it"


def test_the_lease_of_a_finished_mux_call_can_end_without_harm(bench: ServiceBench) -> None:
    bench.near.drain(GoawayCode.SHUTDOWN)
    bench.until(lambda: bench.service.is_over)
    bench.clock.advance(LEASE_S + 1)
    bench.turn()
    bench.service.take_no_more()
    bench.service.revoke()
    assert bench.service.run() is None


def test_taken_back_by_dom0_every_stream_is_aborted_and_no_server_is_asked(
    bench: ServiceBench, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, _ = bench.connect(port_of(server))
    with client, bench.accept(server) as far:
        monkeypatch.setattr(connecting, "has_answered", lambda _: False)
        waiting, leg = bench.connect(port_of(server))
        bench.until(lambda: bench.service.is_connecting)
        bench.service.revoke()
        assert not bench.service.is_connecting
        bench.until(lambda: bench.near_owner.is_over and bench.service.is_over)
        assert bench.near_owner.problem == "dom0 has ended it"
        assert bench.is_aborted(client)
        assert bench.is_aborted(far)
        with waiting, leg.sock:
            assert leg.ended is LegEnd.REMOTE_RESET


def test_a_lost_call_ends_it_within_two_seconds_though_a_server_takes_nothing(
    bench: ServiceBench, server: socket.socket
) -> None:
    """docs/behaviours.md, 28, by the loop's own clock, and 27 for the server."""
    client, leg = bench.connect(port_of(server))
    with client, bench.accept(server) as far:
        bench.until(lambda: leg.is_joined)
        bench.stall(client)
        bench.is_time_still = True
        bench.near.abandon()
        bench.near_call.shutdown(socket.SHUT_RDWR)
        bench.until(lambda: bench.service.is_over)
        bench.turn()
        assert bench.service.mux.legs
        for _ in range(19):
            bench.clock.advance(0.1)
            bench.turn()
        assert not bench.service.mux.legs
        assert bench.is_aborted(far)


def test_a_lost_call_gives_up_every_request(bench: ServiceBench, server: socket.socket) -> None:
    client, _ = bench.connect(port_of(server))
    bench.near.backlog.send()
    bench.near.abandon()
    bench.near_call.shutdown(socket.SHUT_RDWR)
    bench.until(lambda: bench.service.is_over)
    assert bench.service.problem == "the byte stream ended without a final GOAWAY"
    assert not bench.service.is_connecting
    bench.until(lambda: not bench.service.mux.legs)
    client.close()
