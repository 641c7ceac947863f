# SPDX-License-Identifier: GPL-2.0-or-later
"""A peer whose frames are legal one by one. Each attack has a bound: work, memory, or the mux ends."""

import sys
import tracemalloc

import pytest

from qubes_fwd_qrexec.common.errors import RemoteProtocolError
from qubes_fwd_qrexec.mux import DataReceived, OpenReceived, ResetReceived, wire
from qubes_fwd_qrexec.mux.limits import RAPID_RESETS_PER_TICK

from .helpers import (
    CREDIT,
    PORTS,
    WINDOW,
    data_frame,
    feed,
    open_frame,
    raw_frame,
    ready,
    reset_frame,
    take,
    told,
)

MIB = 1 << 20


def flood(connection, frames, answer=lambda event: None, is_read=True):
    """Feed frames until the mux ends; returns how many it took. The peer reads if ``is_read``."""
    for count, frame in enumerate(frames):
        try:
            for event in told(connection.receive_data(frame)):
                answer(event)
        except RemoteProtocolError:
            return count
        if is_read:
            take(connection)
    raise AssertionError("the mux took it all")


def rapid_resets():
    return (open_frame(i) + reset_frame(i) for i in range(1, 100_001))


def connects_for_rapid_resets(target, connect):
    """How often a target that answers every reset is made to connect; ``connect`` is called each time."""
    connects = 0

    def answer(event):
        nonlocal connects
        if isinstance(event, OpenReceived):
            connects += 1
            connect(event, connects)
        elif isinstance(event, ResetReceived):
            target.reset_stream(event.stream_id)

    flood(target, rapid_resets(), answer)
    return connects


def test_rapid_reset_connects_a_bounded_number_of_times_and_ends_the_mux():
    target = ready("target", max_streams=100)
    connects = connects_for_rapid_resets(target, lambda _event, _connects: None)
    assert connects == RAPID_RESETS_PER_TICK + 100


def test_rapid_reset_is_bounded_also_over_many_seconds():
    target = ready("target", max_streams=100)

    def connect(event, connects):
        target.accept_stream(event.stream_id, CREDIT)
        if connects % 5000 == 0:
            target.tick()

    assert connects_for_rapid_resets(target, connect) == RAPID_RESETS_PER_TICK + 100


def test_a_reset_that_is_not_answered_yet_holds_its_slot():
    target = ready("target", max_streams=100)
    assert flood(target, rapid_resets()) == 100


def test_a_refusal_that_is_not_answered_holds_its_slot():
    target = ready("target", max_streams=100)

    def answer(event):
        target.reset_stream(event.stream_id)

    assert flood(target, map(open_frame, range(1, 100_001)), answer) == 100


def test_resets_within_the_rate_of_a_peer_that_keeps_to_it_do_no_harm():
    target = ready("target", max_streams=100)
    for stream_id in range(1, 10_001):
        feed(target, open_frame(stream_id) + reset_frame(stream_id))
        target.reset_stream(stream_id)
        take(target)
        if stream_id % RAPID_RESETS_PER_TICK == 0:
            target.tick()
    assert target.is_ready


def test_a_million_pings_in_a_row_end_the_mux_at_the_second():
    target = ready("target")
    with pytest.raises(RemoteProtocolError, match="a PING before the PONG"):
        feed(target, wire.encode_ping(b"12345678") * 1_000_000)
    assert target.bytes_queued == 16 + 16  # one PONG, and the final GOAWAY


@pytest.mark.parametrize("size", [1, 2, 100])
def test_frames_of_few_bytes_are_bounded_by_the_credit_they_cost(size):
    target = ready("target")
    feed(target, open_frame(1))
    target.accept_stream(1, CREDIT)
    kept = []
    taken = flood(target, (data_frame(1, bytes(size)) for _ in range(1_000_000)), kept.append)
    assert taken == CREDIT // (size + 64)
    assert sum(sys.getsizeof(bytes(event.data)) + 8 for event in kept) <= CREDIT


