# SPDX-License-Identifier: GPL-2.0-or-later
"""Work on widgets in portions, so that the main loop never waits long for it.

While a worker computes, each call of GTK may wait for Python's lock; so a portion is bounded by time. In one
turn of the main loop there is one portion of one piece of work.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import ClassVar

from .gtk import GLib

PORTION_S = 0.008
# After drawing, input, and what workers deliver.
_PRIORITY = GLib.PRIORITY_LOW


class _Turns:
    """Who has steps left; whether anybody takes one now."""

    waiting: ClassVar[deque["Portions"]] = deque()
    is_taken = False


class Portions:
    """Takes the steps of one piece of work at a time; a newer one takes the place of what is not done."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._steps: Iterator[object] = iter(())

    def run(self, steps: Iterator[object]) -> None:
        """Take the first portion now, unless a step of other work asks for that, and the others when the main
        loop has nothing else to do.
        """
        self._steps = steps
        if _Turns.is_taken or self.take():
            self._wait()

    def stop(self) -> None:
        """Take no further step."""
        self._steps = iter(())

    def take(self) -> bool:
        """Take a portion. Returns whether any step is left."""
        _Turns.is_taken = True
        try:
            until = self._clock() + PORTION_S
            return any(self._clock() >= until for _ in self._steps)
        finally:
            _Turns.is_taken = False

    def _wait(self) -> None:
        if not _Turns.waiting:
            _schedule()
        if self not in _Turns.waiting:
            _Turns.waiting.append(self)


def _schedule() -> None:
    GLib.idle_add(_turn, priority=_PRIORITY)


def _turn() -> bool:
    """Take a portion of what has waited longest. Others get their turn even if that fails."""
    work = _Turns.waiting.popleft()
    if _Turns.waiting:
        _schedule()
    if work.take():
        work._wait()
    return False
