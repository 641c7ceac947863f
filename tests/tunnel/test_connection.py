# SPDX-License-Identifier: GPL-2.0-or-later
"""What the caller may do, and that it reaches the other end."""

import pytest

from qubes_fwd_qrexec.errors import LocalProtocolError
from qubes_fwd_qrexec.tunnel import (
    AcceptReceived,
    Connection,
    CreditReceived,
    DataReceived,
    EofReceived,
    GoawayReceived,
    HelloReceived,
    OpenReceived,
    PongReceived,
    ResetReceived,
    wire,
)
from qubes_fwd_qrexec.tunnel.limits import FRAME_COST_BYTES, LAST_STREAM_ID, MAX_DATA_BYTES
from qubes_fwd_qrexec.tunnel.messages import Goaway, GoawayCode, ProxyVersion, ResetCode, Role

from .helpers import CREDIT, ORIGIN, PORTS, WINDOW, Pair, feed, fresh, hello, ready, take


def test_hello_is_queued_at_once_and_makes_both_ready():
    listener, target = Connection(hello("listener"), PORTS), Connection(hello("target"), PORTS)
    assert not listener.is_ready
    assert listener.open_room == 0
    assert feed(target, take(listener)) == [HelloReceived(hello("listener"), 1)]
    assert feed(listener, take(target)) == [HelloReceived(hello("target"), 1)]
    assert listener.is_ready
    assert target.is_ready
    assert (listener.role, target.role) == (Role.LISTENER, Role.TARGET)
    assert listener.open_room == 8


def test_a_stream_is_opened_accepted_used_and_ended():
    pair = Pair()
    stream_id = pair.listener.open_stream(8081, ORIGIN, CREDIT)
    assert stream_id == 1
    assert pair.settle()[1] == [OpenReceived(1, 8081, ORIGIN, ProxyVersion.OFF)]
    assert pair.listener.send_limit(1) == 0
    pair.target.accept_stream(1, 4096)
    assert pair.settle()[0] == [AcceptReceived(1)]
    assert pair.listener.send_limit(1) == 4096 - FRAME_COST_BYTES
    assert pair.target.send_limit(1) == CREDIT - FRAME_COST_BYTES
    pair.listener.send_data(1, b"question")
    pair.listener.send_eof(1)
    assert pair.settle()[1] == [DataReceived(1, b"question"), EofReceived(1)]
    pair.target.send_data(1, b"answer")
    pair.target.send_eof(1)
    assert pair.target.open_streams == 0
    assert pair.settle()[0] == [DataReceived(1, b"answer"), EofReceived(1)]
    assert pair.listener.open_streams == 0
    assert pair.listener.granted_bytes == pair.target.granted_bytes == 0


@pytest.mark.parametrize("proxy", ProxyVersion)
def test_the_listener_side_says_which_proxy_header_the_server_gets(proxy):
    pair = Pair()
    pair.listener.open_stream(8080, ORIGIN, CREDIT, proxy)
    [event] = pair.settle()[1]
    assert event == OpenReceived(1, 8080, ORIGIN, proxy)
    assert event.proxy is proxy


def test_bytes_queued_is_what_there_is_to_send():
    pair = Pair()
    pair.open()
    assert pair.listener.bytes_queued == 0
    pair.listener.send_data(1, bytes(10_000))
    assert pair.listener.bytes_queued == 10_008
    assert len(take(pair.listener)) == 10_008
    assert pair.listener.bytes_queued == 0


@pytest.mark.parametrize("data", [b"bytes", bytearray(b"bytes"), memoryview(b"bytes")])
def test_any_buffer_can_be_sent(data):
    pair = Pair()
    pair.open()
    pair.listener.send_data(1, data)
    assert pair.settle()[1] == [DataReceived(1, b"bytes")]


def test_a_large_credit_allows_one_frame_at_a_time():
    pair = Pair()
    pair.open(credit=WINDOW)
    assert pair.listener.send_limit(1) == MAX_DATA_BYTES
    pair.listener.send_data(1, bytes(MAX_DATA_BYTES))
    assert pair.listener.send_limit(1) == WINDOW - MAX_DATA_BYTES - 2 * FRAME_COST_BYTES
    with pytest.raises(LocalProtocolError, match=r"0 bytes, and"):
        pair.listener.send_data(1, b"")
    with pytest.raises(LocalProtocolError, match=r"32769 bytes, and"):
        pair.listener.send_data(1, bytes(MAX_DATA_BYTES + 1))
    with pytest.raises(LocalProtocolError, match=r"32768 bytes, and 32640 may"):
        pair.listener.send_data(1, bytes(MAX_DATA_BYTES))


