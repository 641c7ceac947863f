# SPDX-License-Identifier: GPL-2.0-or-later
"""The end of a datagram call: the lease, GOAWAY, the end of the bytes, and what comes after."""

import pytest

from qubes_fwd_qrexec.common.errors import LocalProtocolError, RemoteProtocolError
from qubes_fwd_qrexec.mux import FlowCode, FlowEnded, FlowRequested, GoawayReceived, ProxyVersion, wire
from qubes_fwd_qrexec.mux.messages import REFUSAL_WHILE_DRAINING, Goaway, GoawayCode

from .flow_helpers import (
    ORIGIN,
    FlowPair,
    datagrams,
    datagrams_frame,
    end_frame,
    flow_frame,
    frames,
    fresh,
    listener_with_flow,
    ready,
    target_with_flow,
)
from .helpers import feed, goaway_frame, take


def test_the_lease_ends_new_flows_and_lets_live_ones_go_on():
    pair = FlowPair()
    pair.open()
    pair.target.drain(GoawayCode.LEASE_OVER)
    pair.target.drain(GoawayCode.SHUTDOWN)
    assert pair.settle()[0] == [GoawayReceived(Goaway(1, GoawayCode.LEASE_OVER, is_final=False))]
    assert pair.listener.open_room == 0
    assert pair.listener.is_draining
    pair.listener.send_datagrams(1, b"still here")
    pair.target.send_datagrams(1, b"and here")
    assert pair.settle() == ([datagrams(1, b"and here")], [datagrams(1, b"still here")])
    pair.target.end_flow(1, FlowCode.DONE)
    assert not pair.target.is_drained
    pair.settle()
    assert pair.target.is_drained
    assert pair.listener.is_drained
    pair.target.close()
    assert pair.settle()[0] == [GoawayReceived(Goaway(1, GoawayCode.DONE, is_final=True))]
    pair.listener.receive_eof()


@pytest.mark.parametrize("code", REFUSAL_WHILE_DRAINING)
def test_flows_that_crossed_the_drain_are_ended_without_a_word_to_the_caller(code):
    pair = FlowPair()
    pair.open()
    pair.target.drain(code)
    pair.listener.open_flow(5300, ORIGIN)
    pair.listener.send_datagrams(2, b"x")
    at_listener, at_target = pair.settle()
    assert at_target == []
    refusal = FlowCode(REFUSAL_WHILE_DRAINING[code])
    assert at_listener == [GoawayReceived(Goaway(1, code, is_final=False)), FlowEnded(2, refusal)]
    assert pair.target.slots_taken == pair.listener.slots_taken == 1
    assert pair.target.late_datagrams == 1


def test_any_number_of_flows_may_cross_the_drain():
    target = target_with_flow()
    target.drain(GoawayCode.SHUTDOWN)
    for flow_id in range(2, 10_000):
        assert feed(target, flow_frame(flow_id) + datagrams_frame(flow_id) + end_frame(flow_id)) == []
    assert target.slots_taken == 1
    assert len(frames(take(target))) == 1


def test_a_listener_side_that_drains_opens_no_more():
    pair = FlowPair()
    pair.open()
    pair.listener.drain(GoawayCode.SHUTDOWN)
    with pytest.raises(LocalProtocolError, match="no room"):
        pair.listener.open_flow(5300, ORIGIN)
    assert pair.settle()[1] == [GoawayReceived(Goaway(1, GoawayCode.SHUTDOWN, is_final=False))]
    assert pair.target.send_datagrams(1, b"x")


def test_a_drain_needs_a_code_that_lets_flows_go_on():
    with pytest.raises(LocalProtocolError, match="DONE cannot begin a drain"):
        FlowPair().target.drain(GoawayCode.DONE)


