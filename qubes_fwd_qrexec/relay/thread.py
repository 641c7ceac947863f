# SPDX-License-Identifier: GPL-2.0-or-later
"""A `Loop` in a thread of its own, for use from trio.

The thread moves bytes and decides nothing; trio tasks start copies, wait for their ends and decide. A task
that is cancelled while it waits gets its sockets back before it goes on. A bug in something that a task began
ends only that; only an exception of the loop itself ends the thread.
"""

import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import NoReturn, TypeVar

import outcome
import trio

from qubes_fwd_qrexec.system.bugs import BugError, Bugs

from .copy import Copy, CopyEnd, Relay
from .loop import READ, End, Loop

_T = TypeVar("_T")

# How often `do_now` looks whether the thread is still there.
_ALIVE_LOOK_S = 0.1


class RelayThread:
    """Made by `open_relay_thread`. Call its methods from the trio thread that opened it.

    ``loop`` belongs to the relay thread: reach it only with `order` or `wait`.
    """

    def __init__(self, bugs: Bugs) -> None:
        self.loop = Loop(bugs)
        self._relay = Relay(self.loop)
        self._token = trio.lowlevel.current_trio_token()
        self._orders: deque[tuple[Callable[[], None], End]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.loop.watch(self._wake_fd, READ, self._obey, _go_on)
        # One entry for each `wait` under way, so that the end of one never resumes the next one of its task.
        self.waiting: dict[object, trio.lowlevel.Task] = {}
        self._crash: BaseException | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    @property
    def has_failed(self) -> bool:
        """Whether a bug ended the thread, after which nothing can be carried any more."""
        return self._crash is not None

    async def run(self, copy: Copy) -> CopyEnd:
        """Copy until the end. When this is cancelled, the sockets are free before Cancelled is raised.

        Raises what `Relay.start` raises, and `RuntimeError` if the thread has failed.
        """
        return await self.wait(partial(self._relay.start, copy), partial(self._relay.stop, copy))

    async def wait(self, begin: Callable[[Callable[[_T], None]], None], let_go: Callable[[], None]) -> _T:
        """Have the thread begin something, and wait for its result.

        The thread calls ``begin`` with a function that takes the result, to be called once. When this is
        cancelled, the thread has called ``let_go`` before Cancelled is raised.

        Raises an OSError or ValueError of ``begin``, `BugError` for any other exception of it, and
        `RuntimeError` if the thread has failed.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._crash is not None:
            raise RuntimeError("the relay thread has failed") from self._crash
        this_wait = object()

        def resume(result: "outcome.Outcome[_T]") -> None:
            task = self.waiting.pop(this_wait, None)
            if task is not None:
                trio.lowlevel.reschedule(task, result)

        def finish(result: _T) -> None:
            self._token.run_sync_soon(resume, outcome.Value(result))

        def begin_or_fail() -> None:
            try:
                begin(finish)
            except (OSError, ValueError) as error:
                self._token.run_sync_soon(resume, outcome.Error(error))

        def abort_fn(raise_cancel: Callable[[], NoReturn]) -> trio.lowlevel.Abort:
            def let_go_and_tell() -> None:
                self.loop.guarded(_go_on, let_go)
                self._token.run_sync_soon(lambda: resume(outcome.capture(raise_cancel)))

            self.order(let_go_and_tell, _go_on)
            return trio.lowlevel.Abort.FAILED

        def not_begun() -> None:
            self.loop.guarded(_go_on, let_go)
            self._token.run_sync_soon(resume, outcome.Error(BugError()))

        self.waiting[this_wait] = trio.lowlevel.current_task()
        self.order(begin_or_fail, not_begun)
        result: _T = await trio.lowlevel.wait_task_rescheduled(abort_fn)
        return result

    async def watch(self) -> None:
        """Wait for ever; raises `RuntimeError` when the thread has failed, even if nothing else waits."""
        await self.wait(lambda finish: None, _go_on)

    def order(self, what: Callable[[], None], end: End) -> None:
        """Have the thread call ``what`` soon, in the order of these calls; and ``end`` if it raises."""
        self._orders.append((what, end))
        os.eventfd_write(self._wake_fd, 1)

    def do_now(self, what: Callable[[], _T]) -> _T:
        """Have the thread call ``what``, and return or raise what it does. No task of trio runs meanwhile.

        This is for what must be so when the caller goes on, such as that a port is closed. It takes as long
        as the turn of the loop that is under way. If the thread has failed, this one calls ``what``.
        """
        results: list[outcome.Outcome[_T]] = []
        done = threading.Event()

        def do() -> None:
            results.append(outcome.capture(what))
            done.set()

        self.order(do, _go_on)
        while self._thread.is_alive() and not done.wait(_ALIVE_LOOK_S):
            pass
        if not done.is_set():
            do()
        return results[0].unwrap()

    def tell(self, what: Callable[[], None]) -> None:
        """Have trio call ``what`` soon; to be called from the relay thread."""
        self._token.run_sync_soon(what)

    def _run(self) -> None:
        try:
            while not self._is_closing:
                self.loop.run_once()
        except BaseException as crash:  # noqa: BLE001 - handed to every task that waits
            self._crash = crash
            try:
                self._token.run_sync_soon(self._give_up, crash)
            except trio.RunFinishedError:
                raise crash from None

    def _obey(self, _events: int) -> None:
        """In the relay thread: carry out the orders. An order is queued before its wake-up is written."""
        os.eventfd_read(self._wake_fd)
        while self._orders:
            what, end = self._orders.popleft()
            self.loop.guarded(end, what)

    def _give_up(self, crash: BaseException) -> None:
        for task in self.waiting.values():
            error = RuntimeError("the relay thread has failed")
            error.__cause__ = crash
            trio.lowlevel.reschedule(task, outcome.Error(error))
        self.waiting.clear()

    async def _close(self) -> None:
        def stop() -> None:
            self._is_closing = True

        self.order(stop, _go_on)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._thread.join)
        self.loop.close()
        os.close(self._wake_fd)


def _go_on() -> None:
    """For calls that have nothing to end."""


@asynccontextmanager
async def open_relay_thread(bugs: Bugs | None = None) -> AsyncIterator[RelayThread]:
    """Run a `RelayThread` until the end of the block, when no copy may be left."""
    relays = RelayThread(bugs or Bugs())
    relays._thread.start()
    try:
        yield relays
    finally:
        await relays._close()
