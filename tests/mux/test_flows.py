# SPDX-License-Identifier: GPL-2.0-or-later
"""What the caller of a datagram call's end may do, and that it reaches the other end."""

import pytest

from qubes_fwd_qrexec.common.errors import LocalProtocolError
from qubes_fwd_qrexec.mux import (
    Connection,
    FlowCode,
    FlowConnection,
    FlowEnded,
    FlowRequested,
    HelloReceived,
    LostReported,
    PongReceived,
    ProxyVersion,
    Role,
)
from qubes_fwd_qrexec.mux.limits import FLOWS_PER_TICK, LAST_STREAM_ID, MAX_DATAGRAM_BYTES, MAX_SEGMENTS
from qubes_fwd_qrexec.mux.wire import FrameType

from . import helpers
from .flow_helpers import ORIGIN, PORTS, FlowPair, datagrams, frames, fresh, hello, ready
from .helpers import feed, take


def test_hello_is_queued_at_once_and_makes_both_ready():
    listener, target = FlowConnection(hello("listener"), PORTS), FlowConnection(hello("target"), PORTS)
    assert not listener.is_ready
    assert listener.open_room == 0
    assert feed(target, take(listener)) == [HelloReceived(hello("listener"))]
    assert feed(listener, take(target)) == [HelloReceived(hello("target"))]
    assert listener.is_ready
    assert target.is_ready
    assert (listener.role, target.role) == (Role.LISTENER, Role.TARGET)
    assert (listener.open_room, target.open_room) == (8, 0)


def test_a_hello_of_the_other_kind_of_call_is_a_bug_of_the_caller():
    with pytest.raises(LocalProtocolError, match="other kind of call"):
        FlowConnection(helpers.hello("listener"), PORTS)
    with pytest.raises(LocalProtocolError, match="other kind of call"):
        Connection(hello("listener"), PORTS)


def test_datagrams_travel_with_their_flow_and_both_ways():
    pair = FlowPair()
    assert pair.listener.open_flow(5301, ORIGIN) == 1
    assert pair.listener.send_datagrams(1, b"question")
    assert pair.settle()[1] == [FlowRequested(1, 5301, ORIGIN, ProxyVersion.OFF), datagrams(1, b"question")]
    assert pair.target.send_datagrams(1, b"answer")
    assert pair.settle()[0] == [datagrams(1, b"answer")]
    pair.listener.end_flow(1, FlowCode.DONE)
    assert pair.settle() == ([], [FlowEnded(1, FlowCode.DONE)])
    assert pair.listener.slots_taken == pair.target.slots_taken == 0


@pytest.mark.parametrize("size", [0, 1, 4094, 4095, 4096, 4097, MAX_DATAGRAM_BYTES])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_datagram_of_any_length_and_kind_travels_whole(size, kind):
    pair = FlowPair()
    pair.open()
    data = bytes(range(256)) * 256
    assert pair.listener.send_datagrams(1, kind(data[:size]))
    assert pair.settle()[1] == [datagrams(1, data[:size])]


@pytest.mark.parametrize(
    ("segment", "length"),
    [(1, 2), (1, 64), (500, 501), (500, 1000), (1023, 64 * 1023), (32754, 65507), (65506, 65507)],
)
def test_equal_datagrams_may_travel_in_one_frame(segment, length):
    pair = FlowPair()
    pair.open()
    assert pair.target.send_datagrams(1, bytes(length), segment)
    assert pair.settle()[0] == [datagrams(1, bytes(length), segment)]


@pytest.mark.parametrize(
    ("segment", "length"),
    [
        (0, MAX_DATAGRAM_BYTES + 1),
        (1, 0),
        (1, 1),
        (1, MAX_SEGMENTS + 1),
        (500, 500),
        (500, 499),
        (500, MAX_SEGMENTS * 500 + 1),
        (40_000, MAX_DATAGRAM_BYTES + 1),
        (-1, 1),
        (70_000, 65_507),
    ],
)
def test_what_fits_no_frame_is_a_bug_of_the_caller(segment, length):
    pair = FlowPair()
    pair.open()
    with pytest.raises(LocalProtocolError, match="cannot be sent"):
        pair.listener.send_datagrams(1, bytes(length), segment)
    assert take(pair.listener) == b""


@pytest.mark.parametrize("proxy", [ProxyVersion.OFF, ProxyVersion.V2])
def test_the_listener_side_says_which_proxy_header_the_server_gets(proxy):
    pair = FlowPair()
    pair.listener.open_flow(5300, ORIGIN, proxy)
    [event] = pair.settle()[1]
    assert event == FlowRequested(1, 5300, ORIGIN, proxy)
    assert event.proxy is proxy