def test_data_needs_a_stream_that_flows():
    pair = Pair()
    with pytest.raises(LocalProtocolError, match="is over"):
        pair.listener.send_data(1, b"x")
    pair.listener.open_stream(8080, ORIGIN, CREDIT)
    with pytest.raises(LocalProtocolError, match="PENDING"):
        pair.listener.send_data(1, b"x")
    pair.settle()
    pair.target.accept_stream(1, CREDIT)
    pair.settle()
    pair.listener.send_eof(1)
    with pytest.raises(LocalProtocolError, match="ENDED"):
        pair.listener.send_data(1, b"x")
    assert pair.listener.send_limit(1) == 0
    with pytest.raises(LocalProtocolError, match="EOF cannot be sent"):
        pair.listener.send_eof(1)
    pair.settle()
    pair.target.send_eof(1)
    with pytest.raises(LocalProtocolError, match="EOF cannot be sent on stream 1, which is over"):
        pair.target.send_eof(1)


def test_consumed_credit_comes_back_and_granted_bytes_counts_it():
    pair = Pair()
    pair.open(credit=4096)
    assert pair.target.granted_bytes == 4096
    pair.listener.send_data(1, bytes(2500))
    [data] = pair.settle()[1]
    assert pair.target.granted_bytes == 4096 - data.cost
    pair.target.grant(1, data.cost)
    assert pair.target.granted_bytes == 4096
    assert pair.settle()[0] == [CreditReceived(1)]
    assert pair.listener.send_limit(1) == 4096 - FRAME_COST_BYTES


def test_credit_comes_back_also_after_our_own_eof():
    pair = Pair()
    pair.open(credit=4096)
    pair.target.send_eof(1)
    pair.listener.send_data(1, bytes(4000))
    data = pair.settle()[1][0]
    pair.target.grant(1, data.cost)
    assert pair.settle()[0] == [CreditReceived(1)]
    assert pair.listener.send_limit(1) == 4096 - FRAME_COST_BYTES


def test_a_small_grant_counts_but_is_not_told_yet():
    pair = Pair()
    pair.open(credit=4096)
    pair.target.grant(1, 500)
    assert pair.target.granted_bytes == 4596
    assert pair.settle() == ([], [])


def test_a_stream_may_begin_without_credit():
    pair = Pair()
    pair.open(credit=0)
    assert pair.listener.send_limit(1) == 0
    pair.target.grant(1, 2048)
    assert pair.settle()[0] == [CreditReceived(1)]
    assert pair.listener.send_limit(1) == 2048 - FRAME_COST_BYTES


@pytest.mark.parametrize("credit", [0, -1, WINDOW - CREDIT + 1])
def test_a_grant_stays_inside_our_own_window(credit):
    pair = Pair()
    pair.open()
    with pytest.raises(LocalProtocolError, match="do not fit the window"):
        pair.target.grant(1, credit)


def test_a_grant_before_accept_is_a_bug_and_after_the_end_is_nothing():
    pair = Pair()
    pair.listener.open_stream(8080, ORIGIN, CREDIT)
    pair.settle()
    for connection in (pair.listener, pair.target):
        with pytest.raises(LocalProtocolError, match="CREDIT cannot be sent on a stream that is PENDING"):
            connection.grant(1, 2048)
        with pytest.raises(LocalProtocolError, match="never was a stream 2"):
            connection.grant(2, 2048)
        with pytest.raises(LocalProtocolError, match="never was a stream 0"):
            connection.grant(0, 2048)
    pair.target.accept_stream(1, CREDIT)
    pair.settle()
    pair.listener.send_eof(1)
    pair.settle()
    pair.target.grant(1, 2048)
    assert pair.target.granted_bytes == 0
    pair.target.send_eof(1)
    pair.target.grant(1, 2048)
    assert pair.settle()[0] == [EofReceived(1)]


@pytest.mark.parametrize("credit", [-1, 1, 2047, WINDOW + 1])
def test_an_initial_credit_is_nothing_or_within_bounds(credit):
    pair = Pair()
    with pytest.raises(LocalProtocolError, match="an initial credit is 0, or 2048"):
        pair.listener.open_stream(8080, ORIGIN, credit)
    pair.listener.open_stream(8080, ORIGIN, 0)
    pair.settle()
    with pytest.raises(LocalProtocolError, match="an initial credit is 0, or 2048"):
        pair.target.accept_stream(1, credit)


def test_only_the_listener_side_opens_and_only_the_target_side_accepts():
    pair = Pair()
    assert pair.target.open_room == 0
    with pytest.raises(LocalProtocolError, match="this is the target side"):
        pair.target.open_stream(8080, ORIGIN, CREDIT)
    pair.listener.open_stream(8080, ORIGIN, CREDIT)
    for connection in (pair.listener, pair.target):
        with pytest.raises(LocalProtocolError, match="no stream 1 to accept"):
            connection.accept_stream(1, CREDIT)
    pair.settle()
    pair.target.accept_stream(1, CREDIT)
    with pytest.raises(LocalProtocolError, match="ACCEPT cannot be sent"):
        pair.target.accept_stream(1, CREDIT)


