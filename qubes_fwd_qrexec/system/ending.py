# SPDX-License-Identifier: GPL-2.0-or-later
"""SIGTERM and SIGINT as a wish: they interrupt nothing, and end a wait."""

import os
import select
import signal
import threading


class Ending:
    """While it is entered, either signal makes `fileno` readable, for good. It has a pipe of its own.

    Python takes up signals in the main thread alone; another one is never interrupted, nor told.
    """

    def __enter__(self) -> "Ending":
        self._read_fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._is_told = threading.current_thread() is threading.main_thread()
        if not self._is_told:
            return self
        # Written at once: a signal just before a wait would be seen by Python's own handler only after it.
        self._wakeup_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        numbers = (signal.SIGTERM, signal.SIGINT)
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_told:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._wakeup_fd)
        os.close(self._read_fd)
        os.close(self._write_fd)

    def fileno(self) -> int:
        return self._read_fd

    def is_asked(self, within_s: float = 0.0) -> bool:
        """Whether the end is asked for by now, or within some seconds, for which it waits."""
        return bool(select.select([self], [], [], within_s)[0])
