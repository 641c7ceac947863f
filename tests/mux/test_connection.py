# SPDX-License-Identifier: GPL-2.0-or-later
"""What the caller may do, and that it reaches the other end."""

import pytest

from qubes_fwd_qrexec.common.errors import LocalProtocolError
from qubes_fwd_qrexec.mux import (
    AcceptReceived,
    Connection,
    DataReceived,
    EofReceived,
    HelloReceived,
    OpenReceived,
    PongReceived,
    wire,
)
from qubes_fwd_qrexec.mux.limits import FRAME_COST_BYTES
from qubes_fwd_qrexec.mux.messages import ProxyVersion, Role

from .helpers import CREDIT, ORIGIN, PORTS, Pair, feed, fresh, hello, ready, take


def test_hello_is_queued_at_once_and_makes_both_ready():
    listener, target = Connection(hello("listener"), PORTS), Connection(hello("target"), PORTS)
    assert not listener.is_ready
    assert listener.open_room == 0
    assert feed(target, take(listener)) == [HelloReceived(hello("listener"))]
    assert feed(listener, take(target)) == [HelloReceived(hello("target"))]
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
    with pytest.raises(LocalProtocolError, match="port 22 is none of"):
        Pair().listener.open_stream(22, ORIGIN, CREDIT)


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


def test_a_frame_that_has_begun_is_seen():
    target = ready("target")
    assert not target.has_partial_frame
    feed(target, wire.encode_ping(b"12345678")[:9])
    assert target.has_partial_frame
    feed(target, wire.encode_ping(b"12345678")[9:])
    assert not target.has_partial_frame
