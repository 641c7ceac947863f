# SPDX-License-Identifier: GPL-2.0-or-later
"""Both ends of a datagram call over a pair of sockets; nothing waits but what a test makes wait."""

import socket
from collections.abc import Iterator

import pytest
from flow_bench import FLOWS_MAX, ORIGIN, FlowBench, Kept, Owner
from helpers import no_fds_left, unix_pair

from qubes_fwd_qrexec.common.errors import LocalProtocolError
from qubes_fwd_qrexec.mux import (
    MAX_DATAGRAM_BYTES,
    FlowCode,
    FlowConnection,
    GoawayCode,
    Hello,
    ProxyVersion,
)
from qubes_fwd_qrexec.relay.flowmux import FlowMux
from qubes_fwd_qrexec.relay.flowqueue import CALL_BYTES, WAIT_S
from qubes_fwd_qrexec.relay.loop import READ, Loop


@pytest.fixture
def bench() -> Iterator[FlowBench]:
    with no_fds_left(), FlowBench() as bench:
        yield bench


def test_datagrams_travel_whole_both_ways_and_in_order(bench: FlowBench) -> None:
    flow_id, here, there = bench.joined()
    asked = [b"ask", b"", bytes(MAX_DATAGRAM_BYTES), b"x" * 1400, b"y" * 1400, b"z"]
    for datagram in asked:
        bench.listener.send(flow_id, datagram, 0)
        bench.target.send(flow_id, datagram[::-1], 0)
    bench.run(lambda: len(there.datagrams) == len(here.datagrams) == len(asked))
    assert there.datagrams == asked
    assert here.datagrams == [datagram[::-1] for datagram in asked]
    assert (there.batches[3], len(there.batches)) == ((b"x" * 1400 + b"y" * 1400 + b"z", 1400), 4)


def test_the_target_side_hears_of_a_flow_before_its_first_datagram(bench: FlowBench) -> None:
    flow_id, _ = bench.open(54, ProxyVersion.V2)
    bench.listener.send(flow_id, b"first", 0)
    bench.run(lambda: bench.target_owner.kept)
    (request,) = bench.target_owner.requests
    assert (request.flow_id, request.port) == (flow_id, 54)
    assert (request.origin, request.proxy) == (ORIGIN, ProxyVersion.V2)
    bench.run(lambda: bench.target_owner.kept[flow_id].datagrams == [b"first"])


def test_a_flow_that_is_refused_hears_why(bench: FlowBench) -> None:
    bench.target_owner.refuses = FlowCode.OVER_LIMIT
    flow_id, here = bench.open()
    bench.listener.send(flow_id, b"lost", 0)
    bench.run(lambda: here.code)
    assert here.code is FlowCode.OVER_LIMIT
    assert not bench.listener.flows
    assert bench.listener.room == FLOWS_MAX
    bench.settle()
    assert bench.target.dropped_late == 1
    assert bench.target_owner.late == 1


def test_a_flow_ends_at_both_ends_and_the_end_that_ended_it_hears_nothing(bench: FlowBench) -> None:
    flow_id, here, there = bench.joined()
    bench.listener.send(flow_id, b"last", 0)
    bench.listener.finish(flow_id, FlowCode.DONE)
    bench.run(lambda: there.code)
    assert (there.code, here.code) == (FlowCode.DONE, None)
    assert there.datagrams == [b"last"]
    assert not bench.listener.flows
    assert not bench.target.flows
    bench.listener.send(flow_id, b"abc", 2)
    assert bench.listener.dropped_old == 2


def test_there_is_room_for_no_more_flows_than_the_target_side_takes(bench: FlowBench) -> None:
    opened = [bench.open()[0] for _ in range(FLOWS_MAX)]
    assert bench.listener.room == 0
    with pytest.raises(LocalProtocolError):
        bench.open()
    bench.listener.end(opened[0], FlowCode.DONE)
    assert bench.listener.room == 0  # until END is written
    bench.settle()
    assert bench.listener.room == 1


def test_what_a_call_does_not_take_in_time_is_dropped_and_counted(bench: FlowBench) -> None:
    flow_id, _, there = bench.joined()
    waiting = bench.stop_reading(flow_id)
    bench.clock.advance(WAIT_S * 1.01)
    bench.listener.send(flow_id, b"new", 0)
    bench.run(lambda: b"new" in there.datagrams)
    assert bench.listener.dropped_old == waiting
    assert bench.listener_owner.drops == {(flow_id, True): waiting}
    assert (bench.listener.dropped_full, bench.listener.bytes_waiting) == (0, 0)
    assert not any(len(datagram) == 1000 for datagram in there.datagrams)


