# SPDX-License-Identifier: GPL-2.0-or-later
"""SIGTERM and SIGINT as a wish: nothing is interrupted by them, and a wait ends by a descriptor."""

import os
import signal
from types import FrameType


class Ending:
    """While it is entered, both signals set ``is_asked`` and make `fileno` readable, for good."""

    def __init__(self) -> None:
        self.is_asked = False

    def __enter__(self) -> "Ending":
        self._read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # A signal just before a wait would be seen by Python after it; this descriptor is written at once.
        self._wakeup_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        self._handlers = {
            number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_fd)
        os.close(self._read_fd)
        os.close(self._write_fd)

    def fileno(self) -> int:
        return self._read_fd

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.is_asked = True
