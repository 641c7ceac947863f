# SPDX-License-Identifier: GPL-2.0-or-later
"""A clock that a test moves by hand, for timers beside real sockets, whatever time these take."""

import time
from types import ModuleType, SimpleNamespace

import pytest
import trio
from trio.testing import wait_all_tasks_blocked


class HandClock:
    """The time of the modules that are named; all else, and every bound of the test, goes by the real one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
        self._now = trio.current_time()
        self._sleeping: list[tuple[float, trio.Event]] = []
        own = {"current_time": lambda: self._now, "sleep": self._sleep}
        for module in modules:
            for real, replaced in ((trio, own), (time, {"monotonic": lambda: self._now})):
                if getattr(module, real.__name__, None) is real:
                    monkeypatch.setattr(module, real.__name__, SimpleNamespace(**vars(real) | replaced))

    async def _sleep(self, seconds: float) -> None:
        sleeping = self._now + seconds, trio.Event()
        self._sleeping.append(sleeping)
        try:
            await sleeping[1].wait()
        finally:
            self._sleeping.remove(sleeping)

    async def advance(self, seconds: float) -> None:
        """Let so much time pass: all that is due in it happens at its time."""
        end = self._now + seconds
        await wait_all_tasks_blocked()
        while due := sorted(at for at, _ in self._sleeping if at <= end):
            self._now = due[0]
            for at, event in self._sleeping:
                if at <= self._now:
                    event.set()
            await wait_all_tasks_blocked()
        self._now = end
