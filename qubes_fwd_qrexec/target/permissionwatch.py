# SPDX-License-Identifier: GPL-2.0-or-later
"""In a plain loop: a call that dom0 no longer allows ends at once, and one that drains at its deadline."""

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from qubes_fwd_qrexec.relay.loop import READ, End, Loop

# The loop's clock stands still while the machine is suspended, and a deadline does not.
_LOOK_AGAIN_S = 30.0


class Word(Protocol):
    """What dom0 says of a call, as `revocation.Permission` has it."""

    @property
    def drain_left_s(self) -> float | None: ...

    def look(self) -> bool: ...


class PermissionWatch:
    """Looks when it is told to, or when it is time; ``over`` is called once dom0 allows the call no more.

    ``draining`` is called whenever it is seen that the call drains, and ``end`` after a bug.
    """

    def __init__(
        self,
        loop: Loop,
        permission: Word,
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

    @property
    def drains(self) -> bool:
        return self._permission.drain_left_s is not None

    def look(self) -> None:
        """dom0 has said something new."""
        if not self._permission.look():
            self._over()
        elif self.drains:
            self._draining()
            self._look_at_time()

    def _look_at_time(self) -> None:
        left_s = self._permission.drain_left_s
        if left_s is None:
            return
        if left_s <= 0.0:
            self._over()
        else:
            self._loop.after(min(left_s, _LOOK_AGAIN_S), self._look_at_time, self._end)


@contextmanager
def called_on_signals(
    loop: Loop, meanings: dict[signal.Signals, Callable[[], None]], end: End
) -> Iterator[None]:
    """Have the loop call back on signals: between two handlers, and never within one."""
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
