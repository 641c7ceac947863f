# SPDX-License-Identifier: GPL-2.0-or-later
"""Streams that are refused or reset, and how many may be at once."""

import pytest

from qubes_fwd_qrexec.common.errors import LocalProtocolError
from qubes_fwd_qrexec.mux import ResetReceived
from qubes_fwd_qrexec.mux.messages import ResetCode

from .helpers import CREDIT, ORIGIN, Pair, take


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


def test_a_refused_stream_says_why():
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
    with pytest.raises(LocalProtocolError, match="never existed"):
        pair.target.reset_stream(2)


def test_resets_that_cross_are_not_events():
    pair = Pair()
    pair.open()
    pair.listener.reset_stream(1)
    pair.target.reset_stream(1)
    assert pair.settle() == ([], [])
    assert pair.target.open_streams == pair.listener.open_streams == 0


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


def test_a_mux_that_is_over_answers_nothing_at_a_tick():
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