def test_a_stream_names_a_port_of_the_call():
    with pytest.raises(LocalProtocolError, match="port 22 is not of this call"):
        Pair().listener.open_stream(22, ORIGIN, CREDIT)


def test_the_limit_on_streams_counts_those_whose_reset_is_not_answered():
    pair = Pair(max_streams=2)
    pair.open()
    pair.open()
    assert pair.listener.open_room == 0
    with pytest.raises(LocalProtocolError, match="no room"):
        pair.listener.open_stream(8080, ORIGIN, CREDIT)
    pair.listener.reset_stream(1)
    assert pair.settle()[1] == [ResetReceived(1, ResetCode.ABORTED)]
    assert pair.listener.open_room == 0
    pair.target.reset_stream(1)
    pair.settle()
    assert pair.listener.open_room == 1
    assert pair.open() == 3


def test_a_refused_stream_tells_why():
    pair = Pair()
    pair.listener.open_stream(8080, ORIGIN, CREDIT)
    pair.settle()
    pair.target.reset_stream(1, ResetCode.REFUSED)
    assert pair.settle()[0] == [ResetReceived(1, ResetCode.REFUSED)]
    assert pair.target.open_streams == 1
    pair.listener.reset_stream(1)
    assert pair.settle() == ([], [])
    assert pair.target.open_streams == pair.listener.open_streams == 0


def test_after_a_reset_nothing_more_is_heard_or_said_of_the_stream():
    pair = Pair()
    pair.open()
    pair.target.send_data(1, b"on its way")
    pair.listener.reset_stream(1)
    assert pair.listener.granted_bytes == 0
    pair.listener.reset_stream(1)
    pair.listener.grant(1, 2048)
    assert pair.settle() == ([], [ResetReceived(1, ResetCode.ABORTED)])
    for call in (pair.target.send_eof, lambda i: pair.target.send_data(i, b"x")):
        with pytest.raises(LocalProtocolError, match="MUST_RESET"):
            call(1)
    pair.target.reset_stream(1)
    pair.target.reset_stream(1)
    assert pair.settle() == ([], [])
    with pytest.raises(LocalProtocolError, match="never was"):
        pair.target.reset_stream(2)


def test_resets_that_cross_are_not_events():
    pair = Pair()
    pair.open()
    pair.listener.reset_stream(1)
    pair.target.reset_stream(1)
    assert pair.settle() == ([], [])
    assert pair.target.open_streams == pair.listener.open_streams == 0


def test_a_ping_is_answered_and_only_one_is_outstanding():
    pair = Pair()
    pair.listener.ping(b"12345678")
    with pytest.raises(LocalProtocolError, match="one PING"):
        pair.listener.ping(b"12345678")
    assert pair.settle() == ([PongReceived(b"12345678")], [])
    with pytest.raises(LocalProtocolError, match="8 bytes"):
        pair.listener.ping(b"1234567")
    pair.listener.ping(b"87654321")
    with pytest.raises(LocalProtocolError, match="ready"):
        fresh("listener").ping(b"12345678")


def test_the_lease_ends_new_streams_and_lets_live_ones_go_on():
    pair = Pair()
    pair.open()
    pair.target.drain(GoawayCode.LEASE_OVER)
    pair.target.drain(GoawayCode.SHUTDOWN)
    assert pair.settle()[0] == [GoawayReceived(Goaway(1, GoawayCode.LEASE_OVER, is_final=False))]
    assert pair.listener.open_room == 0
    assert pair.listener.is_draining
    pair.listener.send_data(1, b"still here")
    pair.listener.send_eof(1)
    assert pair.settle()[1] == [DataReceived(1, b"still here"), EofReceived(1)]
    assert not pair.target.is_drained
    pair.target.send_eof(1)
    pair.settle()
    assert pair.target.is_drained
    assert pair.listener.is_drained
    pair.target.close()
    assert pair.settle()[0] == [GoawayReceived(Goaway(1, GoawayCode.DONE, is_final=True))]
    pair.listener.receive_eof()


def test_an_open_that_crossed_the_lease_is_refused_without_a_word_to_the_caller():
    pair = Pair()
    pair.open()
    pair.target.drain(GoawayCode.LEASE_OVER)
    pair.listener.open_stream(8080, ORIGIN, CREDIT)
    at_listener, at_target = pair.settle()
    assert at_target == []
    assert at_listener == [
        GoawayReceived(Goaway(1, GoawayCode.LEASE_OVER, is_final=False)),
        ResetReceived(2, ResetCode.LEASE_OVER),
    ]
    pair.listener.reset_stream(2)
    pair.settle()
    assert pair.target.open_streams == 1


