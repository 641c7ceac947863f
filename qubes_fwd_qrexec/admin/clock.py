# SPDX-License-Identifier: GPL-2.0-or-later
"""The time by which rules end, for a program that runs on: a clock that never goes back.

A rule's end is a time of day, and the time of day can be set: back, by hand or by the qube that dom0
takes its time from, and a rule would live longer than its user was told. So the clock here is the later
of the wall clock and what it was before plus the time that has passed since, suspend included
(CLOCK_BOOTTIME). Whoever sets the clock forward by mistake closes rules early, and they stay closed until
this program starts again: the safe side.
"""

import time
from collections.abc import Callable


def _elapsed() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Clock:
    """UNIX seconds that never go back."""

    def __init__(
        self, wall: Callable[[], float] = time.time, elapsed: Callable[[], float] = _elapsed
    ) -> None:
        self._wall = wall
        self._elapsed = elapsed
        self._now = wall()
        self._elapsed_then = elapsed()

    def now(self) -> float:
        elapsed = self._elapsed()
        self._now = max(self._wall(), self._now + elapsed - self._elapsed_then)
        self._elapsed_then = elapsed
        return self._now

    def ahead_s(self) -> float:
        """How far this clock is ahead of the wall clock, because that was set back."""
        return max(0.0, self.now() - self._wall())
