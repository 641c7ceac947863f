# SPDX-License-Identifier: GPL-2.0-or-later
"""Lack of vchans in this qube, told from targets that take no call: both end a call with exit status 1.

If it were this qube's lack, calls to all targets would meet it. So once one to another target gets through
where one more was only a try, or there are fewer calls and still none gets through, it is the target's fault.
"""

import math

# A large call needs as much as two small ones (`callbudget`).
_FEWER = 2


class Shortage:
    """Which targets' calls have met it; times are in seconds of any one clock."""

    __slots__ = ("_at_fault", "_met")

    def __init__(self) -> None:
        # By target: beside how many other calls the last one met it, when, and whether that was a small one.
        self._met: dict[str, tuple[int, float, bool]] = {}
        self._at_fault: set[str] = set()

    @property
    def is_met(self) -> bool:
        """Whether any target's calls have met it that is not known to be at fault."""
        return bool(self._met)

    @property
    def is_met_by_several(self) -> bool:
        """The same of more targets than one."""
        return len(self._met) > 1

    def is_met_by(self, target: str) -> bool:
        return target in self._met

    def is_fault_of(self, target: str) -> bool:
        """Whether the target takes no call, although there is room."""
        return target in self._at_fault

    def meets(self, target: str, beside: int, began_at: float, now: float, *, is_small: bool) -> None:
        """A call that began then has ended as if there were no room beside so many others."""
        before, at, _ = self._met.get(target, (0, math.inf, False))
        if began_at > at and beside + _FEWER <= before:
            self._at_fault.add(target)
            del self._met[target]
        elif target not in self._at_fault:
            self._met[target] = beside, now, is_small

    def is_through(self, target: str, *, was_try: bool, is_small: bool) -> None:
        """A call to the target is through; ``was_try``: beside as many as a call that met it.

        A small one says nothing of room for a large one.
        """
        self._at_fault.discard(target)
        self._met.pop(target, None)
        if was_try:
            at_fault = {other for other, (_, _, was_small) in self._met.items() if was_small or not is_small}
            self._at_fault |= at_fault
            for other in at_fault:
                del self._met[other]

    def forget(self) -> None:
        self._met.clear()
        self._at_fault.clear()
