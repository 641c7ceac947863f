# SPDX-License-Identifier: GPL-2.0-or-later
"""A peer of a datagram call whose frames are legal one by one. Each attack has a bound: work, memory, or the
mux ends. Here are the counterparts of test_attacks.py, and those that only flows have."""

import tracemalloc
from itertools import pairwise, repeat

import pytest

from qubes_fwd_qrexec.common.errors import RemoteProtocolError
from qubes_fwd_qrexec.mux import FlowCode, FlowRequested, LostReported, wire
from qubes_fwd_qrexec.mux.limits import FLOWS_PER_TICK, HEADER_BYTES, MAX_DATAGRAM_BYTES, SEGMENT_BYTES
from qubes_fwd_qrexec.mux.messages import GoawayCode

from .flow_helpers import (
    ORIGIN,
    PORTS,
    datagrams_frame,
    end_frame,
    flow_frame,
    frames,
    fresh,
    hello,
    listener_with_flow,
    ready,
    target_with_flow,
)
from .helpers import feed, raw_frame, take, told

MIB = 1 << 20


def flood(connection, attack, answer=lambda event: None, is_read=True):
    """Feed chunks until the mux ends; returns how many it took. The peer reads if ``is_read``."""
    taken = 0
    for chunk in attack:
        try:
            for event in told(connection.receive_data(chunk)):
                answer(event)
        except RemoteProtocolError:
            return taken
        taken += 1
        if is_read:
            take(connection)
    return taken


def listener_of(max_streams):
    """A listener side whose peer takes so many flows, and whose own HELLO is written."""
    listener = fresh("listener")
    feed(listener, wire.encode_hello(hello("target", max_streams=max_streams)))
    return listener


def flows_that_end(count):
    return (flow_frame(i) + datagrams_frame(i) + end_frame(i) for i in range(1, count + 1))


def sockets_of(answer=None):
    """A caller that counts the sockets it would open, and what else it does for an event."""
    opened = []

    def act(event):
        if isinstance(event, FlowRequested):
            opened.append(event.flow_id)
        if answer is not None:
            answer(event)

    return opened, act


@pytest.mark.parametrize("is_read", [True, False])
def test_flows_that_are_opened_and_ended_in_a_loop_open_a_bounded_number_of_sockets_a_second(is_read):
    target = ready("target", max_streams=100)
    opened, act = sockets_of()
    count = 2 * FLOWS_PER_TICK
    assert flood(target, flows_that_end(count), act, is_read) == count
    assert opened == list(range(1, FLOWS_PER_TICK + 1))
    assert target.slots_taken == 0
    assert target.bytes_queued == 0
    assert target.late_datagrams == FLOWS_PER_TICK
    target.tick()
    flood(target, [flow_frame(count + 1)], act)
    assert opened[-1] == count + 1


@pytest.mark.parametrize("is_read", [True, False])
def test_flows_that_are_refused_and_ended_in_a_loop_leave_nothing_either(is_read):
    target = ready("target", max_streams=100)

    def refuse(event):
        if isinstance(event, FlowRequested):
            target.end_flow(event.flow_id, FlowCode.REFUSED)

    opened, act = sockets_of(refuse)
    assert flood(target, flows_that_end(2 * FLOWS_PER_TICK), act, is_read) == 2 * FLOWS_PER_TICK
    assert len(opened) == FLOWS_PER_TICK
    assert target.bytes_queued == target.slots_taken == 0


def test_many_seconds_of_flows_open_so_many_sockets_in_each():
    target = ready("target", max_streams=100)
    opened, act = sockets_of()
    per_second = FLOWS_PER_TICK + 100
    for second in range(3):
        start = second * per_second + 1
        flood(target, (flow_frame(i) + end_frame(i) for i in range(start, start + per_second)), act)
        target.tick()
    assert len(opened) == 3 * FLOWS_PER_TICK


@pytest.mark.parametrize("max_streams", [1, 8, 1000])
def test_refusals_to_a_peer_that_never_reads_are_bounded_by_the_slots(max_streams):
    target = ready("target", max_streams=max_streams)

    def refuse(event):
        target.end_flow(event.flow_id, FlowCode.REFUSED)

    attack = map(flow_frame, range(1, 100_001))
    assert flood(target, attack, refuse, is_read=False) == max_streams
    # The END of each goes with the mux. What is left says why.
    assert [kind.name for kind, _, _ in frames(take(target))] == ["GOAWAY"]


