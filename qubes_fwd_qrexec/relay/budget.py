# SPDX-License-Identifier: GPL-2.0-or-later
"""How many bytes all streams of a process may make it hold, together.

Each stream has a floor that nobody can take from it, so that a full budget slows streams and stops
none. What is above the floors is lent: a stream whose consumer keeps up gets more of it, one that is slow
or idle gives it back. What is lent counts whether it is used or not, so the bound holds whatever peers do.
mux call/SPEC.md, section 5, says why it is enough for everybody.
"""

from qubes_fwd_qrexec.mux.limits import MIN_WINDOW_BYTES

from .socketbuffers import SocketMemory

# Credit that every stream has, whatever the others do.
FLOOR_BYTES = MIN_WINDOW_BYTES
# Half for 16,384 floors, half to share; with 10,000 streams held there are 12 MiB more to share.
BUDGET_BYTES = 64 << 20
STREAMS_MAX = BUDGET_BYTES // 2 // FLOOR_BYTES
# A stream begins with this, where there is enough: an HTTP request or a small page without waiting.
INITIAL_BYTES = 32 << 10
# And ends with at most this: at 0.3 ms for a round trip through two qubes, enough for 800 MiB/s. With twice
# as much no stream was faster.
WINDOW_MAX_BYTES = 256 << 10
# No window is a larger part than this of what is left: the more is lent, the less each gets, and there is
# always something for the next: 150 that are stalled leave it 75 KiB. The first may have the largest window.
_PART = 100
# One mux call has at most so many times what it leaves: no peer alone can keep all, and streams of the others
# can still begin as they do.
_MUX_TIMES = 7


class Budget:
    """The account of one process; all numbers in bytes.

    ``sockets`` is what the kernel may hold beside it.
    """

    def __init__(
        self, total: int = BUDGET_BYTES, streams_max: int = STREAMS_MAX, sockets: SocketMemory | None = None
    ) -> None:
        if streams_max * FLOOR_BYTES > total:
            raise ValueError(f"{streams_max} floors of {FLOOR_BYTES} bytes do not fit {total}")
        self.total = total
        self.streams_max = streams_max
        self.streams = 0
        self.shared = self.shared_left = total - streams_max * FLOOR_BYTES
        self.sockets = sockets or SocketMemory()


class Share:
    """What the streams of one mux call have of the budget. ``lent`` is what they have above their floors."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.sockets = budget.sockets
        self.lent = 0

    @property
    def window_max(self) -> int:
        """The largest window that a stream may have now."""
        return min(max(self._room // _PART, FLOOR_BYTES), WINDOW_MAX_BYTES)

    @property
    def _room(self) -> int:
        """What this mux call may still be lent."""
        left = self._budget.shared_left
        return min(left, _MUX_TIMES * left - self.lent)

    @property
    def is_short(self) -> bool:
        """Whether so little is left that what is lent and not used is missed elsewhere."""
        return self._room < self._budget.shared // 2

    @property
    def is_watched(self) -> bool:
        """Whether each stream is to be looked at, as it may have what others need."""
        return self.is_short or self.sockets.is_short or self.sockets.is_crowded

    def admit(self) -> int:
        """A new stream's first window, or 0 when there are as many streams as there are floors."""
        if self._budget.streams >= self._budget.streams_max:
            return 0
        self._budget.streams += 1
        return FLOOR_BYTES + self.take(INITIAL_BYTES - FLOOR_BYTES, FLOOR_BYTES)

    def take(self, wanted: int, window: int) -> int:
        """As much more as a stream may have that has ``window``."""
        taken = max(min(wanted, self.window_max - window), 0)
        self._budget.shared_left -= taken
        self.lent += taken
        return taken

    def give_back(self, some: int) -> None:
        self._budget.shared_left += some
        self.lent -= some

    def leave(self, window: int) -> None:
        """A stream with that window is over."""
        self._budget.streams -= 1
        self.give_back(window - FLOOR_BYTES)
