# SPDX-License-Identifier: GPL-2.0-or-later
"""Clients of a budget for calls, each of which holds its place until it is told to end."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio
from helpers import BOUND_S
from trio.testing import wait_all_tasks_blocked

from qubes_fwd_qrexec.common.errors import RefusedError
from qubes_fwd_qrexec.exposed.callbudget import (
    CallBudget,
)
from qubes_fwd_qrexec.exposed.callplace import Place
from qubes_fwd_qrexec.exposed.callqueue import Key, Kind


class Client:
    """Somebody who wants a call, and makes room as the holder of its place."""

    def __init__(self, budget: CallBudget, tasks: trio.Nursery, kind: Kind, service: str, key: Key) -> None:
        self.place: Place | None = None
        self.error: RefusedError | None = None
        self.quiet_s: float | None = None
        self.sole_user: tuple[Key, float] | None = None
        self._over = trio.Event()
        self._budget = budget
        self.ended = trio.Event()
        tasks.start_soon(self._run, kind, *service.split("/"), key)

    async def _run(self, kind: Kind, target: str, service: str, key: Key) -> None:
        try:
            async with self._budget.place(kind, target, service, key) as self.place:
                self.place.holder = self
                await self._over.wait()
        except RefusedError as error:
            self.error = error
        finally:
            self.place = None
            self.ended.set()

    @property
    def has_call(self) -> bool:
        return self.place is not None

    def end(self) -> None:
        self._over.set()

    make_room = end

    def through(self) -> None:
        assert self.place is not None
        self.place.through()

    def failed(self, status: int, why: str = "refused") -> bool:
        assert self.place is not None
        again = self.place.failed(why, status)
        self.end()
        return again


class Bench:
    def __init__(self, budget: CallBudget, tasks: trio.Nursery) -> None:
        self.budget = budget
        self._tasks = tasks

    async def want(self, *keys: str, kind: Kind = Kind.SINGLE, service: str = "work/s+1") -> list[Client]:
        """Clients of ``RULE/SOURCE``, who have asked by the time this returns."""
        found = []
        for key in keys or ("",):
            parts = tuple(key.split("/")) if key else ()
            found.append(Client(self.budget, self._tasks, kind, service, parts))
            await wait_all_tasks_blocked()
        return found

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let time pass until it is true."""
        with trio.fail_after(BOUND_S):
            while not condition():  # noqa: ASYNC110
                await trio.sleep(0.1)

    async def have(self, count: int, *, kind: Kind = Kind.SINGLE, service: str = "work/s+1") -> list[Client]:
        """Clients whose calls are through."""
        found = []
        for _ in range(count):
            found += await self.want("r/s" if kind is Kind.SINGLE else "", kind=kind, service=service)
            found[-1].through()
        return found


@asynccontextmanager
async def bench_of(calls_max: int) -> AsyncIterator[Bench]:
    async with trio.open_nursery() as tasks:
        budget = CallBudget(tasks, calls_max)
        yield Bench(budget, tasks)
        tasks.cancel_scope.cancel()
    assert budget.calls == budget.waiting == 0


def has_call(client: Client) -> bool:
    return client.has_call


def served(clients: list[Client]) -> int:
    return sum(client.has_call for client in clients)
