# SPDX-License-Identifier: GPL-2.0-or-later
"""Which streams of a mux call have been idle for too long."""

from collections.abc import Iterable

from .leg import Leg
from .patience import TICK_S

# docs/behaviours.md, 9.
HALF_CLOSE_S = 600.0
# How often the streams are looked at.
LOOK_TICKS = 5


class Idleness:
    """Counts only the time in which this process ran; times are those of `time.monotonic`.

    ``half_close_s``: for a stream of which one direction has ended. ``idle_s``: for any stream.
    """

    __slots__ = ("_ticked_at", "_ticks", "half_close_s", "idle_s")

    def __init__(self, half_close_s: float, idle_s: float, now: float) -> None:
        self.half_close_s = half_close_s
        self.idle_s = idle_s
        self._ticked_at = now
        self._ticks = 0

    def tick(self, legs: Iterable[Leg], now: float) -> list[Leg]:
        """A second has passed: the legs to abort, which is looked up once in a few ticks."""
        late_s = now - self._ticked_at - TICK_S
        self._ticked_at = now
        self._ticks += 1
        if late_s > TICK_S:  # this process was stopped, which is nobody's silence
            for leg in legs:
                leg.moved_at = min(now, leg.moved_at + late_s)
        if self._ticks % LOOK_TICKS:
            return []
        idle_since, half_closed_since = now - self.idle_s, now - self.half_close_s
        return [
            leg
            for leg in legs
            if leg.moved_at <= idle_since or (leg.moved_at <= half_closed_since and leg.is_half_closed)
        ]