def test_refusals_to_a_peer_that_reads_go_on_and_take_no_more_sockets():
    target = ready("target", max_streams=100)

    def refuse(event):
        target.end_flow(event.flow_id, FlowCode.UNREACHABLE)

    opened, act = sockets_of(refuse)
    count = 2 * FLOWS_PER_TICK
    assert flood(target, map(flow_frame, range(1, count + 1)), act) == count
    assert len(opened) == FLOWS_PER_TICK
    assert target.slots_taken == 0


@pytest.mark.parametrize("max_streams", [1, 8, 1000])
def test_forged_ends_for_flows_that_were_not_even_written_are_bounded(max_streams):
    """A target that reads nothing and guesses which flows its peer is about to open."""
    listener = listener_of(max_streams)
    bound = listener.control_bound_bytes

    attack = (end_frame(listener.open_flow(5300, ORIGIN)) for _ in range(10_000))
    assert flood(listener, attack, is_read=False) == bound // 47
    assert bound == 65_536 + 64 * max_streams
    assert listener.bytes_queued <= bound + 2 * 47 + 16


def test_a_million_pings_in_a_row_end_the_mux_at_the_second():
    target = ready("target")
    with pytest.raises(RemoteProtocolError, match="a PING before the PONG"):
        feed(target, wire.encode_ping(b"12345678") * 1_000_000)
    assert target.bytes_queued == 16 + 16  # one PONG, and the final GOAWAY


# Threads of those who run the tests take some memory too, at times, but not each time.
_LOOKS = 3


def grown_by(connection, attack):
    """How many bytes the connection holds more, and held at most, when these chunks came a few times."""

    def feed_all():
        for chunk in attack:
            for _event in connection.receive_data(chunk):
                pass

    def held():
        tracemalloc.start()
        for _ in range(4):
            feed_all()
        found = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return found

    feed_all()  # what is made once is made before
    return map(min, zip(*(held() for _ in range(_LOOKS)), strict=True))


