# SPDX-License-Identifier: GPL-2.0-or-later
import pytest

from qubes_fwd_qrexec.common.errors import RemoteProtocolError
from qubes_fwd_qrexec.mux.abuse import LateFrames, RapidResets
from qubes_fwd_qrexec.mux.limits import RAPID_RESETS_PER_TICK


def test_an_ended_stream_leaves_one_reset():
    late = LateFrames()
    with pytest.raises(RemoteProtocolError, match="RESET on stream 1"):
        late.take_reset(1)
    late.expect(0)
    late.take_reset(1)
    with pytest.raises(RemoteProtocolError, match="which is over"):
        late.take_reset(1)


def test_an_ended_stream_leaves_credit_up_to_the_room_of_its_window():
    late = LateFrames()
    late.expect(3000)
    late.take_credit(1, 1024)
    with pytest.raises(RemoteProtocolError, match="CREDIT on stream 1"):
        late.take_credit(1, 1977)
    late.take_credit(1, 1976)
    late.expect(3000)
    with pytest.raises(RemoteProtocolError, match="which is over"):
        late.take_credit(1, 1023)


def test_an_ended_stream_leaves_one_recall():
    late = LateFrames()
    late.expect(0)
    late.take_recall(1)
    with pytest.raises(RemoteProtocolError, match="RECALL on stream 1, which is over"):
        late.take_recall(1)


def test_resets_are_answered_at_once_up_to_the_rate():
    rapid = RapidResets()
    assert all(rapid.may_answer(i, 0) for i in range(1, RAPID_RESETS_PER_TICK + 1))
    assert not rapid.may_answer(RAPID_RESETS_PER_TICK + 1, 0)
    assert rapid.next_tick() == [RAPID_RESETS_PER_TICK + 1]
    assert rapid.may_answer(RAPID_RESETS_PER_TICK + 2, 1)


def test_a_stream_that_is_older_than_the_tick_is_always_answered():
    rapid = RapidResets()
    rapid.next_tick()
    assert all(rapid.may_answer(i, 0) for i in range(1, 5 * RAPID_RESETS_PER_TICK))


def test_answers_that_were_held_back_come_in_order_at_the_rate_and_use_it_up():
    rapid = RapidResets()
    total = 2 * RAPID_RESETS_PER_TICK + 5
    given = [i for i in range(total) if rapid.may_answer(i, 0)]
    # Asking again gives none of them twice, in this tick or a later one.
    assert not rapid.may_answer(total - 1, 0)
    given += rapid.next_tick()
    assert not rapid.may_answer(total, 1)
    assert not rapid.may_answer(total - 1, 0)
    given += rapid.next_tick()
    assert given == list(range(total + 1))
    assert rapid.next_tick() == []


def test_nothing_is_answered_once_the_mux_is_over():
    rapid = RapidResets()
    for stream_id in range(RAPID_RESETS_PER_TICK + 1):
        rapid.may_answer(stream_id, 0)
    rapid.forget()
    assert rapid.next_tick() == []
