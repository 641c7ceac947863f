# SPDX-License-Identifier: GPL-2.0-or-later
"""A `RelayLoop` in a thread of its own, for use from trio.

The thread moves bytes and decides nothing; trio tasks start copies, wait for their ends and decide. A
task that is cancelled while it waits gets its sockets back before it goes on.
"""

import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import NoReturn

import outcome
import trio

from .relay import Copy, CopyEnd, RelayLoop


class RelayThread:
    """Made by `open_relay_thread`; its methods belong to the trio thread that opened it."""

    def __init__(self) -> None:
        self._loop = RelayLoop()
        self._token = trio.lowlevel.current_trio_token()
        self._orders: deque[Callable[[], None]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._loop.watch(self._wake_fd, self._obey)
        self._waiting: set[trio.lowlevel.Task] = set()
        self._crash: BaseException | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    async def run(self, copy: Copy) -> CopyEnd:
        """Copy until the end. When this is cancelled, the sockets are free before Cancelled is raised."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._crash is not None:
            raise RuntimeError("the relay thread has failed") from self._crash
        task = trio.lowlevel.current_task()

        def resume(result: "outcome.Outcome[CopyEnd]") -> None:
            if task in self._waiting:
                self._waiting.remove(task)
                trio.lowlevel.reschedule(task, result)

        def ended(how: CopyEnd) -> None:
            self._token.run_sync_soon(resume, outcome.Value(how))

        def abort_fn(raise_cancel: Callable[[], NoReturn]) -> trio.lowlevel.Abort:
            def let_go() -> None:
                self._loop.stop(copy)
                self._token.run_sync_soon(lambda: resume(outcome.capture(raise_cancel)))

            self._order(let_go)
            return trio.lowlevel.Abort.FAILED

        self._waiting.add(task)
        self._order(lambda: self._loop.start(copy, ended))
        end: CopyEnd = await trio.lowlevel.wait_task_rescheduled(abort_fn)
        return end

    def _order(self, what: Callable[[], None]) -> None:
        self._orders.append(what)
        os.eventfd_write(self._wake_fd, 1)

    def _run(self) -> None:
        try:
            while not self._is_closing:
                self._loop.run_once()
        except BaseException as crash:  # noqa: BLE001 - handed to every task that waits
            self._crash = crash
            try:
                self._token.run_sync_soon(self._give_up, crash)
            except trio.RunFinishedError:
                raise crash from None

    def _obey(self) -> None:
        """In the thread: carry out what has been ordered. An order comes before its wake-up."""
        os.eventfd_read(self._wake_fd)
        while self._orders:
            self._orders.popleft()()

    def _give_up(self, crash: BaseException) -> None:
        for task in self._waiting:
            error = RuntimeError("the relay thread has failed")
            error.__cause__ = crash
            trio.lowlevel.reschedule(task, outcome.Error(error))
        self._waiting.clear()

    async def _close(self) -> None:
        def stop() -> None:
            self._is_closing = True

        self._order(stop)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(self._thread.join)
        self._loop.close()
        os.close(self._wake_fd)


@asynccontextmanager
async def open_relay_thread() -> AsyncIterator[RelayThread]:
    """A running `RelayThread`; it ends with the block, which must have no copy left by then."""
    relays = RelayThread()
    relays._thread.start()
    try:
        yield relays
    finally:
        await relays._close()
