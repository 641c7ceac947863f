# SPDX-License-Identifier: GPL-2.0-or-later
"""What a listener bears in mind about a target: how many calls are under way, and whether it is refused.

qrexec gives each target 128 calls at once, shared with everything else it does, and a policy question
in dom0 for each. So calls to one target are capped, those above wait for a while in a queue with a
bound, and after a refusal the next connections are refused here, for longer each time.
"""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from .errors import RefusedError

# A quarter of what qrexec has for one target (qubes-core-qrexec daemon/qrexec-daemon.c, MAX_FDS).
CALLS_MAX = 32
# As many again may wait as a stock listen queue holds, and as long as a connect may take.
WAITING_MAX = 128
WAIT_S = 10.0
# relay-behaviours 23: connections must not flood dom0 with policy questions.
BACK_OFF_FIRST_S = 1.0
BACK_OFF_MAX_S = 60.0


class Target:
    """One target's slots and back-off."""

    def __init__(
        self, name: str, calls_max: int = CALLS_MAX, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self.calls_max = calls_max
        self._slots = trio.CapacityLimiter(calls_max)
        self._clock = clock
        self._back_off_s = 0.0
        self._refused_until = 0.0

    @property
    def calls(self) -> int:
        """Calls under way."""
        return int(self._slots.borrowed_tokens)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold one of the target's calls; raises `RefusedError` when there is none to be had in time."""
        self._check_back_off()
        if self._slots.statistics().tasks_waiting >= WAITING_MAX:
            raise RefusedError(f"{self.name} has {self.calls_max} calls and {WAITING_MAX} wait")
        borrower = object()
        with trio.move_on_after(WAIT_S) as waiting:
            await self._slots.acquire_on_behalf_of(borrower)
        if waiting.cancelled_caught:
            raise RefusedError(f"{self.name} has {self.calls_max} calls, and none ended within {WAIT_S:g} s")
        try:
            self._check_back_off()
            yield
        finally:
            self._slots.release_on_behalf_of(borrower)

    def refused(self) -> None:
        """dom0 refused a call: refuse here from now on, twice as long as the last time.

        Several calls that were under way together count as one.
        """
        if self._clock() < self._refused_until:
            return
        self._back_off_s = min(max(self._back_off_s * 2, BACK_OFF_FIRST_S), BACK_OFF_MAX_S)
        self._refused_until = self._clock() + self._back_off_s

    def accepted(self) -> None:
        """A call went through, or the configuration is new: ask dom0 again at once."""
        self._back_off_s = 0.0
        self._refused_until = 0.0

    def _check_back_off(self) -> None:
        left_s = self._refused_until - self._clock()
        if left_s > 0:
            raise RefusedError(f"dom0 refused calls to {self.name}; it is asked again in {left_s:.1f} s")
