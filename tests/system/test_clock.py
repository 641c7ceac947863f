# SPDX-License-Identifier: GPL-2.0-or-later
"""A clock driven by hand."""

import time

from worlds import Hands

from qubes_fwd_qrexec.system.clock import Clock


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