def test_what_a_call_takes_in_time_is_not_dropped(bench: FlowBench) -> None:
    flow_id, _, there = bench.joined()
    bench.stop_reading(flow_id)
    bench.clock.advance(WAIT_S * 0.99)
    bench.listener.send(flow_id, b"new", 0)
    bench.run(lambda: b"new" in there.datagrams)
    assert (bench.listener.dropped_old, bench.listener.dropped_full) == (0, 0)


def test_a_turn_that_takes_long_drops_nothing_that_the_call_takes(bench: FlowBench) -> None:
    flow_id, _, there = bench.joined()
    bench.settle()
    bench.listener.send(flow_id, b"one", 0)
    bench.clock.advance(1.0)
    bench.run(lambda: there.datagrams == [b"one"])
    bench.listener.send(flow_id, b"two", 0)
    bench.clock.advance(1.0)
    bench.listener.finish(flow_id, FlowCode.DONE)
    bench.run(lambda: there.code)
    assert there.datagrams == [b"one", b"two"]
    assert bench.listener.dropped_old == 0


def test_a_peer_that_reads_nothing_costs_a_bounded_amount(bench: FlowBench) -> None:
    flows = [bench.joined()[0] for _ in range(8)]
    bench.stop_reading(flows[0])
    for _ in range(1000):
        for flow_id in flows:
            bench.listener.send(flow_id, bytes(1400), 0)
    bench.settle(bench.listener)
    assert bench.listener.bytes_waiting <= CALL_BYTES
    assert bench.listener.dropped_full > 0
    assert bench.listener_owner.drops.total() == bench.listener.dropped_full + bench.listener.dropped_old
    assert {flow_id for flow_id, _ in bench.listener_owner.drops} == set(flows)
    assert bench.listener.connection.bytes_queued == 0


def test_a_few_datagrams_go_before_those_of_a_bulk_flow(bench: FlowBench) -> None:
    arrived: list[int] = []

    class Noted(Kept):
        def deliver(self, data: memoryview, segment: int) -> None:
            arrived.append(len(data))

    (bulk, _, _), (other, _, _) = bench.joined(), bench.joined()
    for flow_id in (bulk, other):
        bench.target.join(flow_id, Noted())
    bench.stop_reading(bulk)
    for _ in range(100):
        bench.listener.send(bulk, bytes(1400), 0)
    bench.listener.send(other, b"ask", 0)
    bench.run(lambda: 3 in arrived)
    assert all(length >= 60_000 for length in arrived[: arrived.index(3)])


def test_a_flow_that_is_ended_sends_nothing_more(bench: FlowBench) -> None:
    """Not even what came in the turn in which its forward was closed."""
    flow_id, _, there = bench.joined()
    bench.settle()
    bench.listener.send(flow_id, b"abc", 2)
    bench.listener.end(flow_id, FlowCode.DONE)
    assert (bench.listener.dropped_old, bench.listener.bytes_waiting) == (2, 0)
    bench.run(lambda: there.code)
    assert there.datagrams == []


def test_what_a_flow_has_waiting_does_not_hold_up_its_end(bench: FlowBench) -> None:
    flow_id, _, there = bench.joined()
    waiting = bench.stop_reading(flow_id)
    bench.listener.finish(flow_id, FlowCode.DONE)
    assert (bench.listener.dropped_old, bench.listener.bytes_waiting) == (waiting, 0)
    assert bench.listener_owner.drops == {(flow_id, True): waiting}
    bench.run(lambda: there.code)
    assert all(len(datagram) == 60_000 for datagram in there.datagrams)


def test_what_waits_for_a_flow_that_the_other_end_ends_is_dropped(bench: FlowBench) -> None:
    flow_id, here, _ = bench.joined()
    waiting = bench.stop_reading(flow_id)
    bench.target.end(flow_id, FlowCode.REFUSED)
    bench.target.loop.run_once(0.0)
    bench.run(lambda: here.code)
    assert (bench.listener.dropped_old, bench.listener.bytes_waiting) == (waiting, 0)


