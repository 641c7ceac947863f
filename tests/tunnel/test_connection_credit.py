# SPDX-License-Identifier: GPL-2.0-or-later
"""The credit that the caller gives, and what it may send for the peer's."""

import pytest

from qubes_fwd_qrexec.errors import LocalProtocolError
from qubes_fwd_qrexec.tunnel import CreditReceived, EofReceived
from qubes_fwd_qrexec.tunnel.limits import FRAME_COST_BYTES, MAX_DATA_BYTES

from .helpers import CREDIT, ORIGIN, WINDOW, Pair


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
