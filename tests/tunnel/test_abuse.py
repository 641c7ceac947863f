# SPDX-License-Identifier: GPL-2.0-or-later
import pytest

from qubes_fwd_qrexec.errors import RemoteProtocolError
from qubes_fwd_qrexec.tunnel.abuse import LateFrames, RapidResets
from qubes_fwd_qrexec.tunnel.limits import RAPID_RESET_SLACK, RAPID_RESETS_PER_TICK


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


def test_only_streams_of_this_tick_count():
    rapid = RapidResets()
    rapid.next_tick()
    rapid.add(0)
    assert rapid._count == 0
    rapid.add(1)
    assert rapid._count == 1
    rapid.next_tick()
    assert rapid._count == 0


def test_the_allowance_of_the_listener_side_ends_and_comes_back():
    rapid = RapidResets()
    for _ in range(RAPID_RESETS_PER_TICK):
        assert rapid.may_open
        rapid.add(0)
    assert not rapid.may_open
    rapid.next_tick()
    assert rapid.may_open


def test_the_target_side_bears_what_a_listener_side_can_cause_and_no_more():
    rapid = RapidResets()
    for _ in range(RAPID_RESET_SLACK * (RAPID_RESETS_PER_TICK + 10)):
        rapid.add(0)
    rapid.check(10)
    rapid.add(0)
    with pytest.raises(RemoteProtocolError, match="opened and reset within one tick"):
        rapid.check(10)