def test_a_burst_of_one_turn_is_written_while_it_comes(bench: FlowBench) -> None:
    flow_id, _, there = bench.joined()
    bench.settle()
    for _ in range(3):
        bench.listener.send(flow_id, bytes(60_000), 0)
    assert bench.listener.bytes_waiting < 100_000  # in the same turn
    bench.run(lambda: len(there.datagrams) == 3)


@pytest.mark.parametrize("is_alone", [True, False])
def test_a_lone_datagram_does_not_wait_for_the_end_of_its_turn(bench: FlowBench, is_alone: bool) -> None:
    flow_id, _, there = bench.joined()
    bench.settle()
    (one, other), (busy, peer) = unix_pair(), unix_pair()
    loop, waits = bench.listener.loop, list[bool]()

    def serve(_: int) -> None:
        one.recv(1)
        for data in (b"one", b"two", b"six"):
            bench.listener.send(flow_id, data, 0)
            waits.append(bench.listener.bytes_waiting > 0)

    with one, other, busy, peer:
        loop.watch(one.fileno(), READ, serve, bench.listener.fail)
        loop.watch(busy.fileno(), READ, lambda _: None, bench.listener.fail)
        if not is_alone:
            peer.send(b"x")
        for pauses in (0, 0, 1):  # the second time it comes in the turn behind, and goes with the others
            for _ in range(pauses):
                loop.run_once(0.0)
            other.send(b"x")
            loop.run_once(0.0)
        loop.unwatch(one.fileno())
        loop.unwatch(busy.fileno())
    assert waits == [not is_alone, True, True] + [True] * 3 + [not is_alone, True, True]
    bench.run(lambda: len(there.datagrams) == 9)
    assert there.batches[0] == ((b"one", 0) if is_alone else (b"onetwosix", 3))
    assert (b"onetwosix", 3) in there.batches


@pytest.mark.parametrize("length", [3, MAX_DATAGRAM_BYTES + 1])
def test_a_lone_datagram_has_no_more_room_than_others(bench: FlowBench, length: int) -> None:
    flow_id, _, _ = bench.joined()
    if length == 3:
        bench.stop_reading(flow_id)
    loop, before = bench.listener.loop, bench.listener.bytes_waiting
    one, other = unix_pair()
    with one, other:
        loop.run_once(0.0)
        loop.watch(
            one.fileno(),
            READ,
            lambda _: bench.listener.send(flow_id, bytes(length), 0),
            bench.listener.fail,
        )
        other.send(b"x")
        loop.run_once(0.0)
        loop.unwatch(one.fileno())
    assert bench.listener.dropped_full == int(length > MAX_DATAGRAM_BYTES)
    assert (bench.listener.bytes_waiting > before) == (length == 3)


def test_the_listener_side_learns_what_the_target_side_dropped(bench: FlowBench) -> None:
    assert bench.listener.lost_there == (0, 0)
    bench.target.report_lost(3, 4)
    bench.second()
    assert bench.listener.lost_there == (3, 4)
    assert bench.listener_owner.there == 7
    bench.target.report_lost(3, 5)
    bench.second()
    assert bench.listener_owner.there == 8
    with pytest.raises(LocalProtocolError):
        bench.target.report_lost(2, 4)
    with pytest.raises(LocalProtocolError):
        bench.listener.report_lost(3, 4)


@pytest.mark.parametrize(
    ("code", "seen", "problem"),
    [
        (GoawayCode.DONE, FlowCode.DONE, None),
        (GoawayCode.REVOKED, FlowCode.REVOKED, "dom0 has ended it"),
        (GoawayCode.LEASE_OVER, FlowCode.LEASE_OVER, "the other end closed the mux call: LEASE_OVER"),
        (GoawayCode.INTERNAL, FlowCode.INTERNAL, "the other end closed the mux call: INTERNAL"),
    ],
)
def test_the_end_of_the_call_is_the_end_of_its_flows(
    bench: FlowBench, code: GoawayCode, seen: FlowCode, problem: str | None
) -> None:
    flow_id, here, there = bench.joined()
    bench.target.send(flow_id, b"answer", 0)
    bench.settle()
    bench.target.close(code)
    bench.run(lambda: bench.listener_owner.problems)
    assert (here.code, there.code, here.datagrams) == (seen, seen, [b"answer"])
    assert bench.listener_owner.problems == [problem]
    assert bench.listener.is_revoked is (code is GoawayCode.REVOKED)
    assert (bench.listener.room, bench.listener.flows) == (0, {})
    bench.listener.send(flow_id, b"late", 0)
    bench.listener.end(flow_id, FlowCode.DONE)
    bench.clock.advance(2.0)
    bench.run(lambda: bench.target_owner.problems == [None])


