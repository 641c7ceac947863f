# SPDX-License-Identifier: GPL-2.0-or-later
"""How many bytes all streams of a process together may make it hold.

Each stream has a floor that nobody can take from it, so a full budget slows streams down but stops none.
What is above the floors is lent: a stream whose consumer keeps up gets more of it, one that is slow or idle
gives it back. Lent bytes count whether they are used or not, so the bound holds whatever peers do.
mux/SPEC.md, section 5, says why this is enough for everybody.
"""

from qubes_fwd_qrexec.mux.limits import MIN_WINDOW_BYTES

from .socketbuffers import SocketMemory

# The credit that every stream has, whatever the others do.
FLOOR_BYTES = MIN_WINDOW_BYTES
# What is lent above the floors.
LENT_BYTES = 32 << 20
# As many floors as fit as much again. That is for the service of one mux call; a listener, which has several
# calls, has floors for more (`exposed.limits`).
STREAMS_MAX = LENT_BYTES // FLOOR_BYTES
BUDGET_BYTES = LENT_BYTES + STREAMS_MAX * FLOOR_BYTES
# A stream begins with this, if enough is left: an HTTP request or a small page needs no waiting.
INITIAL_BYTES = 32 << 10
# It grows to this at most: with 0.3 ms for a round trip through two qubes, enough for 800 MiB/s. Twice as
# much made no stream faster.
WINDOW_MAX_BYTES = 256 << 10
# No window is larger than this part of what is left. The more is lent, the less each stream gets, and there
# is always something left for the next one: 150 stalled streams leave it 75 KiB.
_PART = 100
# One mux call has at most this many times what it leaves: no peer alone can keep everything, and the streams
# of the others still begin with INITIAL_BYTES.
_MUX_TIMES = 7


class Budget:
    """The account of one process, in bytes. ``sockets`` is the account of what the kernel holds beside it.

    Raises ValueError if ``total`` has no room for so many floors.
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
    """What the streams of one mux call have of the budget; ``lent`` is what is above their floors."""

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
        """How much this mux call may still be lent."""
        left = self._budget.shared_left
        return min(left, _MUX_TIMES * left - self.lent)

    @property
    def is_short(self) -> bool:
        """Whether so little is left that others need what is lent and unused."""
        return self._room < self._budget.shared // 2

    @property
    def is_watched(self) -> bool:
        """Whether to look at each stream, as it may have what others need."""
        return self.is_short or self.sockets.is_short or self.sockets.is_crowded

    def admit(self) -> int:
        """Return the first window of a new stream, or 0 if there are as many streams as floors."""
        if self._budget.streams >= self._budget.streams_max:
            return 0
        self._budget.streams += 1
        return FLOOR_BYTES + self.take(INITIAL_BYTES - FLOOR_BYTES, FLOOR_BYTES)

    def take(self, wanted: int, window: int) -> int:
        """Lend a stream that has ``window`` up to ``wanted`` more; returns how much."""
        taken = max(min(wanted, self.window_max - window), 0)
        self._budget.shared_left -= taken
        self.lent += taken
        return taken

    def give_back(self, some: int) -> None:
        """A stream needs so much less."""
        self._budget.shared_left += some
        self.lent -= some

    def leave(self, window: int) -> None:
        """A stream that has ``window`` is over."""
        self._budget.streams -= 1
        self.give_back(window - FLOOR_BYTES)
