# SPDX-License-Identifier: GPL-2.0-or-later
"""How much of something may happen in a second, and at once."""


class Bucket:
    """A token bucket: ``rate`` tokens a second, and at most ``burst`` at once."""

    __slots__ = ("_at", "_burst", "_rate", "left")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._at = now
        self.left = burst

    def fill(self, now: float) -> float:
        """How much is left at this time."""
        self.left = min(self._burst, self.left + (now - self._at) * self._rate)
        self._at = now
        return self.left
