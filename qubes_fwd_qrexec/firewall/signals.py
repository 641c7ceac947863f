# SPDX-License-Identifier: GPL-2.0-or-later
"""The signals that this program obeys, as something to wait for."""

import signal
import socket
from typing import Self

STOP = {signal.SIGTERM, signal.SIGINT}


class Signals:
    """Readable when a signal has come: SIGTERM and SIGINT end the program, SIGHUP makes it read again."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        for end in (self._ours, self._theirs):
            end.setblocking(False)
        signal.set_wakeup_fd(self._theirs.fileno())
        self._before = {n: signal.signal(n, lambda *_: None) for n in (*STOP, signal.SIGHUP)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self._ours.close()
        self._theirs.close()

    def fileno(self) -> int:
        return self._ours.fileno()

    def take(self) -> set[int]:
        """The signals that have come since the last call."""
        try:
            return set(self._ours.recv(4096))  # set_wakeup_fd: a byte for each, its number
        except BlockingIOError:
            return set()
