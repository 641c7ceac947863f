# SPDX-License-Identifier: GPL-2.0-or-later
"""A clock driven by hand, and an alarm whose descriptor is looked at and never waited for but once."""

import select
import time
from collections.abc import Iterator
from typing import Any

import pytest
from worlds import Hands

from qubes_fwd_qrexec.admin.clock import Alarm, Clock

BOUND_S = 15.0


def test_it_goes_with_the_wall_clock() -> None:
    hands = Hands(wall=1000.0, elapsed=50.0)
    clock = hands.clock()
    assert clock.now() == 1000.0
    hands.pass_by(5.0)
    assert clock.now() == 1005.0
    assert clock.ahead_s() == 0.0


def test_a_clock_that_is_set_forward_is_believed() -> None:
    hands = Hands()
    clock = hands.clock()
    hands.wall += 3600.0
    assert clock.now() == hands.wall
    assert clock.ahead_s() == 0.0


def test_a_clock_that_is_set_back_is_not() -> None:
    hands = Hands(wall=10_000.0)
    clock = hands.clock()
    hands.pass_by(100.0)
    hands.wall -= 3600.0
    assert clock.now() == 10_100.0
    assert clock.ahead_s() == 3600.0
    hands.pass_by(10.0)
    assert clock.now() == 10_110.0
    hands.wall += 7200.0
    assert clock.now() == hands.wall


def test_it_never_goes_back_whatever_the_wall_clock_does() -> None:
    hands = Hands(wall=10_000.0)
    clock = hands.clock()
    seen = [clock.now()]
    for step in (50.0, -4000.0, 9000.0, -9000.0, -1.0, 0.0, 100.0):
        hands.wall += step
        hands.pass_by(1.0)
        seen.append(clock.now())
    assert seen == sorted(seen)
    assert seen[-1] >= 10_000.0 + 9000.0 - 4000.0 + 50.0


def test_time_in_suspend_counts_even_where_the_wall_clock_stood_still() -> None:
    hands = Hands(wall=10_000.0)
    clock = hands.clock()
    hands.elapsed += 28_800.0
    assert clock.now() == 38_800.0


def test_the_real_one_agrees_with_the_wall_clock() -> None:
    before = time.time()
    clock = Clock()
    # Between two looks at clocks as much time may pass as this takes altogether, and that is added once each.
    now, ahead_s = clock.now(), clock.ahead_s()
    took_s = time.time() - before
    assert before <= now <= before + 2 * took_s + 0.1
    assert 0.0 <= ahead_s <= took_s + 0.1


@pytest.fixture
def alarm() -> Iterator[Alarm]:
    with Alarm() as made:
        yield made


def rings(alarm: Alarm, timeout_s: float = 0.0) -> bool:
    return bool(select.select([alarm], [], [], timeout_s)[0])


def test_it_rings_when_it_is_time_and_until_it_is_set_anew(alarm: Alarm) -> None:
    assert not rings(alarm)
    alarm.set(time.time() + 0.01)
    assert rings(alarm, BOUND_S)
    assert rings(alarm)
    alarm.set(time.time() + 3600)
    assert not rings(alarm)


@pytest.mark.parametrize("past", [-5.0, 0.0, 1.5])
def test_it_rings_at_once_for_what_is_past(alarm: Alarm, past: float) -> None:
    alarm.set(past)
    assert rings(alarm, BOUND_S)


def test_it_can_be_stopped(alarm: Alarm) -> None:
    alarm.set(0.0)
    assert rings(alarm, BOUND_S)
    alarm.set(None)
    assert not rings(alarm)


def test_the_last_second_of_the_year_9999_can_be_set(alarm: Alarm) -> None:
    alarm.set(253402300799.0)
    assert not rings(alarm)


class _Libc:
    """The C library, whose calls are noted before they are made."""

    def __init__(self, libc: Any) -> None:
        self._libc = libc
        self.flags: list[int] = []

    def timerfd_settime(self, fd: int, flags: int, *more: object) -> int:
        self.flags.append(flags)
        return int(self._libc.timerfd_settime(fd, flags, *more))


def test_it_is_to_ring_also_when_the_clock_is_set(alarm: Alarm) -> None:
    """Which no test may do: TFD_TIMER_ABSTIME and TFD_TIMER_CANCEL_ON_SET, of linux/timerfd.h."""
    noted = _Libc(alarm._libc)
    alarm._libc = noted  # type: ignore[assignment]
    alarm.set(time.time() + 3600)
    alarm.set(None)
    assert noted.flags == [1 | 2, 1 | 2]
    assert not rings(alarm)


def test_it_is_closed_when_it_is_left() -> None:
    with Alarm() as alarm:
        pass
    with pytest.raises(OSError, match="Bad file descriptor"):
        alarm.set(None)
