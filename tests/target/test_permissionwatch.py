# SPDX-License-Identifier: GPL-2.0-or-later
"""When a call that drains is looked at again, with a loop whose time stands still."""

from collections.abc import Iterator

import pytest
from loop_time import LoopClock

from qubes_fwd_qrexec.relay.loop import Loop
from qubes_fwd_qrexec.target.permissionwatch import PermissionWatch


class Drains:
    """What dom0 allows: ``drain_left_s``."""

    def __init__(self, drain_left_s: float | None) -> None:
        self.drain_left_s = drain_left_s
        self.looks = 0

    def look(self) -> bool:
        self.looks += 1
        return True


@pytest.fixture
def clock() -> Iterator[LoopClock]:
    clock = LoopClock()
    yield clock
    clock.let_go()


@pytest.fixture
def loop(clock: LoopClock) -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def never() -> None:
    raise AssertionError("there was no bug")


def test_however_often_dom0_says_so_one_deadline_is_waited_for(loop: Loop, clock: LoopClock) -> None:
    over: list[str] = []
    permission = Drains(60.0)
    watch = PermissionWatch(loop, permission, lambda: over.append("over"), end=never)
    for _ in range(5):
        watch.look()
    assert loop.timers_left == 1
    permission.drain_left_s = 0.0
    clock.advance(30)
    loop.run_once(0)
    assert (over, loop.timers_left) == (["over"], 0)


def test_a_call_that_may_go_on_after_all_has_no_deadline(loop: Loop) -> None:
    permission = Drains(60.0)
    watch = PermissionWatch(loop, permission, never, end=never)
    watch.look()
    permission.drain_left_s = None
    watch.look()
    assert loop.timers_left == 0


def test_a_call_that_is_over_is_looked_at_no_more(loop: Loop) -> None:
    watch = PermissionWatch(loop, Drains(60.0), never, end=never)
    watch.look()
    watch.stop()
    assert loop.timers_left == 0