FLOODS = {
    "empty datagrams": datagrams_frame(1, b"") * 1000,
    "datagrams of one byte": datagrams_frame(1, b"x") * 1000,
    "segments of one byte": datagrams_frame(1, b"x" * 64, 1) * 1000,
    "the longest datagram": datagrams_frame(1, bytes(MAX_DATAGRAM_BYTES)) * 4,
    "the longest datagrams in segments": datagrams_frame(1, bytes(MAX_DATAGRAM_BYTES), 1024) * 4,
    "datagrams on a flow that is over": datagrams_frame(2, b"x" * 100) * 1000,
    "ends of a flow that is over": end_frame(2) * 1000,
}


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_of_legal_frames_occupies_nothing(name, is_split):
    target = ready("target")
    feed(target, flow_frame(1) + flow_frame(2) + end_frame(2))
    take(target)
    chunk = memoryview(FLOODS[name])
    chunks = [chunk[:-5], chunk[-5:]] if is_split else [chunk]
    now, peak = grown_by(target, chunks)
    longest = HEADER_BYTES + SEGMENT_BYTES + MAX_DATAGRAM_BYTES
    assert now < 4096
    assert peak < 4096 + (longest * 5 // 4 if is_split else 0)
    assert target.is_ready
    assert take(target) == b""


def test_a_flood_of_reports_is_two_numbers():
    listener = ready("listener")
    seen = []
    attack = (wire.encode_lost(i // 2, i // 3) for i in range(20_000))
    assert flood(listener, attack, seen.append) == 20_000
    assert seen[-1] == LostReported(9_999, 6_666)
    assert all(type(event) is LostReported for event in seen)
    now, _ = grown_by(listener, [wire.encode_lost(50_000, 50_000)] * 1000)
    assert now < 4096
    assert take(listener) == b""


def test_flows_after_the_lease_open_no_socket_and_queue_nothing():
    target = ready("target", max_streams=100)
    target.drain(GoawayCode.LEASE_OVER)
    opened, act = sockets_of()
    count = 10_000
    assert flood(target, flows_that_end(count), act, is_read=False) == count
    assert opened == []
    assert target.bytes_queued == 16
    assert flood(target, map(flow_frame, range(count + 1, 2 * count)), act, is_read=False) == 100


VIOLATIONS = {
    "unknown type": raw_frame(99),
    "flags": raw_frame(14, 1, b"\0\0x", flags=3),
    "too short": raw_frame(14, 1, b""),
    "too long": raw_frame(14, 1, bytes(65510)),
    "second HELLO": wire.encode_hello(hello("listener")),
    "segment": datagrams_frame(1, bytes(100), 1),
    "id again": flow_frame(1),
    "id left out": flow_frame(7),
    "id of the future": datagrams_frame(7),
    "code": raw_frame(15, 1, bytes(4)),
    "no id": raw_frame(15, 0, bytes(4)),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_with_a_mebibyte_behind_it_keeps_none_of_it(name):
    target = target_with_flow()
    chunk = VIOLATIONS[name] + bytes(MIB)
    tracemalloc.start()
    with pytest.raises(RemoteProtocolError):
        feed(target, chunk)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < MIB // 16
    assert target.slots_taken == 0


@pytest.mark.parametrize("length", [1, 65_510, 65_535])
@pytest.mark.parametrize("make", [target_with_flow, listener_with_flow])
def test_an_illegal_length_is_refused_before_its_payload_arrives(make, length):
    header = b"\x0e\x00" + length.to_bytes(2, "big") + b"\x00\x00\x00\x01"
    connection = make()
    for byte in header[:-1]:
        assert feed(connection, bytes([byte])) == []
    with pytest.raises(RemoteProtocolError, match=f"DATAGRAMS of {length} bytes"):
        feed(connection, header[-1:])


def test_a_trickle_of_bytes_holds_one_frame_at_most():
    target = target_with_flow()
    frame = datagrams_frame(1, bytes(MAX_DATAGRAM_BYTES))
    # One by one, then in larger pieces, since it is long.
    starts = [*range(2000), *range(2000, len(frame) - 1, 15), len(frame) - 1]
    tracemalloc.start()
    for start, end in pairwise(starts):
        assert list(target.receive_data(frame[start:end])) == []
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(frame) <= grown < len(frame) * 5 // 4
    assert target.has_partial_frame
    [event] = feed(target, frame[-1:])
    assert len(event.data) == MAX_DATAGRAM_BYTES
    assert not target.has_partial_frame


def test_a_flow_costs_less_than_200_bytes_at_each_end():
    target = ready("target", max_streams=4000)
    opens = b"".join(map(flow_frame, range(1, 4001)))
    listener = listener_of(4000)
    tracemalloc.start()
    for _event in target.receive_data(opens):
        pass
    at_target, _ = tracemalloc.get_traced_memory()
    for _ in range(4000):
        listener.open_flow(5300, ORIGIN)
    take(listener)
    both, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert target.slots_taken == listener.slots_taken == 4000
    assert at_target / 4000 < 200
    assert (both - at_target) / 4000 < 200


def test_ten_thousand_flows_one_after_the_other_leave_nothing():
    target = ready("target", max_streams=10)

    def life(flow_ids):
        for flow_id in flow_ids:
            feed(target, flow_frame(flow_id) + datagrams_frame(flow_id) + end_frame(flow_id))
            if not flow_id % 1000:
                target.tick()

    def grown_by_life(flow_ids):
        tracemalloc.start()
        life(flow_ids)
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return grown

    life(range(1, 7001))
    assert min(grown_by_life(range(first, first + 1000)) for first in (7001, 8001, 9001)) < 4096


def test_a_port_outside_the_argument_cannot_be_reached():
    for port in (0, 22, PORTS.start - 1, PORTS.stop, 65535):
        assert flood(ready("target"), [flow_frame(1, port=port)]) == 0


def test_an_id_of_the_future_cannot_be_prepared():
    for frame in (datagrams_frame(2), end_frame(2), flow_frame(3), flow_frame(0xFFFF_FFFF)):
        assert flood(target_with_flow(), [frame]) == 0


def test_datagrams_that_come_before_their_flow_end_the_mux():
    assert flood(ready("target"), repeat(datagrams_frame(1), 3)) == 0