def test_the_proxy_header_of_tcp_is_refused():
    pair = FlowPair()
    with pytest.raises(LocalProtocolError, match="for TCP alone"):
        pair.listener.open_flow(5300, ORIGIN, ProxyVersion.V1)
    assert pair.open() == 1


def test_only_the_listener_side_opens_and_only_ports_of_the_call():
    pair = FlowPair()
    with pytest.raises(LocalProtocolError, match="this is the target side"):
        pair.target.open_flow(5300, ORIGIN)
    for port in (53, PORTS.start - 1, PORTS.stop):
        with pytest.raises(LocalProtocolError, match=f"port {port} is none of"):
            pair.listener.open_flow(port, ORIGIN)


def test_nothing_is_opened_before_hello():
    with pytest.raises(LocalProtocolError, match="no room"):
        fresh("listener").open_flow(5300, ORIGIN)


def test_nothing_goes_out_on_a_flow_that_is_over():
    pair = FlowPair()
    pair.open()
    pair.open()
    pair.target.end_flow(1, FlowCode.REFUSED)
    assert not pair.target.send_datagrams(1, b"late")
    assert pair.settle() == ([FlowEnded(1, FlowCode.REFUSED)], [])
    assert not pair.listener.send_datagrams(1, b"late")
    pair.listener.end_flow(1, FlowCode.DONE)
    pair.target.end_flow(1, FlowCode.DONE)
    assert take(pair.listener) == take(pair.target) == b""
    assert pair.listener.send_datagrams(2, b"alive")


@pytest.mark.parametrize("flow_id", [-1, 0, 1])
def test_a_flow_that_never_existed_is_a_bug_of_the_caller(flow_id):
    listener = FlowPair().listener
    with pytest.raises(LocalProtocolError, match="never existed"):
        listener.send_datagrams(flow_id, b"x")
    with pytest.raises(LocalProtocolError, match="never existed"):
        listener.end_flow(flow_id, FlowCode.DONE)


def test_the_last_datagrams_go_before_end_and_none_after():
    pair = FlowPair()
    pair.open()
    pair.listener.send_datagrams(1, b"last")
    pair.listener.end_flow(1, FlowCode.DONE)
    assert pair.settle()[1] == [datagrams(1, b"last"), FlowEnded(1, FlowCode.DONE)]


def test_a_slot_is_free_once_its_end_is_written():
    pair = FlowPair(max_streams=1)
    pair.open()
    assert pair.listener.open_room == 0
    pair.listener.end_flow(1, FlowCode.DONE)
    assert pair.listener.open_room == 0
    take(pair.listener)
    assert pair.listener.open_room == 1


def test_ends_that_cross_free_the_slot_and_the_second_is_not_sent():
    pair = FlowPair(max_streams=1)
    pair.open()
    pair.target.end_flow(1, FlowCode.REFUSED)
    pair.listener.end_flow(1, FlowCode.DONE)
    assert feed(pair.target, take(pair.listener)) == []
    assert take(pair.target) == b""
    assert pair.target.slots_taken == pair.listener.slots_taken == 0
    pair.open()
    pair.target.end_flow(2, FlowCode.REFUSED)
    pair.listener.end_flow(2, FlowCode.DONE)
    at_target, at_listener = take(pair.listener), take(pair.target)
    assert feed(pair.target, at_target) == feed(pair.listener, at_listener) == []
    assert pair.target.slots_taken == pair.listener.slots_taken == 0


def test_datagrams_that_cross_an_end_are_dropped_and_counted():
    pair = FlowPair()
    pair.open()
    pair.target.end_flow(1, FlowCode.DONE)
    pair.listener.send_datagrams(1, b"one")
    pair.listener.send_datagrams(1, b"aabbc", 2)
    assert pair.settle() == ([FlowEnded(1, FlowCode.DONE)], [])
    assert (pair.target.late_datagrams, pair.listener.late_datagrams) == (4, 0)


def test_flows_beyond_the_rate_are_ended_without_a_word_to_the_caller():
    pair = FlowPair(max_streams=FLOWS_PER_TICK + 5)
    for _ in range(FLOWS_PER_TICK + 2):
        pair.listener.open_flow(5300, ORIGIN)
    pair.listener.send_datagrams(FLOWS_PER_TICK + 1, b"x")
    at_listener, at_target = pair.settle()
    assert [event.flow_id for event in at_target] == list(range(1, FLOWS_PER_TICK + 1))
    assert at_listener == [FlowEnded(FLOWS_PER_TICK + n, FlowCode.OVER_LIMIT) for n in (1, 2)]
    assert pair.target.late_datagrams == 1
    pair.target.tick()
    flow_id = pair.listener.open_flow(5300, ORIGIN)
    assert pair.settle() == ([], [FlowRequested(flow_id, 5300, ORIGIN, ProxyVersion.OFF)])