def test_a_stream_that_was_asked_for_before_the_lease_ended_may_still_be_accepted():
    pair = Pair()
    pair.listener.open_stream(8080, ORIGIN, CREDIT)
    pair.settle()
    pair.target.drain(GoawayCode.LEASE_OVER)
    pair.target.accept_stream(1, CREDIT)
    assert pair.settle()[0][1] == AcceptReceived(1)


def test_a_drain_needs_a_code_that_lets_streams_go_on():
    with pytest.raises(LocalProtocolError, match="DONE cannot begin a drain"):
        Pair().target.drain(GoawayCode.DONE)


def test_the_last_word_drops_all_streams_at_both_ends():
    pair = Pair()
    pair.open()
    pair.target.close(GoawayCode.REVOKED)
    pair.target.close()
    pair.target.drain(GoawayCode.LEASE_OVER)
    assert pair.target.open_streams == pair.target.granted_bytes == 0
    assert pair.target.is_over
    pair.listener.send_data(1, b"crossed")
    assert pair.settle() == ([GoawayReceived(Goaway(1, GoawayCode.REVOKED, is_final=True))], [])
    assert pair.listener.open_streams == pair.listener.granted_bytes == 0
    assert pair.listener.is_over
    assert not pair.listener.is_ready
    assert pair.listener.open_room == 0


def test_ids_are_used_up_once_and_for_all():
    pair = Pair()
    pair.listener._last_id = pair.target._last_id = LAST_STREAM_ID - 1
    assert pair.listener.open_room == 1
    assert not pair.listener.are_ids_used_up
    assert pair.open() == LAST_STREAM_ID
    assert pair.listener.are_ids_used_up
    assert pair.listener.open_room == 0
    pair.listener.drain(GoawayCode.IDS_USED_UP)
    goaway = Goaway(LAST_STREAM_ID, GoawayCode.IDS_USED_UP, is_final=False)
    assert pair.settle()[1] == [GoawayReceived(goaway)]


def test_rapid_resets_past_the_rate_hold_their_slots_until_a_later_tick():
    pair = Pair(max_streams=1500)
    for _ in range(1500):
        pair.listener.reset_stream(pair.listener.open_stream(8080, ORIGIN, CREDIT))
    for _ in range(2):
        for event in pair.settle()[1]:
            if isinstance(event, ResetReceived):
                pair.target.reset_stream(event.stream_id)
                pair.target.reset_stream(event.stream_id)
    assert pair.listener.open_streams == pair.target.open_streams == 500
    assert pair.listener.open_room == 1000
    pair.target.tick()
    pair.settle()
    assert pair.listener.open_streams == pair.target.open_streams == 0


def test_streams_that_last_and_refusals_are_not_rapid_resets():
    pair = Pair(max_streams=1500)
    for _ in range(1500):
        pair.listener.open_stream(8080, ORIGIN, CREDIT)
    for event in pair.settle()[1]:
        if event.stream_id % 2:
            pair.target.reset_stream(event.stream_id, ResetCode.REFUSED)
    for event in pair.settle()[0]:
        pair.listener.reset_stream(event.stream_id)
    assert pair.listener.open_room == 750
    pair.target.tick()
    for stream_id in range(2, 1501, 2):
        pair.listener.reset_stream(stream_id)
    for event in pair.settle()[1]:
        pair.target.reset_stream(event.stream_id)
    pair.settle()
    assert pair.listener.open_room == 1500


def test_the_listener_side_answers_any_number_of_refusals_at_once():
    pair = Pair(max_streams=1500)
    for _ in range(1500):
        pair.listener.open_stream(8080, ORIGIN, CREDIT)
    for event in pair.settle()[1]:
        pair.target.reset_stream(event.stream_id, ResetCode.REFUSED)
    for event in pair.settle()[0]:
        pair.listener.reset_stream(event.stream_id)
    pair.settle()
    assert pair.listener.open_streams == pair.target.open_streams == 0


def test_a_tunnel_that_is_over_answers_nothing_at_a_tick():
    pair = Pair(max_streams=1500)
    for _ in range(1500):
        pair.listener.reset_stream(pair.listener.open_stream(8080, ORIGIN, CREDIT))
    for event in pair.settle()[1]:
        if isinstance(event, ResetReceived):
            pair.target.reset_stream(event.stream_id)
    pair.target.close()
    take(pair.target)
    pair.target.tick()
    assert take(pair.target) == b""


def test_a_frame_that_has_begun_is_seen():
    target = ready("target")
    assert not target.has_partial_frame
    feed(target, wire.encode_ping(b"12345678")[:9])
    assert target.has_partial_frame
    feed(target, wire.encode_ping(b"12345678")[9:])
    assert not target.has_partial_frame
