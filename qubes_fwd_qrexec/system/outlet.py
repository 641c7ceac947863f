# SPDX-License-Identifier: GPL-2.0-or-later
"""Writing lines to a descriptor without ever blocking.

stderr may be a pipe that nobody reads: a stopped pager, a caller in another qube. Lines that do not fit are
left out and counted, and the next line that fits says how many there were.
"""

import os
import select
from contextlib import suppress

STDERR = 2


class Outlet:
    """Writes to a descriptor that it does not own, for as long as the program runs; for one thread."""

    def __init__(self, fd: int = STDERR) -> None:
        self.lost = 0
        """How many lines were left out and not reported yet."""
        self._fd = fd
        self._before = ""
        """What ends a line that was cut."""
        if os.isatty(fd):
            # A terminal counts as ready with room for one byte. So it is opened once more in non-blocking
            # mode, which must not affect those who share this descriptor, such as the shell.
            with suppress(OSError):
                self._fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLOUT)

    def say(self, line: str) -> None:
        """Write a line if that is possible at once. Short ASCII lines are never written in part."""
        if self.lost:
            missing = f"warning: {self.lost} lines are missing here, as nobody read what came before"
            if not self._write(missing):
                self.lost += 1
                return
            self.lost = 0
        self.lost += not self._write(line)

    def _write(self, line: str) -> bool:
        data = f"{self._before}{line}\n".encode("ascii", "replace")
        count = 0
        with suppress(OSError):
            # The kernel reports a descriptor as ready if a line of this length fits (pipe_poll,
            # unix_writable).
            count = os.write(self._fd, data) if self._poll.poll(0) else 0
        if count:
            self._before = "" if count == len(data) else "\n"
        return count == len(data)
