# SPDX-License-Identifier: GPL-2.0-or-later
from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_fwd_qrexec.mux import MAX_DATAGRAM_BYTES, MAX_SEGMENTS
from qubes_fwd_qrexec.relay.flowqueue import (
    CALL_BYTES,
    COST_BYTES,
    FLOW_BYTES,
    TURN_BYTES,
    WAIT_S,
    FlowQueue,
)
from qubes_fwd_qrexec.system.datagrams import count

_ALL = 1 << 30
_LATER_S = WAIT_S * 1.01


@pytest.fixture
def queue() -> FlowQueue:
    return FlowQueue(_nobody)


def _nobody(flow_id: int, datagrams: int, *, is_old: bool) -> None: ...


def _taken(queue: FlowQueue, most: int = _ALL, now: float = 0.0) -> list[tuple[int, bytes, int]]:
    return list(queue.take(most, now))


def _split(data: bytes, segment: int) -> list[bytes]:
    """The datagrams of a batch."""
    return [data[start : start + segment] for start in range(0, len(data), segment)] if segment else [data]


def test_what_waits_is_taken_once_and_in_order(queue: FlowQueue) -> None:
    for data in (b"one", b"three", b"", b"two"):
        queue.add(1, data, 0, 0.0)
    assert _taken(queue) == [(1, b"one", 0), (1, b"three", 0), (1, b"", 0), (1, b"two", 0)]
    assert _taken(queue) == []
    assert (queue.bytes, queue.flows) == (0, 0)


def test_datagrams_of_equal_size_that_follow_each_other_go_together(queue: FlowQueue) -> None:
    for data, segment in (
        (b"aa", 0),
        (b"bb", 0),
        (b"ccdd", 2),
        (b"e", 0),
        (b"f", 0),
        (b"ghi", 2),
        (b"jj", 0),
    ):
        queue.add(1, data, segment, 0.0)
    assert _taken(queue) == [(1, b"aabbccdde", 2), (1, b"f", 0), (1, b"ghi", 2), (1, b"jj", 0)]


def test_a_longer_datagram_does_not_go_behind_a_shorter_one(queue: FlowQueue) -> None:
    queue.add(1, b"a", 0, 0.0)
    queue.add(1, b"bb", 0, 0.0)
    queue.add(1, b"ccddd", 3, 0.0)
    assert _taken(queue) == [(1, b"a", 0), (1, b"bb", 0), (1, b"ccddd", 3)]


def test_datagrams_of_other_flows_do_not_go_together(queue: FlowQueue) -> None:
    queue.add(1, b"aa", 0, 0.0)
    queue.add(2, b"bb", 0, 0.0)
    assert _taken(queue) == [(1, b"aa", 0), (2, b"bb", 0)]


_batches = st.lists(
    st.tuples(
        st.integers(1, 3),
        st.sampled_from([0, 1, 2, 3, 700, 1400, 30_000, MAX_DATAGRAM_BYTES]),
        st.integers(1, 130),
        st.integers(0, 1400),
    ),
    max_size=9,
)