def test_what_was_lost_is_reported_with_the_next_second_and_only_when_it_grew():
    pair = FlowPair()
    pair.target.report_lost(3, 0)
    assert pair.target.bytes_queued == 0
    pair.target.report_lost(3, 1)
    pair.target.tick()
    assert pair.target.bytes_queued == 24
    assert pair.settle() == ([LostReported(3, 1)], [])
    pair.target.tick()
    pair.target.report_lost(3, 1)
    pair.target.tick()
    pair.listener.tick()
    assert pair.target.bytes_queued == pair.listener.bytes_queued == 0
    pair.target.report_lost((1 << 64) - 1, (1 << 64) - 1)
    pair.target.tick()
    assert pair.settle() == ([LostReported((1 << 64) - 1, (1 << 64) - 1)], [])


def test_reports_that_are_not_written_are_one():
    pair = FlowPair()
    for number in range(1, 100):
        pair.target.report_lost(number, 2 * number)
        pair.target.tick()
        assert pair.target.bytes_queued == 24
    assert pair.settle() == ([LostReported(99, 198)], [])


def test_what_was_lost_is_not_reported_before_hello_or_after_the_end():
    target = fresh("target")
    target.report_lost(1, 1)
    target.tick()
    assert take(target) == b""
    pair = FlowPair()
    pair.target.report_lost(1, 1)
    pair.target.tick()
    pair.target.close()
    assert [frame_type for frame_type, _, _ in frames(take(pair.target))] == [FrameType.GOAWAY]
    pair.target.tick()
    assert take(pair.target) == b""


@pytest.mark.parametrize(("to_server", "to_listener"), [(4, 5), (5, 4), (1 << 64, 5), (5, 1 << 64), (-1, 5)])
def test_a_number_of_what_was_lost_that_cannot_be_is_a_bug_of_the_caller(to_server, to_listener):
    target = ready("target")
    target.report_lost(5, 5)
    with pytest.raises(LocalProtocolError, match="after"):
        target.report_lost(to_server, to_listener)
    with pytest.raises(LocalProtocolError, match="only the target side"):
        ready("listener").report_lost(5, 5)


def test_bytes_queued_is_what_there_is_to_send():
    pair = FlowPair()
    for _ in range(3):
        pair.open()
    assert pair.target.bytes_queued == 0
    pair.target.send_datagrams(1, bytes(10_000))
    pair.target.send_datagrams(2, b"")
    pair.target.end_flow(1, FlowCode.DONE)
    pair.target.end_flow(3, FlowCode.DONE)
    pair.target.report_lost(1, 0)
    pair.target.tick()
    assert pair.target.bytes_queued == 10_010 + 10 + 12 + 12 + 24
    assert len(take(pair.target)) == 10_010 + 10 + 12 + 12 + 24
    assert pair.target.bytes_queued == 0


def test_large_datagrams_are_not_copied_on_their_way_out():
    pair = FlowPair()
    pair.open()
    large = bytes(30_000)
    pair.listener.send_datagrams(1, large)
    assert [piece is large for piece in pair.listener.data_to_send()] == [False, True]


def test_a_ping_is_answered_and_only_one_is_outstanding():
    pair = FlowPair()
    pair.listener.ping(b"12345678")
    with pytest.raises(LocalProtocolError, match="one PING"):
        pair.listener.ping(b"12345678")
    assert pair.settle() == ([PongReceived(b"12345678")], [])


def test_ids_are_used_up_once_and_for_all():
    class Short(FlowConnection):
        LAST_ID = 2

    assert FlowConnection.LAST_ID == LAST_STREAM_ID
    listener = Short(hello("listener"), PORTS)
    feed(listener, take(ready("target")) + take(FlowConnection(hello("target"), PORTS)))
    assert listener.open_room == 2
    listener.open_flow(5300, ORIGIN)
    assert not listener.are_ids_used_up
    assert listener.open_flow(5300, ORIGIN) == 2
    assert listener.are_ids_used_up
    assert listener.open_room == 0
    with pytest.raises(LocalProtocolError, match="no room"):
        listener.open_flow(5300, ORIGIN)