@pytest.mark.parametrize("closing", ["listener", "target"])
def test_the_final_goaway_ends_all_flows_at_both_ends(closing):
    pair = FlowPair()
    pair.open()
    here, there = pair.listener, pair.target
    if closing == "target":
        here, there = there, here
    there.send_datagrams(1, b"crossed")
    here.close(GoawayCode.REVOKED)
    here.close()
    here.drain(GoawayCode.LEASE_OVER)
    assert here.slots_taken == 0
    assert not here.send_datagrams(1, b"late")
    here.end_flow(1, FlowCode.DONE)
    final = GoawayReceived(Goaway(1, GoawayCode.REVOKED, is_final=True))
    assert pair.settle() in (([], [final]), ([final], []))
    assert there.slots_taken == 0
    assert there.is_over
    assert not there.send_datagrams(1, b"late")
    assert (there.open_room, there.bytes_queued) == (0, 0)


def test_nothing_follows_the_final_goaway():
    target = target_with_flow()
    feed(target, flow_frame(2))
    target.end_flow(2, FlowCode.REFUSED)
    target.close()
    [(_, _, payload)] = frames(take(target))
    assert wire.decode_goaway(payload) == Goaway(2, GoawayCode.DONE, is_final=True)


def test_the_final_goaway_after_a_drain_has_the_same_last_flow():
    pair = FlowPair()
    pair.open()
    pair.target.drain(GoawayCode.LEASE_OVER)
    pair.listener.open_flow(5300, ORIGIN)
    feed(pair.target, take(pair.listener))
    pair.target.close()
    events = pair.settle()[0]
    assert [event.goaway.last_id for event in events] == [1, 1]


@pytest.mark.parametrize("last_id", [0, 1, 2])
def test_the_target_side_may_have_processed_any_number_of_flows(last_id):
    listener = listener_with_flow()
    listener.open_flow(5300, ORIGIN)
    feed(listener, datagrams_frame(2))
    [event] = feed(listener, goaway_frame(last_id, GoawayCode.LEASE_OVER))
    assert event.goaway.last_id == last_id


@pytest.mark.parametrize("make", [lambda: fresh("listener"), target_with_flow, listener_with_flow])
def test_the_end_of_the_bytes_without_a_final_goaway_is_an_abort(make):
    connection = make()
    with pytest.raises(RemoteProtocolError, match="ended without a final GOAWAY"):
        connection.receive_eof()
    with pytest.raises(RemoteProtocolError, match="ended without a final GOAWAY"):
        connection.receive_data(b"")
    assert connection.is_over
    assert connection.slots_taken == 0


def test_the_end_of_the_bytes_in_a_frame_is_an_abort_even_after_the_final_goaway():
    listener = ready("listener")
    feed(listener, goaway_frame(0, GoawayCode.DONE, True) + b"\x08")
    assert listener.has_partial_frame
    with pytest.raises(RemoteProtocolError, match="ended without"):
        listener.receive_eof()


@pytest.mark.parametrize(
    "tail", [datagrams_frame(1), end_frame(1), wire.encode_ping(b"12345678"), b"\xff" * 8]
)
def test_after_our_final_goaway_all_that_comes_is_dropped(tail):
    listener = listener_with_flow()
    events = listener.receive_data(datagrams_frame(1) + tail + b"\xff" * 8)
    assert next(events) == datagrams(1)
    listener.close()
    assert list(events) == []
    assert feed(listener, b"\xff" * 8) == []
    assert listener.late_datagrams == 0
    assert [frame_type.name for frame_type, _, _ in frames(take(listener))] == ["GOAWAY"]
    listener.receive_eof()


def test_a_flow_goes_on_in_another_call_under_another_id():
    """What the protocol leaves to the caller: nothing of a flow is in its id."""
    first, second = FlowPair(), FlowPair()
    second.open()
    first.open()
    first.target.close(GoawayCode.LEASE_OVER)
    first.settle()
    flow_id = second.listener.open_flow(5300, ORIGIN)
    assert second.settle()[1] == [FlowRequested(flow_id, 5300, ORIGIN, ProxyVersion.OFF)]
