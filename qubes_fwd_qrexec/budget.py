# SPDX-License-Identifier: GPL-2.0-or-later
"""How many bytes all streams of a process may make it hold, together.

Each stream has a floor that nobody can take from it, so that a full budget slows streams and stops
none. What is above the floors is shared: a stream whose consumer keeps up gets more of it, one whose
consumer is slow gives it back.
"""

from .tunnel.limits import MIN_WINDOW_BYTES

# Credit that every stream has, whatever the others do.
FLOOR_BYTES = MIN_WINDOW_BYTES
# Half for 16,384 floors, half to share; with 10,000 streams held there are 12 MiB more to share.
BUDGET_BYTES = 64 << 20
STREAMS_MAX = BUDGET_BYTES // 2 // FLOOR_BYTES
# A stream begins with this, where there is enough: an HTTP request or a small page without waiting.
INITIAL_BYTES = 32 << 10
# And ends with at most this: at 0.3 ms for a round trip through two qubes, enough for 1.6 GiB/s.
WINDOW_MAX_BYTES = 512 << 10


class Budget:
    """The account of one process; all numbers in bytes."""

    def __init__(self, total: int = BUDGET_BYTES, streams_max: int = STREAMS_MAX) -> None:
        if streams_max * FLOOR_BYTES > total:
            raise ValueError(f"{streams_max} floors of {FLOOR_BYTES} bytes do not fit {total}")
        self.total = total
        self.streams_max = streams_max
        self.streams = 0
        self.shared_left = total - streams_max * FLOOR_BYTES

    @property
    def is_tight(self) -> bool:
        """Whether so little is left to share that streams must give back what they were lent."""
        return self.shared_left < (self.total - self.streams_max * FLOOR_BYTES) // 4

    def admit(self) -> int:
        """A new stream's first window, or 0 when there are as many streams as there are floors."""
        if self.streams >= self.streams_max:
            return 0
        self.streams += 1
        return FLOOR_BYTES + self.take(INITIAL_BYTES - FLOOR_BYTES)

    def take(self, wanted: int) -> int:
        """As much more as may be had: never over an eighth of what is left, so that no one takes all."""
        taken = min(wanted, self.shared_left // 8)
        self.shared_left -= taken
        return taken

    def give_back(self, some: int) -> None:
        self.shared_left += some

    def leave(self, window: int) -> None:
        """A stream with that window is over."""
        self.streams -= 1
        self.shared_left += window - FLOOR_BYTES