def test_a_call_that_is_lost_ends_its_flows(bench: FlowBench) -> None:
    flow_id, here, _ = bench.joined()
    bench.listener.send(flow_id, bytes(10), 0)
    bench.calls[1].shutdown(socket.SHUT_RDWR)
    bench.clock.advance(2.0)
    bench.run(lambda: bench.listener_owner.problems)
    assert here.code is not None
    assert bench.listener_owner.problems != [None]
    assert (bench.listener.flows, bench.listener.bytes_waiting) == ({}, 0)


def test_a_call_that_drains_takes_no_flow_and_ends_with_the_last(bench: FlowBench) -> None:
    flow_id, _, there = bench.joined()
    bench.target.drain(GoawayCode.LEASE_OVER)
    bench.settle()
    assert bench.listener_owner.drained is GoawayCode.LEASE_OVER
    assert bench.listener.room == 0
    bench.listener.send(flow_id, b"still", 0)
    bench.settle()
    assert there.datagrams == [b"still"]
    assert not bench.listener_owner.problems
    bench.listener.end(flow_id, FlowCode.DONE)
    bench.run(lambda: bench.listener_owner.problems == [None])


def test_an_abandoned_call_ends_its_flows_and_tells_its_owner_nothing(bench: FlowBench) -> None:
    _, here, _ = bench.joined()
    bench.listener.abandon()
    assert here.code is FlowCode.SHUTDOWN
    assert bench.listener_owner.problems == []
    assert bench.listener.is_over


def test_a_violation_ends_the_call_and_says_so(bench: FlowBench) -> None:
    _, here, there = bench.joined()
    bench.calls[0].send(bytes(8))
    bench.run(lambda: bench.target_owner.problems and bench.listener_owner.problems)
    assert bench.target.is_peer_wrong
    assert not bench.listener.is_peer_wrong
    assert bench.listener_owner.problems == ["the other end closed the mux call: PROTOCOL_ERROR"]
    assert (here.code, there.code) == (FlowCode.INTERNAL, FlowCode.INTERNAL)


def test_a_peer_without_hello_is_waited_for_for_a_while(bench: FlowBench) -> None:
    here, there = unix_pair()
    owner = Owner()
    with here, there, here.dup() as sink:
        loop = bench.listener.loop
        mux = FlowMux(loop, FlowConnection(Hello(0, bytes(16)), range(53, 54)), here, sink, owner, hello_s=3)
        assert mux.room == 0
        for _ in range(3):
            assert owner.problems == []
            bench.second()
        assert owner.problems == ["no HELLO within 3 s"]


@pytest.mark.usefixtures("bugs_are_wanted")
def test_a_bug_in_one_flow_harms_no_other(bench: FlowBench) -> None:
    class Buggy(Kept):
        def deliver(self, data: memoryview, segment: int) -> None:
            raise KeyError(segment)

    (first, _, _), (second, _, other) = bench.joined(), bench.joined()
    buggy = Buggy()
    bench.target.join(first, buggy)
    bench.listener.send(first, b"x", 0)
    bench.listener.send(second, b"y", 0)
    bench.run(lambda: other.datagrams)
    assert buggy.has_failed
    assert not bench.target_owner.problems


@pytest.mark.usefixtures("bugs_are_wanted")
def test_a_flow_that_a_bug_keeps_from_beginning_is_refused(bench: FlowBench) -> None:
    bench.target_owner.kept.clear()
    del bench.target_owner.mux  # so that it cannot join
    _, here = bench.open()
    bench.run(lambda: here.code)
    assert here.code is FlowCode.INTERNAL


def test_without_room_for_a_socket_to_watch_there_is_no_mux() -> None:
    here, there = unix_pair()
    loop = Loop()
    with here, there:
        connection = FlowConnection(Hello(0, bytes(16)), range(53, 54))
        with pytest.raises(FileExistsError):  # as the kernel watches no descriptor twice
            FlowMux(loop, connection, here, here, Owner())
        assert not loop.watched
    loop.close()
