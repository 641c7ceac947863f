# SPDX-License-Identifier: GPL-2.0-or-later
"""The time by which `watch` ends rules: a clock that never goes back.

Rules end at a time of day, and that can be set: back, and a rule would live longer than its user was told. So
this is the later of the wall clock and the time that it was before plus what has passed since, suspend
included. Whoever sets the clock forward by mistake closes rules early, until this program starts again.
"""

import time
from collections.abc import Callable


class Clock:
    """UNIX seconds that never go back."""

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        elapsed: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
    ) -> None:
        self._wall, self._elapsed = wall, elapsed
        self._now, self._elapsed_then = wall(), elapsed()

    def now(self) -> float:
        elapsed = self._elapsed()
        self._now = max(self._wall(), self._now + elapsed - self._elapsed_then)
        self._elapsed_then = elapsed
        return self._now

    def ahead_s(self) -> float:
        """How far it is ahead of the wall clock, because that was set back."""
        return max(0.0, self.now() - self._wall())
