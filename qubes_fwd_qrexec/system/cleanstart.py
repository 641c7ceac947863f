# SPDX-License-Identifier: GPL-2.0-or-later
"""A program begins as if nobody had started it oddly: with descriptors 0 to 2, and with no signal blocked.

Where one of the three was closed, the next thing that is opened gets its number: what is said on stderr
would go to a client. And Python's print to a stderr that is not there goes to stdout, which is the data.
"""

import os
import signal
import sys
from typing import TextIO


def start_clean() -> None:
    """Before anything is opened. Descriptors that are missing become /dev/null."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free: this one
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            os.set_inheritable(fd, True)
    sys.stdout = sys.stdout or _text_to(1)
    sys.stderr = sys.stderr or _text_to(2)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, nobody can wait for a child


def _text_to(fd: int) -> TextIO:
    return os.fdopen(fd, "w", encoding="ascii", errors="backslashreplace", closefd=False)
