# SPDX-License-Identifier: GPL-2.0-or-later
"""A plain epoll loop: it calls handlers when sockets are ready or deadlines pass.

Bytes are moved here and not in trio tasks, because waking a task costs more than moving what it waits
for (docs/numbers.md). `RelayThread` runs a loop beside trio; the service in the target runs one alone.

All connections share the loop, so each handler comes with a function that ends what it belongs to: a bug in
the handler ends that and nothing else.
"""

import heapq
import itertools
import select
import time
from collections.abc import Callable
from typing import Protocol

from qubes_fwd_qrexec.system.bugs import Bugs

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
GONE = select.EPOLLERR | select.EPOLLHUP

# How many are served in one turn; the kernel goes round, so that none is passed over.
_EVENTS_MAX = 256

Handler = Callable[[int], None]
End = Callable[[], None]
"""Ends what a handler belongs to, after a bug in it; it may be called in any state."""


class Watched(Protocol):
    """What is served when a descriptor is ready."""

    def on_ready(self, events: int) -> None:
        """Serve it; ``events`` are what the kernel says."""

    def fail(self) -> None:
        """There was a bug in that: end what it belongs to. It may be called in any state."""


class _Handlers:
    """Two functions in place of an object that has them."""

    __slots__ = ("fail", "on_ready")

    def __init__(self, handler: Handler, end: End) -> None:
        self.on_ready = handler
        self.fail = end


class Timer:
    """A callback that is due at a time, unless `cancel` is called before."""

    __slots__ = ("callback", "end")

    def __init__(self, callback: Callable[[], None], end: End) -> None:
        self.callback: Callable[[], None] | None = callback
        self.end: End | None = end

    def cancel(self) -> None:
        """It keeps nothing of what it was for, although the loop keeps it until it is due."""
        self.callback = self.end = None


class Loop:
    """Handlers by file descriptor, timers, and callbacks for the end of a turn; for one thread.

    `close` it when nothing is watched any more.
    """

    def __init__(self, bugs: Bugs | None = None) -> None:
        self.bugs = bugs or Bugs()
        self.guarded = self.bugs.guarded
        """Calls a function that may fail by itself, given what ends it then."""
        self._epoll = select.epoll()
        # By descriptor, which the kernel keeps small: a dictionary would take six times as much for each.
        self._watched: list[Watched | None] = []
        self._new: set[int] = set()
        """Those that are watched since this turn began."""
        self.turn = 0
        """The number of this turn."""
        self.served = 0
        """How many descriptors this turn serves. The output of a lone one need not wait for the turn's end,
        and where there are many, each should do less."""
        self._soon: list[tuple[Callable[[], None], End]] = []
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()

    def close(self) -> None:
        """Close its own descriptor; those it watches are their owners'."""
        self._epoll.close()

    def fileno(self) -> int:
        """A descriptor that is readable while something it watches is ready."""
        return self._epoll.fileno()

    @property
    def watched(self) -> frozenset[int]:
        """The descriptors that it watches now."""
        return frozenset(fd for fd, watched in enumerate(self._watched) if watched is not None)

    @property
    def timers_left(self) -> int:
        """How many callbacks are due at a later time, without those that were cancelled."""
        return sum(timer.callback is not None for _, _, timer in self._timers)

    def watch(self, fd: int, mask: int, handler: Handler, end: End) -> None:
        """Call ``handler`` with the events whenever one of ``mask`` or `GONE` occurs.

        Raises OSError when the kernel can watch no more descriptors.
        """
        self.watch_for(_Handlers(handler, end), fd, mask)

    def watch_for(self, watched: Watched, fd: int, mask: int) -> None:
        """The same for an object, of which nothing is kept but a reference."""
        self._epoll.register(fd, mask)
        if fd >= len(self._watched):
            self._watched += [None] * (fd + 1 - len(self._watched))
        self._watched[fd] = watched
        self._new.add(fd)

    def change(self, fd: int, mask: int) -> None:
        self._epoll.modify(fd, mask)

    def unwatch(self, fd: int) -> None:
        """Stop watching; to be called before the descriptor is closed."""
        self._epoll.unregister(fd)
        self._watched[fd] = None

    def soon(self, callback: Callable[[], None], end: End) -> None:
        """Call ``callback`` at the end of this turn, when every ready descriptor has been served."""
        self._soon.append((callback, end))

    def after(self, delay_s: float, callback: Callable[[], None], end: End) -> Timer:
        """Call ``callback`` once ``delay_s`` seconds have passed."""
        timer = Timer(callback, end)
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._order), timer))
        return timer

    def run_once(self, timeout_s: float | None = None) -> None:
        """One turn: wait at most ``timeout_s`` until something is ready or due, and serve all of it."""
        if self._soon:
            timeout_s = 0.0
        elif self._timers:
            due_s = self._timers[0][0] - time.monotonic()
            if due_s < 0.0:
                due_s = 0.0
            if timeout_s is None or due_s < timeout_s:
                timeout_s = due_s
        news = self._epoll.poll(timeout_s, _EVENTS_MAX)
        self.turn += 1
        self._new.clear()
        due = self._take_due() if self._timers and self._timers[0][0] <= time.monotonic() else ()
        self.served = len(news)
        for fd, events in news:
            # A descriptor watched since this turn began may have the number of one that was closed in this
            # turn: the event was about that one.
            watched = self._watched[fd]
            if watched is not None and fd not in self._new:
                try:
                    watched.on_ready(events)
                except Exception as bug:  # noqa: BLE001 - as in `guarded`, without another call
                    self.bugs.ended(bug, watched.fail)
        for timer in due:
            if timer.callback is not None and timer.end is not None:
                self.guarded(timer.end, timer.callback)
        while self._soon:
            callbacks, self._soon = self._soon, []
            for callback, end in callbacks:
                self.guarded(end, callback)

    def _take_due(self) -> list[Timer]:
        """Take the timers of this turn; one that is set in it, with no delay, is due in the next."""
        now = time.monotonic()
        due = []
        while self._timers and self._timers[0][0] <= now:
            due.append(heapq.heappop(self._timers)[2])
        return due
