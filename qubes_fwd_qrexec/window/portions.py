# SPDX-License-Identifier: GPL-2.0-or-later
"""Work on widgets in portions, so that the main loop never waits long for it.

While a worker computes, each call of GTK may wait for Python's lock; so a portion is bounded by time.
"""

import time
from collections.abc import Callable, Iterator

from .gtk import GLib

PORTION_S = 0.008


class Portions:
    """Takes the steps of one piece of work at a time; a newer one takes the place of what is not done."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._steps: Iterator[object] = iter(())
        self._is_scheduled = False

    def run(self, steps: Iterator[object]) -> None:
        """Take the first portion now, and the others when the main loop has nothing else to do."""
        self._steps = steps
        if self._take() and not self._is_scheduled:
            self._is_scheduled = True
            GLib.idle_add(self._idle)

    def stop(self) -> None:
        """Take no further step."""
        self._steps = iter(())

    def _idle(self) -> bool:
        self._is_scheduled = self._take()
        return self._is_scheduled

    def _take(self) -> bool:
        """Whether any step is left."""
        until = self._clock() + PORTION_S
        return any(self._clock() >= until for _ in self._steps)
