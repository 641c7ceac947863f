# SPDX-License-Identifier: GPL-2.0-or-later
"""The first bytes of a stream, which OPEN may carry since version 2."""

import pytest

from qubes_fwd_qrexec.common.errors import LocalProtocolError
from qubes_fwd_qrexec.mux import (
    AcceptReceived,
    DataReceived,
    OpenReceived,
    PongReceived,
    ProxyVersion,
    ResetReceived,
    wire,
)
from qubes_fwd_qrexec.mux.limits import FRAME_COST_BYTES, MAX_FIRST_BYTES, MIN_WINDOW_BYTES
from qubes_fwd_qrexec.mux.messages import GoawayCode, ResetCode

from .helpers import CREDIT, ORIGIN, Pair, feed, ready, refuses, take


def open_with(first: bytes) -> bytes:
    return wire.encode_open(1, wire.OpenRequest(CREDIT, 8080, ORIGIN, ProxyVersion.OFF, first))


def test_they_arrive_with_the_request_and_come_before_data():
    pair = Pair()
    pair.listener.open_stream(8080, ORIGIN, CREDIT, first=b"GET")
    assert pair.settle()[1] == [OpenReceived(1, 8080, ORIGIN, ProxyVersion.OFF, b"GET")]
    pair.target.accept_stream(1, CREDIT)
    assert pair.settle()[0] == [AcceptReceived(1)]
    pair.listener.send_data(1, b" /")
    assert pair.settle()[1] == [DataReceived(1, b" /")]


@pytest.mark.parametrize("length", [0, 1, MAX_FIRST_BYTES])
def test_they_use_credit_as_one_frame_of_data_does(length):
    pair = Pair()
    pair.listener.open_stream(8080, ORIGIN, CREDIT, first=bytes(length))
    pair.settle()
    pair.target.accept_stream(1, CREDIT)
    pair.settle()
    used = length + FRAME_COST_BYTES if length else 0
    assert pair.listener.send_limit(1) == CREDIT - used - FRAME_COST_BYTES
    assert pair.target.granted(1) == pair.target.granted_bytes == CREDIT - used
    if used:
        pair.target.grant(1, used)
        assert pair.target.granted(1) == CREDIT


def test_the_least_credit_covers_the_most_of_them():
    pair = Pair()
    pair.listener.open_stream(8080, ORIGIN, CREDIT, first=bytes(MAX_FIRST_BYTES))
    pair.settle()
    pair.target.accept_stream(1, MIN_WINDOW_BYTES)
    assert pair.settle()[0] == [AcceptReceived(1)]
    assert pair.listener.send_limit(1) == 0


def test_no_credit_does_not_cover_them():
    pair = Pair()
    pair.listener.open_stream(8080, ORIGIN, CREDIT, first=b"x")
    pair.settle()
    with pytest.raises(LocalProtocolError, match="0 bytes do not cover the first bytes of stream 1"):
        pair.target.accept_stream(1, 0)
    refuses(pair.listener, wire.encode_accept(1, 0), "do not cover the first bytes")


def test_there_are_no_more_of_them_than_fit():
    with pytest.raises(LocalProtocolError, match="1985 first bytes, where 1984 may be sent"):
        Pair().listener.open_stream(8080, ORIGIN, CREDIT, first=bytes(MAX_FIRST_BYTES + 1))


def test_version_1_has_none():
    pair = Pair(max_version=1)
    assert pair.listener.first_max == pair.target.first_max == 0
    with pytest.raises(LocalProtocolError, match="1 first bytes, where 0 may be sent"):
        pair.listener.open_stream(8080, ORIGIN, CREDIT, first=b"x")
    refuses(ready("target", max_version=1), open_with(b"x"), "OPEN with first bytes in version 1")
    assert len(feed(ready("target", max_version=1), open_with(b""))) == 1


def test_a_stream_that_is_refused_leaves_no_credit_behind():
    pair = Pair()
    pair.listener.open_stream(8080, ORIGIN, CREDIT, first=b"x")
    pair.settle()
    pair.target.reset_stream(1, ResetCode.REFUSED)
    assert pair.settle()[0] == [ResetReceived(1, ResetCode.REFUSED)]
    pair.listener.reset_stream(1)
    pair.settle()
    assert pair.listener.granted_bytes == pair.target.granted_bytes == 0
    assert pair.listener.open_streams == pair.target.open_streams == 0


def test_a_request_that_crosses_the_end_of_the_lease_leaves_no_credit_behind():
    target = ready("target")
    target.drain(GoawayCode.LEASE_OVER)
    assert feed(target, open_with(b"x")) == []
    assert target.granted_bytes == 0


def test_they_are_no_answers_that_a_peer_could_make_us_queue_without_bound():
    pair = Pair(max_streams=100)
    for _ in range(100):
        pair.listener.open_stream(8080, ORIGIN, CREDIT, first=bytes(MAX_FIRST_BYTES))
    assert pair.listener.bytes_queued > pair.listener.control_bound_bytes
    pair.target.ping(b"8 bytes.")
    assert feed(pair.listener, take(pair.target)) == []
    assert [type(event) for event in feed(pair.target, take(pair.listener))][-1] is PongReceived
