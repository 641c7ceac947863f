# SPDX-License-Identifier: GPL-2.0-or-later
"""Lines for whoever reads a descriptor, which never wait for them to be read.

stderr may be a pipe that nobody empties: a terminal's log that was stopped, a caller in another qube. What
does not fit there now is left out and counted, and the next line that fits says how many there were.
"""

import os
import select
from contextlib import suppress

STDERR = 2


class Outlet:
    """One descriptor, which stays somebody else's, for as long as the program runs; one thread at a time."""

    def __init__(self, fd: int = STDERR) -> None:
        self.lost = 0
        """Lines that were left out and not told of yet."""
        self._fd = fd
        self._before = ""
        """What ends a line that was cut."""
        if os.isatty(fd):
            # A terminal is called ready with room for one byte. Opened once more it can be told not to wait,
            # which whoever shares this descriptor, such as the shell, must not notice.
            with suppress(OSError):
                self._fd = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLOUT)

    def say(self, line: str) -> None:
        """Write it, if that can be at once: short lines of ASCII are taken as a whole or not at all."""
        if self.lost:
            told = f"warning: {self.lost} lines are missing here, as nobody read what came before"
            if not self._write(told):
                self.lost += 1
                return
            self.lost = 0
        self.lost += not self._write(line)

    def _write(self, line: str) -> bool:
        data = f"{self._before}{line}\n".encode("ascii", "replace")
        count = 0
        with suppress(OSError):
            # Room for a line of this length is what the kernel calls ready (pipe_poll, unix_writable).
            count = os.write(self._fd, data) if self._poll.poll(0) else 0
        if count:
            self._before = "" if count == len(data) else "\n"
        return count == len(data)
