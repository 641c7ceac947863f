# SPDX-License-Identifier: GPL-2.0-or-later
"""What holds calls back after one was refused, or found no room: one question now and then for all who wait.

Each call is a question to dom0's policy, and connections must not flood dom0 with them. Nobody is kept
waiting for longer than it takes to find out, either: what was refused a moment ago may be allowed now.
"""

import math

from qubes_fwd_qrexec.common.refusals import Refusal

# How often dom0 is asked again while somebody waits.
AGAIN_S = 2.0


class Brake:
    """For one service of a target, for a target, or for this qube. Times are in seconds, of any one clock."""

    __slots__ = ("_again_at", "_asking", "_most", "kind", "why")

    def __init__(self) -> None:
        self.why = ""
        """Why the last call came to nothing."""
        self.kind: str = Refusal.BUSY
        """The same in one word, for counters."""
        self._most = math.inf
        self._again_at = -math.inf
        self._asking: object = None

    @property
    def is_on(self) -> bool:
        return self._most < math.inf

    def put_on(self, most: int, again_at: float, why: str, kind: str = Refusal.BUSY) -> None:
        """From now on at most so many calls, and from ``again_at`` on one more, to find out."""
        self._most = most
        self._again_at = max(self._again_at, again_at)
        self.why = why
        self.kind = kind

    def admits(self, living: int, now: float) -> bool:
        """Whether another call may begin beside so many."""
        return living < self._most or (self._asking is None and now >= self._again_at)

    def begins(self, call: object, living: int) -> None:
        """``call`` begins beside so many; if that is more than was found to go, it finds out for all."""
        if living >= self._most:
            self._asking = call

    def is_through(self, call: object) -> None:
        """``call`` is through: if it was to find out, there is nothing to hold back any more."""
        if self._asking is call:
            self.release()

    def ended(self, call: object) -> None:
        """``call`` is over: if it was to find out, another may."""
        if self._asking is call:
            self._asking = None

    def release(self) -> None:
        """Hold nothing back."""
        self._most, self._again_at, self._asking = math.inf, -math.inf, None
