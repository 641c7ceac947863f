# SPDX-License-Identifier: GPL-2.0-or-later
"""How much of the budget one stream has, and when its peer is granted more of it.

A window grows while the local peer takes what comes as fast as it comes, and shrinks when it does not, when
nothing comes, and when many want some.
"""

from qubes_fwd_qrexec.mux import MIN_CREDIT_BYTES

from .budget import FLOOR_BYTES, INITIAL_BYTES, Share

# Half of a window is granted at a time. A stream that used it sooner than this gets a larger window, and one
# that took longer than this a smaller one.
_FAST_S = 0.01
_SLOW_S = 0.1


class Window:
    """``size`` is what the peer may still send, what waits for the local peer, and ``owed``: what that has
    taken and what is not granted again yet. All in bytes of credit; times are those of `time.monotonic`.
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
        """Whether it is time to see what may be granted again."""
        return self.owed >= self.size // 4

    def grant(self, outstanding: int, now: float) -> int:
        """What to grant to a peer that may still send ``outstanding``; 0 to wait for more.

        It is what was used, when it is half of the window, which is what the peer is told at once; more where
        it was used fast, less where it was not.
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
        """Whether less than the window was used since the last time, while others are short of it.

        ``received`` counts all that came.
        """
        used, self._received = received - self._received, received
        return used < self.size and self._share.is_short

    def give_back(self, amount: int) -> None:
        """So much less may be sent; and what was taken before need not be granted again for now."""
        self.size -= amount
        self._share.give_back(amount)
        self._change(-min(self.owed, self.size - FLOOR_BYTES))

    def end(self) -> None:
        """Nothing more can come: all but the floor is for others."""
        self._change(FLOOR_BYTES - self.size)

    def leave(self) -> None:
        """The stream is over."""
        self._share.leave(self.size)

    def _change(self, change: int) -> None:
        """By what the budget was asked for, or gets back."""
        self.size += change
        self.owed += change
        if change < 0:
            self._share.give_back(-change)