@given(_batches)
def test_whatever_comes_every_frame_is_legal_and_every_datagram_is_taken_or_counted(
    batches: list[tuple[int, int, int, int]],
) -> None:
    told = Counter[int]()

    def tell(flow_id: int, datagrams: int, *, is_old: bool) -> None:
        assert not is_old
        told[flow_id] += datagrams

    queue, sent = FlowQueue(tell), dict[int, list[bytes]]()
    for number, (flow_id, size, times, shorter) in enumerate(batches):
        times = max(1, min(times, 66_000 // size)) if size else 1
        data = bytes([number]) * (size * times - min(shorter, size - 1 if size else 0))
        segment = size if times > 1 and len(data) > size else 0
        queue.add(flow_id, data, segment, 0.0)
        sent.setdefault(flow_id, []).extend(_split(data, segment))
    assert queue.bytes <= CALL_BYTES
    taken = Counter[int]()
    waiting = {flow_id: deque(datagrams) for flow_id, datagrams in sent.items()}
    for flow_id, data, segment in _taken(queue):
        assert len(data) <= MAX_DATAGRAM_BYTES
        assert segment == 0 or segment < len(data) <= segment * MAX_SEGMENTS
        for datagram in _split(data, segment):
            while waiting[flow_id].popleft() != datagram:  # in order; what was dropped is passed over
                pass
            taken[flow_id] += 1
    assert queue.dropped_full == told.total()
    assert taken + told == Counter({flow_id: len(datagrams) for flow_id, datagrams in sent.items()})
    assert (queue.bytes, queue.flows, queue.dropped_old) == (0, 0, 0)


def test_a_datagram_too_long_for_the_protocol_is_dropped(queue: FlowQueue) -> None:
    queue.add(1, bytes(MAX_DATAGRAM_BYTES + 1), 0, 0.0)
    queue.add(1, bytes(MAX_DATAGRAM_BYTES), 0, 0.0)
    assert queue.dropped_full == 1
    assert [len(data) for _, data, _ in _taken(queue)] == [MAX_DATAGRAM_BYTES]


def test_what_has_waited_for_too_long_is_dropped_oldest_first(queue: FlowQueue) -> None:
    queue.add(1, b"old", 0, 0.0)
    queue.add(1, b"older", 2, 0.0)
    queue.add(1, b"new", 0, WAIT_S / 2)
    assert _taken(queue, now=_LATER_S) == [(1, b"new", 0)]
    assert (queue.dropped_old, queue.dropped_full) == (4, 0)


def test_what_has_waited_for_just_as_long_as_it_may_is_sent(queue: FlowQueue) -> None:
    queue.add(1, b"in time", 0, 0.0)
    assert _taken(queue, now=WAIT_S) == [(1, b"in time", 0)]


def test_a_flow_has_a_bound_and_loses_its_oldest(queue: FlowQueue) -> None:
    most = FLOW_BYTES // (1000 + COST_BYTES)
    for number in range(most):
        queue.add(1, number.to_bytes(4) * 250, 0, 0.0)
    assert queue.dropped_full == 0
    queue.add(1, b"last" * 250, 0, 0.0)
    assert queue.bytes <= FLOW_BYTES
    numbers = [datagram[:4] for _, data, segment in _taken(queue) for datagram in _split(data, segment)]
    assert numbers == [*(number.to_bytes(4) for number in range(1, most)), b"last"]
    assert queue.dropped_full == 1


def test_no_more_is_taken_at_once_than_was_asked_for_of_empty_datagrams_either(queue: FlowQueue) -> None:
    for _ in range(100):
        queue.add(1, b"", 0, 0.0)
    assert len(_taken(queue, 10 * COST_BYTES)) == 10


def test_empty_datagrams_have_a_bound_too(queue: FlowQueue) -> None:
    for _ in range(100_000):
        queue.add(1, b"", 0, 0.0)
    assert queue.bytes <= FLOW_BYTES
    assert len(_taken(queue)) == FLOW_BYTES // COST_BYTES


def test_where_all_have_too_much_the_one_with_the_most_loses(queue: FlowQueue) -> None:
    queue.add(1, b"few", 0, 0.0)
    for flow_id in range(2, 8):
        for _ in range(200):
            queue.add(flow_id, bytes(1400), 0, 0.0)
    assert queue.bytes <= CALL_BYTES
    assert queue.dropped_full > 0
    taken = _taken(queue)
    assert taken[0] == (1, b"few", 0)
    sizes = Counter[int]()
    for flow_id, data, _ in taken[1:]:
        sizes[flow_id] += len(data)
    assert min(sizes.values()) + 1400 > max(sizes.values()) / 2


def test_a_flood_from_many_flows_is_bounded_by_the_call(queue: FlowQueue) -> None:
    flows = 20_000
    for flow_id in range(1, flows + 1):
        queue.add(flow_id, bytes(64), 0, 0.0)
    assert queue.bytes <= CALL_BYTES
    left = len(_taken(queue))
    assert left == CALL_BYTES // (64 + COST_BYTES)
    assert left + queue.dropped_full == flows
    assert queue.flows == 0


def test_flows_take_turns_by_bytes(queue: FlowQueue) -> None:
    for _ in range(150):
        queue.add(1, bytes(1400), 0, 0.0)
    for _ in range(40):
        for flow_id in (2, 3):
            queue.add(flow_id, bytes(200), 0, 0.0)
            queue.add(flow_id, bytes(100), 0, 0.0)
    sizes = Counter[int]()
    left = 80
    for flow_id, data, segment in queue.take(_ALL, 0.0):
        sizes[flow_id] += len(data) + COST_BYTES
        left -= count(len(data), segment) if flow_id == 2 else 0
        if not left:
            break
    # While both have something to send, none is ahead of the other by more than a turn and a frame.
    assert abs(sizes[2] - sizes[3]) <= TURN_BYTES + MAX_DATAGRAM_BYTES
    assert sizes[1] <= sizes[2] + 2 * TURN_BYTES + MAX_DATAGRAM_BYTES


def test_a_flow_with_little_goes_before_those_with_much(queue: FlowQueue) -> None:
    for flow_id in (1, 2):
        for _ in range(100):
            queue.add(flow_id, bytes(1400), 0, 0.0)
    first = queue.take(_ALL, 0.0)
    assert {next(first)[0] for _ in range(4)} == {1, 2}
    queue.add(3, b"ask", 0, 0.0)
    assert next(first) == (3, b"ask", 0)


def test_a_flow_that_has_little_again_and_again_holds_up_nobody(queue: FlowQueue) -> None:
    for _ in range(100):
        queue.add(1, bytes(1400), 0, 0.0)
    queue.add(2, b"ask", 0, 0.0)
    taken = Counter[int]()
    for flow_id, data, segment in queue.take(_ALL, 0.0):
        taken[flow_id] += count(len(data), segment)
        if taken[1] == 100:
            break
        if flow_id == 2:
            queue.add(2, b"ask", 0, 0.0)
    assert taken[2] <= 2 * 100 * (1400 + COST_BYTES) / (3 + COST_BYTES)


def test_many_flows_that_have_little_again_and_again_leave_a_bulk_flow_its_turn(queue: FlowQueue) -> None:
    for _ in range(150):
        queue.add(1, bytes(1400), 0, 0.0)
    turns = queue.take(_ALL, 0.0)
    assert next(turns)[0] == 1
    for flow_id in range(2, 12):
        queue.add(flow_id, b"ask", 0, 0.0)
    before = 0
    for _ in range(1000):
        flow_id = next(turns)[0]
        if flow_id == 1:
            break
        if before:  # it has been found empty meanwhile
            queue.add(before, b"again", 0, 0.0)
        before = flow_id
    assert flow_id == 1


def test_no_more_is_taken_than_was_asked_for_and_a_batch(queue: FlowQueue) -> None:
    for flow_id in (1, 2, 3):
        for _ in range(40):
            queue.add(flow_id, bytes(1400), 0, 0.0)
    taken = _taken(queue, 20_000)
    assert sum(len(data) for _, data, _ in taken) + COST_BYTES * len(taken) >= 20_000
    assert sum(len(data) for _, data, _ in taken[:-1]) < 20_000
    assert queue.bytes > 0


def test_what_an_ended_flow_had_waiting_is_taken_or_dropped(queue: FlowQueue) -> None:
    for flow_id in (1, 2):
        queue.add(flow_id, b"aa", 0, 0.0)
        queue.add(flow_id, b"b", 0, 0.0)
    assert list(queue.rest(1, 0.0)) == [(b"aab", 2)]
    for flow_id in (1, 2, 3):
        queue.end(flow_id)
    assert queue.dropped_old == 2
    assert (queue.bytes, queue.flows) == (0, 0)
    assert _taken(queue) == []


def test_a_flow_that_ends_in_its_turn_takes_nobody_elses(queue: FlowQueue) -> None:
    for flow_id in (1, 2):
        for _ in range(100):
            queue.add(flow_id, bytes(1400), 0, 0.0)
    turns = queue.take(_ALL, 0.0)
    assert next(turns)[0] == 1
    queue.end(1)
    assert {flow_id for flow_id, _, _ in turns} == {2}
