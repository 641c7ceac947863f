# SPDX-License-Identifier: GPL-2.0-or-later
"""The credit that the caller gives, and what it may send for the peer's."""

import pytest

from qubes_fwd_qrexec.common.errors import LocalProtocolError
from qubes_fwd_qrexec.mux import (
    CreditReceived,
    CreditReturned,
    DataReceived,
    EofReceived,
    ResetCode,
    ResetReceived,
    wire,
)
from qubes_fwd_qrexec.mux.limits import FRAME_COST_BYTES, MAX_DATA_BYTES

from .helpers import CREDIT, ORIGIN, WINDOW, Pair, feed, refuses


def test_a_large_credit_allows_one_frame_at_a_time():
    pair = Pair()
    pair.open(credit=WINDOW)
    assert pair.listener.send_limit(1) == MAX_DATA_BYTES
    pair.listener.send_data(1, bytes(MAX_DATA_BYTES))
    assert pair.listener.send_limit(1) == WINDOW - MAX_DATA_BYTES - 2 * FRAME_COST_BYTES
    with pytest.raises(LocalProtocolError, match=r"0 bytes, where"):
        pair.listener.send_data(1, b"")
    with pytest.raises(LocalProtocolError, match=r"32769 bytes, where"):
        pair.listener.send_data(1, bytes(MAX_DATA_BYTES + 1))
    with pytest.raises(LocalProtocolError, match=r"32768 bytes, where 1 to 32640 may"):
        pair.listener.send_data(1, bytes(MAX_DATA_BYTES))


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


def test_a_small_grant_counts_but_is_not_sent_yet():
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
        with pytest.raises(LocalProtocolError, match="stream 2 never existed"):
            connection.grant(2, 2048)
        with pytest.raises(LocalProtocolError, match="stream 0 never existed"):
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


def test_credit_that_is_not_used_is_given_back_when_it_is_asked_for():
    pair = Pair()
    pair.open()
    assert pair.target.recall(1, 2048)
    assert not pair.target.recall(1, 2048), "it was not answered yet"
    assert pair.settle() == ([], [CreditReturned(1, CREDIT - 2048)])
    assert pair.target.granted(1) == pair.target.granted_bytes == 2048
    assert pair.listener.send_limit(1) == 2048 - FRAME_COST_BYTES
    assert not pair.target.recall(1, 2048), "there is nothing more to give"
    pair.target.grant(1, 4096)
    pair.settle()
    assert pair.target.recall(1, 2048)
    assert pair.settle()[1] == [CreditReturned(1, 4096)]


def test_data_on_its_way_is_covered_by_the_credit_of_before():
    pair = Pair()
    pair.open()
    assert pair.target.recall(1, 4096)
    pair.listener.send_data(1, bytes(10_000))
    [data, returned] = pair.settle()[1]
    assert isinstance(data, DataReceived)
    assert returned == CreditReturned(1, CREDIT - data.cost - 4096)
    assert pair.target.granted_bytes == 4096


def test_who_has_no_more_than_it_may_keep_answers_that_and_nobody_is_told():
    pair = Pair()
    pair.open()
    assert pair.target.recall(1, 4096)
    pair.listener.send_data(1, bytes(CREDIT - 3000))
    [data] = pair.settle()[1]
    assert isinstance(data, DataReceived)
    pair.target.grant(1, data.cost)
    pair.settle()
    assert pair.target.recall(1, 4096), "it was answered"


def test_what_was_held_back_is_told_when_the_peer_has_less():
    pair = Pair()
    pair.open()
    pair.target.grant(1, 3000)
    assert pair.settle() == ([], [])
    assert pair.target.recall(1, 2048)
    assert pair.settle() == ([CreditReceived(1)], [CreditReturned(1, CREDIT - 2048)])
    assert pair.target.granted_bytes == 2048 + 3000


def test_credit_may_be_asked_for_after_our_own_eof():
    pair = Pair()
    pair.open()
    pair.target.send_eof(1)
    assert pair.target.recall(1, 2048)
    assert pair.settle() == ([EofReceived(1)], [CreditReturned(1, CREDIT - 2048)])


@pytest.mark.parametrize("is_ended_here", [False, True])
def test_a_recall_that_crosses_an_eof_is_dropped(is_ended_here):
    """With both EOFs the stream is over for the end that is asked."""
    pair = Pair()
    pair.open()
    if is_ended_here:
        pair.target.send_eof(1)
        pair.settle()
    pair.listener.send_eof(1)
    assert pair.target.recall(1, 2048)
    assert pair.settle()[1] == [EofReceived(1)]
    assert not pair.target.recall(1, 2048), "its credit came back with the EOF"
    assert (pair.listener.is_ready, pair.listener.open_streams) == (True, int(not is_ended_here))
    if not is_ended_here:
        pair.target.send_eof(1)
        pair.settle()


def test_a_recall_that_crosses_a_reset_is_dropped():
    pair = Pair()
    pair.open()
    pair.listener.reset_stream(1)
    assert pair.target.recall(1, 2048)
    assert pair.settle()[1] == [ResetReceived(1, ResetCode.ABORTED)]
    assert not pair.target.recall(1, 2048)
    assert pair.target.granted_bytes == 0
    pair.target.reset_stream(1)
    pair.settle()
    assert not pair.target.recall(1, 2048)


def test_an_answer_that_crosses_our_reset_is_checked_and_dropped():
    pair = Pair()
    pair.open()
    assert pair.target.recall(1, 2048)
    pair.target.reset_stream(1)
    assert feed(pair.target, wire.encode_return(1, CREDIT - 2048)) == []
    refuses(pair.target, wire.encode_return(1, 0), "answers no RECALL")


@pytest.mark.parametrize("keep", [0, 2047, WINDOW + 1])
def test_what_may_be_kept_is_within_bounds(keep):
    pair = Pair()
    pair.open()
    with pytest.raises(LocalProtocolError, match="a peer keeps"):
        pair.target.recall(1, keep)
    refuses(pair.listener, wire.encode_recall(1, keep), f"lets us keep {keep} bytes")


def test_asking_before_accept_is_a_bug():
    pair = Pair()
    pair.listener.open_stream(8080, ORIGIN, CREDIT)
    pair.settle()
    for connection in (pair.listener, pair.target):
        with pytest.raises(LocalProtocolError, match="RECALL cannot be sent on a stream that is PENDING"):
            connection.recall(1, 2048)
        with pytest.raises(LocalProtocolError, match="stream 2 never existed"):
            connection.recall(2, 2048)
