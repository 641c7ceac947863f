# SPDX-License-Identifier: GPL-2.0-or-later
"""How much of the budget one stream has, and when to grant its peer more.

A window grows while the local peer takes data as fast as it arrives. It shrinks when the peer does not, when
nothing arrives, and when many streams want some.
"""

from qubes_fwd_qrexec.mux import MIN_CREDIT_BYTES

from .budget import FLOOR_BYTES, INITIAL_BYTES, Share

# Half of a window is granted at a time. A stream that uses it up sooner than the first gets a larger window,
# and one that takes longer than the second a smaller one. One of 64 bulk streams, at 3 MiB/s, still counts as
# fast: with a small window it would move little each time.
_FAST_S = 0.05
_SLOW_S = 0.1


class Window:
    """``size`` is the sum of what the other end may still send, what waits for the local peer, and ``owed``:
    what the local peer has taken and was not granted again yet. All in bytes of credit; times are those of
    `time.monotonic`.
    """

    __slots__ = ("_granted_at", "_received", "_share", "owed", "size")

    def __init__(self, share: Share, size: int, now: float) -> None:
        self._share = share
        self._granted_at = now
        self._received = 0
        self.size = size
        self.owed = 0

    @property
    def is_owed_much(self) -> bool:
        """Whether so much is owed that `grant` may have something to grant."""
        return self.owed >= self.size // 4

    def grant(self, outstanding: int, now: float) -> int:
        """Return how much to grant to a peer that may still send ``outstanding``; 0 to wait.

        It grants what was used once that is half of the window, for which the protocol sends CREDIT at once:
        more if it was used fast, less if not.
        """
        least = max(outstanding, MIN_CREDIT_BYTES)
        if self.owed < least:
            return 0
        took_s = now - self._granted_at
        self._granted_at = now
        size_max = self._share.window_max
        if took_s > _SLOW_S:
            size_max = min(size_max, INITIAL_BYTES)
        if self.size > size_max:
            self._change(-min(self.owed, self.size - size_max))
        elif took_s < _FAST_S:
            self._change(self._share.take(self.size, self.size))
        if self.owed < least:
            return 0
        granted, self.owed = self.owed, 0
        return granted

    def is_missed(self, received: int) -> bool:
        """Whether less than the window was used since the last call, while others need it.

        ``received`` counts all bytes that arrived so far.
        """
        used, self._received = received - self._received, received
        return used < self.size and self._share.is_short

    def give_back(self, amount: int) -> None:
        """The other end gave back ``amount``; and do not grant again, for now, what is owed."""
        self.size -= amount
        self._share.give_back(amount)
        self._change(-min(self.owed, self.size - FLOOR_BYTES))

    def end(self) -> None:
        """Nothing more can arrive: give everything but the floor back to the budget."""
        self._change(FLOOR_BYTES - self.size)

    def leave(self) -> None:
        """The stream is over."""
        self._share.leave(self.size)

    def _change(self, change: int) -> None:
        """Change the size by what the budget lent, or gets back if it is negative."""
        self.size += change
        self.owed += change
        if change < 0:
            self._share.give_back(-change)
