# SPDX-License-Identifier: GPL-2.0-or-later
"""Back-off after a call was refused or found no room: one try now and then, for everybody who waits.

dom0 evaluates its policy for each call, and connections must not flood it with calls. But nobody should wait
longer than necessary, either: what was refused a moment ago may be allowed now.
"""

import math

from qubes_fwd_qrexec.common.refusals import Refusal

from .bucket import Bucket

# A call that finds no vchan keeps one of its target's 127 slots for two minutes (docs/facts.md, Q1 and Q3).
# So in that time fewer than 90 are in vain, however often there seems to be room.
_VAIN_A_SECOND = 1 / 3
_VAIN_AT_ONCE = 40.0
_VAIN_DEBT_MAX = 5.0
# A try for room that has no answer for so long keeps nobody else from trying: dom0 loses a call now and then
# (docs/facts.md, Q19).
TRY_S = 10.0


class Brake:
    """For one service of a target, or for a target. Times are in seconds of any one clock."""

    __slots__ = ("_again_at", "_asking", "_asking_until", "_most", "_soon_at", "_vain", "kind", "why")

    def __init__(self) -> None:
        self.why = ""
        """Why the last call failed."""
        self.kind: str = Refusal.BUSY
        """The same in one word, for counters."""
        self._most = math.inf
        self._again_at = -math.inf
        self._soon_at = math.inf
        self._asking: object = None
        self._asking_until = -math.inf
        self._vain: Bucket | None = None

    @property
    def is_on(self) -> bool:
        return self._most < math.inf

    def is_full(self, living: int) -> bool:
        """Whether one more call beside ``living`` ones would be a try."""
        return living >= self._most

    @property
    def waits_for_any(self) -> bool:
        """Whether the end of any call may help, whichever target it was to."""
        return self._soon_at < math.inf

    def put_on(
        self, most: int, again_at: float, why: str, kind: str = Refusal.BUSY, soon_at: float = math.inf
    ) -> None:
        """Allow at most ``most`` calls from now on, and from ``again_at`` one more as a try; already from
        ``soon_at`` once any call has ended."""
        self._most = most
        self._again_at = max(self._again_at, again_at)
        self._soon_at = soon_at
        self.why = why
        self.kind = kind

    def in_vain(self, most: int, again_at: float, why: str, now: float, soon_s: float) -> None:
        """`put_on` after a call that found no vchan; ``soon_s`` is how soon the end of any other helps."""
        vain = self._vain = self._vain or Bucket(_VAIN_A_SECOND, _VAIN_AT_ONCE, now)
        vain.left = max(vain.fill(now) - 1, -_VAIN_DEBT_MAX)
        soon_at = now + max(soon_s, -vain.left / _VAIN_A_SECOND)
        self.put_on(most, max(again_at, soon_at), why, soon_at=soon_at)

    def admits(self, living: int, now: float) -> bool:
        """Whether another call may begin beside ``living`` ones."""
        since = self._again_at if self._asking is None else self._asking_until
        return not self.is_full(living) or now >= since

    def hasten(self) -> None:
        """A call has ended, to whichever target."""
        self._again_at = min(self._again_at, self._soon_at)

    def begins(self, call: object, living: int, now: float) -> None:
        """``call`` begins beside ``living`` ones; if the brake allows no more than those, it is the try."""
        if self.is_full(living):
            self._asking = call
            self._asking_until = now + TRY_S if self.waits_for_any else math.inf

    def is_through(self, call: object) -> bool:
        """``call`` is through: if it was the try, which is returned, release the brake."""
        was_try = self._asking is call
        if was_try:
            self.release()
        return was_try

    def ended(self, call: object) -> None:
        """``call`` is over: if it was the try, another call may be."""
        if self._asking is call:
            self._asking = None

    def release(self) -> None:
        """Hold nothing back any more."""
        self._most, self._again_at, self._soon_at, self._asking = math.inf, -math.inf, math.inf, None
