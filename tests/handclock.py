# SPDX-License-Identifier: GPL-2.0-or-later
"""A clock that a test moves by hand, for timers beside real sockets, whatever time these take."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import trio
from loop_time import exact_s
from trio.testing import wait_all_tasks_blocked


class HandClock:
    """The time of the modules that are named: it stands still but for `advance`.

    All else, and every bound of the test, goes by the real one.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
        self._now = exact_s(trio.current_time())
        self._due: list[tuple[float, Callable[[], None]]] = []
        own = {
            "current_time": lambda: self._now,
            "sleep": self._sleep,
            "move_on_at": contextmanager(self._move_on_at),
        }
        for module in modules:
            for real, replaced in ((trio, own), (time, {"monotonic": lambda: self._now})):
                if getattr(module, real.__name__, None) is real:
                    monkeypatch.setattr(module, real.__name__, SimpleNamespace(**vars(real) | replaced))

    async def _sleep(self, seconds: float) -> None:
        over = trio.Event()
        with self._at(self._now + seconds, over.set):
            await over.wait()

    def _move_on_at(self, deadline: float) -> Iterator[trio.CancelScope]:
        with trio.CancelScope() as scope, self._at(deadline, scope.cancel):
            yield scope

    @contextmanager
    def _at(self, when: float, what: Callable[[], None]) -> Iterator[None]:
        due = when, what
        self._due.append(due)
        try:
            yield
        finally:
            self._due.remove(due)

    async def advance(self, seconds: float) -> None:
        """Let so much time pass: all that is due in it happens at its time."""
        end = self._now + exact_s(seconds)
        await wait_all_tasks_blocked()
        while due := sorted(at for at, _ in self._due if at <= end):
            self._now = due[0]
            for at, what in self._due:
                if at <= self._now:
                    what()
            await wait_all_tasks_blocked()
        self._now = end

    async def jump(self, seconds: float) -> None:
        """Let so much time pass in which nobody ran: all that is due in it happens late, and at once."""
        await wait_all_tasks_blocked()
        self._now += exact_s(seconds)
        for at, what in list(self._due):
            if at <= self._now:
                what()
        await wait_all_tasks_blocked()
