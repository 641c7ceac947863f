# SPDX-License-Identifier: GPL-2.0-or-later
"""Ends a call in a plain loop: at once if dom0 no longer allows it, at its deadline if it drains."""

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from qubes_fwd_qrexec.relay.loop import READ, End, Loop, Timer

# The loop's clock stands still while the machine is suspended, and a deadline does not.
_LOOK_AGAIN_S = 30.0


class PermissionLike(Protocol):
    """What dom0 allows a call; see `revocation.Permission`."""

    @property
    def drain_left_s(self) -> float | None: ...

    def look(self) -> bool: ...


class PermissionWatch:
    """Checks the permission when `look` is called and at deadlines.

    It calls ``over`` when dom0 no longer allows the call, ``draining`` whenever it finds that the call
    drains, and ``end`` after a bug.
    """

    def __init__(
        self,
        loop: Loop,
        permission: PermissionLike,
        over: Callable[[], None],
        draining: Callable[[], None] = lambda: None,
        *,
        end: End,
    ) -> None:
        self._loop = loop
        self._permission = permission
        self._over = over
        self._draining = draining
        self._end = end
        self._timer: Timer | None = None

    @property
    def drains(self) -> bool:
        return self._permission.drain_left_s is not None

    def look(self) -> None:
        """Check the permission: dom0 has sent a new list."""
        self.stop()
        if not self._permission.look():
            self._over()
        elif self.drains:
            self._draining()
            self._look_at_time()

    def stop(self) -> None:
        """The call is over."""
        if self._timer is not None:
            self._timer.cancel()

    def _look_at_time(self) -> None:
        left_s = self._permission.drain_left_s
        if left_s is None:
            return
        if left_s <= 0.0:
            self._over()
        else:
            self._timer = self._loop.after(min(left_s, _LOOK_AGAIN_S), self._look_at_time, self._end)


@contextmanager
def called_on_signals(
    loop: Loop, meanings: dict[signal.Signals, Callable[[], None]], end: End
) -> Iterator[None]:
    """During the block, have the loop call functions on signals: between handlers, never within one."""
    ours, kernels = socket.socketpair()

    def woken(_events: int) -> None:
        for number in ours.recv(64):
            if number in meanings:
                meanings[signal.Signals(number)]()

    with ours, kernels:
        kernels.setblocking(False)
        loop.watch(ours.fileno(), READ, woken, end)
        before_fd = signal.set_wakeup_fd(kernels.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, lambda _number, _frame: None) for number in meanings}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before_fd)
            loop.unwatch(ours.fileno())
