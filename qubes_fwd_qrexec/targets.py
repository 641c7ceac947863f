# SPDX-License-Identifier: GPL-2.0-or-later
"""What a listener bears in mind about a target: how many calls are under way, and whether it is refused.

qrexec gives each target 128 calls at once, shared with everything else it does, and a policy question
in dom0 for each. So calls to one target are capped, those above wait for a while in a queue with a
bound, and after a refusal the next connections to the same service and port are refused here, for
longer each time; what dom0 allows beside it goes on.
"""

import math
import random
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
# relay-behaviours 28: up to a quarter more by chance, so that qubes that were refused together do not all
# come back together.
BACK_OFF_JITTER = 0.25
_CHANCE = random.SystemRandom()


class _BackOff:
    """How long one service of a target is not asked for, and why."""

    __slots__ = ("length_s", "until", "why")

    def __init__(self) -> None:
        self.length_s = 0.0
        self.until = -math.inf
        self.why = ""


class Target:
    """One target's slots, and a back-off for each ``SERVICE+ARGUMENT`` that dom0 refused."""

    def __init__(
        self,
        name: str,
        calls_max: int = CALLS_MAX,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = _CHANCE.random,
    ) -> None:
        self.name = name
        self.calls_max = calls_max
        self._slots = trio.CapacityLimiter(calls_max)
        self._clock = clock
        self._chance = chance
        self._back_offs: dict[str, _BackOff] = {}

    @property
    def calls(self) -> int:
        """Calls under way."""
        return int(self._slots.borrowed_tokens)

    @asynccontextmanager
    async def slot(self, service: str) -> AsyncIterator[None]:
        """Hold one of the target's calls; raises `RefusedError` when there is none to be had in time."""
        self.check_back_off(service)
        if self._slots.statistics().tasks_waiting >= WAITING_MAX:
            raise RefusedError(f"{self.name} has {self.calls_max} calls and {WAITING_MAX} wait")
        borrower = object()
        with trio.move_on_after(WAIT_S) as waiting:
            await self._slots.acquire_on_behalf_of(borrower)
        if waiting.cancelled_caught:
            raise RefusedError(f"{self.name} has {self.calls_max} calls, and none ended within {WAIT_S:g} s")
        try:
            self.check_back_off(service)
            yield
        finally:
            self._slots.release_on_behalf_of(borrower)

    def refused(self, service: str, why: str) -> None:
        """There is no such call to be had: refuse here from now on, twice as long as the last time.

        Several calls that were under way together count as one.
        """
        back_off = self._back_offs.setdefault(service, _BackOff())
        if self._clock() < back_off.until:
            return
        longest_s = BACK_OFF_MAX_S / (1 + BACK_OFF_JITTER)
        back_off.length_s = min(max(back_off.length_s * 2, BACK_OFF_FIRST_S), longest_s)
        back_off.until = self._clock() + back_off.length_s * (1 + BACK_OFF_JITTER * self._chance())
        back_off.why = why

    def lost(self, service: str, why: str) -> None:
        """A call that had gone through ended in trouble: it is asked for again at once, but only once."""
        if service in self._back_offs:
            self.refused(service, why)
        else:
            self._back_offs[service] = _BackOff()

    def accepted(self, service: str) -> None:
        """A call went through: ask dom0 again at once."""
        self._back_offs.pop(service, None)

    def forget_refusals(self) -> None:
        """The configuration is new, and with it the policy: ask dom0 again at once."""
        self._back_offs.clear()

    def check_back_off(self, service: str) -> None:
        """Raises `RefusedError` while a refused service is not to be asked for again."""
        back_off = self._back_offs.get(service)
        if back_off is None:
            return
        left_s = back_off.until - self._clock()
        if left_s > 0:
            raise RefusedError(f"{service} in {self.name} is tried again in {left_s:.1f} s: {back_off.why}")
