# SPDX-License-Identifier: GPL-2.0-or-later
"""A socket that a loop watches for just the events that matter now, and one timer beside it."""

import socket
from collections.abc import Callable

from .loop import Loop, Timer

# In place of a mask: the kernel is not asked about the socket at all.
UNWATCHED = -1


class WatchedSocket:
    """A base class. A subclass says what to do in `on_ready`, `_on_unwatchable` and `fail`.

    ``sock`` is non-blocking. It is unwatched at first, and must be again before it is closed.
    """

    __slots__ = ("_loop", "_mask", "_timer", "sock")

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        self._loop = loop
        self._mask = UNWATCHED
        self._timer: Timer | None = None
        self.sock = sock

    @property
    def is_watched(self) -> bool:
        """Whether the kernel tells anything of it, be it only that the peer is gone."""
        return self._mask != UNWATCHED

    def on_ready(self, events: int) -> None:
        raise NotImplementedError

    def _on_unwatchable(self) -> None:
        """The kernel can watch no more sockets; called at the end of the turn."""
        raise NotImplementedError

    def fail(self) -> None:
        """A handler raised: end what the socket is for, whatever state that is in."""
        raise NotImplementedError

    def _after(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Call ``callback`` once, in ``delay_s`` seconds, and forget the one before."""
        self._cancel_timer()
        self._timer = self._loop.after(delay_s, callback, self.fail)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _watch_too(self, more: int) -> None:
        self._watch((0 if self._mask == UNWATCHED else self._mask) | more)

    def _watch(self, mask: int) -> None:
        """Watch for ``mask``; with 0 the kernel still says when the peer is gone."""
        if mask == self._mask:
            return
        loop, fd = self._loop, self.sock.fileno()
        if mask == UNWATCHED:
            loop.unwatch(fd)
        elif self._mask != UNWATCHED:
            loop.change(fd, mask)
        else:
            try:
                loop.watch_for(self, fd, mask)
            except OSError:
                loop.soon(self._on_unwatchable, self.fail)
                return
        self._mask = mask