def test_frames_of_one_byte_that_are_consumed_are_answered_by_few_frames():
    target = ready("target")
    feed(target, open_frame(1))
    target.accept_stream(1, CREDIT)
    take(target)
    for _ in range(10_000):
        [event] = feed(target, data_frame(1))
        target.grant(1, event.cost)
    assert target.bytes_queued <= 12 * (10_000 * 65 // (CREDIT // 2) + 1)


def test_a_flood_of_credit_is_bounded_by_the_window():
    target = ready("target")
    feed(target, open_frame(1))
    target.accept_stream(1, CREDIT)
    taken = flood(target, (wire.encode_credit(1, 1024) for _ in range(1_000_000)))
    assert taken == (WINDOW - CREDIT) // 1024


@pytest.mark.parametrize("max_streams", [1, 8, 1000])
def test_answers_to_a_peer_that_never_reads_are_bounded(max_streams):
    target = ready("target", max_streams=max_streams)

    def answer(event):
        target.tick()
        if isinstance(event, OpenReceived):
            target.accept_stream(event.stream_id, CREDIT)
        elif isinstance(event, ResetReceived):
            target.reset_stream(event.stream_id)

    frames = rapid_resets()
    flood(target, frames, answer, is_read=False)
    assert target.bytes_queued <= 65_536 + 104 * max_streams + 24 + 16


def test_a_peer_that_never_reads_and_guesses_its_credit_is_bounded_too():
    target = ready("target")
    feed(target, open_frame(1))
    target.accept_stream(1, CREDIT)

    def answer(event):
        target.grant(event.stream_id, event.cost)

    flood(target, (data_frame(1, bytes(CREDIT - 64)) for _ in range(100_000)), answer, is_read=False)
    assert target.bytes_queued <= 65_536 + 104 * 8 + 12 + 16


def test_a_flood_of_recalls_needs_a_credit_for_each():
    target = ready("target")
    feed(target, open_frame(1))
    target.accept_stream(1, CREDIT)
    assert flood(target, (wire.encode_recall(1, 2048) for _ in range(1000))) == 1
    target = ready("target")
    feed(target, open_frame(1))
    target.accept_stream(1, CREDIT)
    frames = (
        frame for _ in range(1000) for frame in (wire.encode_credit(1, 1024), wire.encode_recall(1, WINDOW))
    )
    assert flood(target, frames) == 2 * (WINDOW - CREDIT) // 1024


def test_answers_to_recalls_that_are_not_read_are_bounded():
    target = ready("target")
    feed(target, open_frame(1))
    target.accept_stream(1, CREDIT)
    frames = (wire.encode_credit(1, 14_336) + wire.encode_recall(1, 2048) for _ in range(100_000))
    flood(target, frames, is_read=False)
    assert target.bytes_queued <= 65_536 + 104 * 8 + 12 + 16


def test_a_peer_that_never_answers_keeps_its_credit_and_is_asked_once():
    target = ready("target")
    feed(target, open_frame(1))
    target.accept_stream(1, CREDIT)
    take(target)
    assert target.recall(1, 2048)
    asked = take(target)
    assert asked == wire.encode_recall(1, 2048)
    for _ in range(1000):
        assert not target.recall(1, 2048)
        [event] = feed(target, data_frame(1))
        target.grant(1, event.cost)
    assert wire.encode_recall(1, 2048) not in take(target)
    assert target.granted(1) == CREDIT


@pytest.mark.parametrize("amount", [0, 1, CREDIT])
def test_a_return_without_a_recall_ends_the_mux(amount):
    target = ready("target")
    feed(target, open_frame(1))
    target.accept_stream(1, CREDIT)
    assert flood(target, [wire.encode_return(1, amount)]) == 0


@pytest.mark.parametrize("amount", [CREDIT - 2047, CREDIT, CREDIT + 1, 0xFFFF_FFFF])
def test_a_return_of_more_than_was_recalled_ends_the_mux(amount):
    target = ready("target")
    feed(target, open_frame(1))
    target.accept_stream(1, CREDIT)
    assert target.recall(1, 2048)
    assert flood(target, [wire.encode_return(1, amount)]) == 0


def test_late_recalls_do_not_add_up_to_a_flood():
    target = ready("target")
    for stream_id in (1, 2):
        feed(target, open_frame(stream_id))
        target.accept_stream(stream_id, CREDIT)
        feed(target, wire.encode_eof(stream_id))
        target.send_eof(stream_id)
    assert flood(target, (wire.encode_recall(1, 2048) for _ in range(1000))) == 2


def test_late_frames_do_not_add_up_to_a_flood():
    target = ready("target")
    for stream_id in (1, 2):
        feed(target, open_frame(stream_id))
        target.accept_stream(stream_id, CREDIT)
        feed(target, wire.encode_eof(stream_id))
        target.send_eof(stream_id)
    assert flood(target, (reset_frame(1) for _ in range(1000))) == 2


def test_opens_after_the_lease_connect_to_nothing_and_are_bounded():
    target = ready("target", max_streams=100)
    target.drain(wire.GoawayCode.LEASE_OVER)
    events = []
    taken = flood(target, rapid_resets(), events.append)
    assert (taken, events) == (100, [])


VIOLATIONS = [
    raw_frame(99),
    raw_frame(4, 1, b"x", flags=3),
    raw_frame(4, 1, b""),
    raw_frame(4, 1, bytes(32769)),
    wire.encode_hello(ready("listener").hello),
    wire.encode_credit(1, 0),
    data_frame(1, bytes(CREDIT)),
    open_frame(1),
    open_frame(7),
    raw_frame(6, 0),
]


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_a_violation_with_a_mebibyte_behind_it_keeps_none_of_it(violation):
    target = ready("target")
    feed(target, open_frame(1))
    target.accept_stream(1, CREDIT)
    chunk = violation + bytes(MIB)
    tracemalloc.start()
    with pytest.raises(RemoteProtocolError):
        feed(target, chunk)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < MIB // 16
    assert target.open_streams == 0


def test_a_stream_costs_less_than_a_kibibyte_at_each_end():
    target = ready("target", max_streams=4096)
    opens = b"".join(map(open_frame, range(1, 4097)))
    tracemalloc.start()
    for event in target.receive_data(opens):
        target.accept_stream(event.stream_id, CREDIT)
    take(target)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert target.open_streams == 4096
    assert grown / 4096 < 1024


def test_a_port_outside_the_argument_cannot_be_reached():
    for port in (0, 22, PORTS.start - 1, PORTS.stop, 65535):
        target = ready("target")
        assert flood(target, [open_frame(1, port=port)]) == 0


def test_a_reset_stream_holds_no_data_however_much_comes():
    target = ready("target")
    feed(target, open_frame(1))
    target.accept_stream(1, CREDIT)
    target.reset_stream(1)
    taken = flood(target, (data_frame(1, bytes(1000)) for _ in range(1000)), pytest.fail)
    assert taken == CREDIT // 1064


def test_data_events_are_all_there_is_to_keep():
    target = ready("target")
    feed(target, open_frame(1))
    target.accept_stream(1, CREDIT)
    assert feed(target, data_frame(1, b"abc")) == [DataReceived(1, b"abc")]
    assert target.granted_bytes == CREDIT - 67
