# SPDX-License-Identifier: GPL-2.0-or-later
"""The bookkeeping under both directions: slots, granted bytes, and what ended streams leave behind."""

import pytest

from qubes_fwd_qrexec.common.errors import LocalProtocolError, RemoteProtocolError
from qubes_fwd_qrexec.mux import Connection, EofReceived, wire
from qubes_fwd_qrexec.mux.limits import CONTROL_BYTES, CONTROL_BYTES_PER_STREAM, FRAME_COST_BYTES
from qubes_fwd_qrexec.mux.messages import FlowCode, GoawayCode

from .flow_helpers import datagrams_frame, end_frame, target_with_flow
from .helpers import (
    CREDIT,
    ORIGIN,
    WINDOW,
    Pair,
    data_frame,
    feed,
    fresh,
    ready,
    reset_frame,
    take,
    target_with_stream,
)


def test_the_bound_on_queued_frames_grows_with_the_streams_that_are_allowed():
    assert fresh("listener").control_bound_bytes == CONTROL_BYTES
    assert fresh("target").control_bound_bytes == CONTROL_BYTES + 8 * CONTROL_BYTES_PER_STREAM
    assert ready("listener").control_bound_bytes == CONTROL_BYTES + 8 * CONTROL_BYTES_PER_STREAM


@pytest.mark.parametrize("first", ["listener", "target"])
def test_credit_and_reset_that_cross_the_last_eof_are_dropped(first):
    pair = Pair()
    pair.open()
    here, there = pair.listener, pair.target
    if first == "target":
        here, there = there, here
    here.send_eof(1)
    there_got = feed(there, take(here))
    assert there_got == [EofReceived(1)]
    # What `here` says before it hears the last EOF:
    here.grant(1, WINDOW - CREDIT)
    here.reset_stream(1)
    crossed = take(here)
    there.send_eof(1)
    assert there.open_streams == 0
    assert feed(there, crossed) == []
    assert feed(here, take(there)) == []
    assert here.open_streams == 0
    with pytest.raises(RemoteProtocolError, match="RESET on stream 1, which is over"):
        feed(there, reset_frame(1))


def test_credit_for_an_ended_stream_is_bounded_by_the_window_it_left():
    pair = Pair()
    pair.open()
    pair.target.send_eof(1)
    pair.listener.send_eof(1)
    pair.settle()
    late = wire.encode_credit(1, WINDOW - CREDIT)
    assert feed(pair.listener, late) == []
    with pytest.raises(RemoteProtocolError, match="CREDIT on stream 1, which is over"):
        feed(pair.listener, wire.encode_credit(1, 1024))


def test_a_stream_that_ended_with_resets_leaves_nothing():
    pair = Pair()
    pair.open()
    pair.listener.reset_stream(1)
    pair.settle()
    pair.target.reset_stream(1)
    pair.settle()
    with pytest.raises(RemoteProtocolError, match="which is over"):
        feed(pair.listener, reset_frame(1))


def test_granted_bytes_are_given_back_by_each_way_a_stream_can_end():
    pair = Pair()
    for _ in range(5):
        pair.open()
    pair.listener.open_stream(8080, ORIGIN, CREDIT)
    assert pair.listener.granted_bytes == 6 * CREDIT
    assert pair.target.granted_bytes == 5 * CREDIT
    pair.target.send_eof(1)
    pair.target.reset_stream(2)
    pair.listener.reset_stream(3)
    pair.target.send_eof(4)
    pair.settle()
    pair.target.reset_stream(4)
    pair.target.reset_stream(6)
    pair.settle()
    assert pair.listener.granted_bytes == CREDIT
    assert pair.target.granted_bytes == CREDIT * 2
    pair.listener.reset_stream(1)
    pair.settle()
    assert pair.target.granted_bytes == CREDIT


def test_granted_is_what_the_peer_may_still_send_including_what_is_held_back():
    pair = Pair()
    listener, target = pair.listener, pair.target
    assert listener.granted(1) == 0
    listener.open_stream(8080, ORIGIN, CREDIT)
    pair.settle()
    assert (listener.granted(1), target.granted(1)) == (CREDIT, 0)
    target.accept_stream(1, 4096)
    pair.settle()
    assert target.granted(1) == 4096
    listener.send_data(1, b"x" * 36)
    pair.settle()
    assert target.granted(1) == 3996
    target.grant(1, 10)
    assert target.bytes_queued == 0
    assert target.granted(1) == target.granted_bytes == 4006
    target.grant(1, 8000)
    assert target.bytes_queued > 0
    assert target.granted(1) == target.granted_bytes == 12006


@pytest.mark.parametrize("end", [Connection.send_eof, Connection.reset_stream])
def test_nothing_is_granted_once_the_peer_has_ended_or_either_end_reset(end):
    pair = Pair()
    pair.open()
    end(pair.listener, 1)
    assert pair.listener.granted(1) == (CREDIT if end is Connection.send_eof else 0)
    pair.settle()
    assert pair.target.open_streams == 1
    assert pair.target.granted(1) == 0
    end(pair.target, 1)
    pair.settle()
    assert pair.listener.open_streams == pair.target.open_streams == 0
    assert pair.listener.granted(1) == pair.target.granted(1) == 0


def test_the_final_goaway_after_a_drain_has_the_same_last_stream():
    pair = Pair()
    pair.open()
    pair.target.drain(GoawayCode.LEASE_OVER)
    pair.listener.open_stream(8080, ORIGIN, CREDIT)
    feed(pair.target, take(pair.listener))
    pair.target.close()
    events = pair.settle()[0]
    assert [event.goaway.last_id for event in (events[0], events[-1])] == [1, 1]


def test_the_questions_follow_the_life_of_a_mux():
    pair = Pair()
    listener = pair.listener
    assert (listener.is_ready, listener.is_draining, listener.is_drained, listener.is_over) == (True,) + (
        False,
    ) * 3
    assert listener.bytes_queued == 0
    assert not listener.has_partial_frame
    pair.open()
    assert (listener.open_streams, listener.open_room) == (1, 7)
    assert not listener.are_ids_used_up
    assert listener.send_limit(1) == CREDIT - FRAME_COST_BYTES
    assert listener.send_limit(2) == 0
    listener.drain(GoawayCode.SHUTDOWN)
    assert (listener.is_draining, listener.is_drained, listener.open_room) == (True, False, 0)
    listener.send_eof(1)
    assert listener.send_limit(1) == 0
    pair.settle()
    pair.target.send_eof(1)
    pair.settle()
    assert listener.is_drained
    listener.close()
    listener.close()
    assert (listener.is_ready, listener.is_over) == (False, True)
    assert len(take(listener)) == 16


def test_a_stream_that_never_existed_is_a_bug_of_the_caller():
    pair = Pair()
    for stream_id in (-1, 0, 1):
        with pytest.raises(LocalProtocolError, match="never existed"):
            pair.listener.reset_stream(stream_id)


def test_each_frame_counts_also_if_there_is_nothing_to_tell_of_it():
    """Else a flood of them would hold up a caller that bounds what it takes at a time."""
    target = target_with_stream()
    target.reset_stream(1)
    frames = wire.encode_ping(bytes(8)) + data_frame(1) * 3 + wire.encode_credit(1, 1024)
    assert list(target.receive_data(frames)) == [None] * 5
    flows = target_with_flow()
    flows.end_flow(1, FlowCode.DONE)
    frames = wire.encode_ping(bytes(8)) + datagrams_frame(1) * 3 + end_frame(1) * 2
    assert list(flows.receive_data(frames)) == [None] * 6
