# SPDX-License-Identifier: GPL-2.0-or-later
"""A clean start, however the program was started: with descriptors 0 to 2 open and no signal blocked.

If one of the three is closed, the next thing that is opened gets its number, and messages for stderr could go
to a client. And without a stderr, Python's print goes to stdout, which carries data.
"""

import os
import signal
import sys
from typing import TextIO


def start_clean() -> None:
    """Make the start clean; to be called before anything is opened. Missing descriptors become /dev/null."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one
            if null != fd:
                os.dup2(null, fd)
                os.close(null)
            os.set_inheritable(fd, True)
    sys.stdout = sys.stdout or _text_to(1)
    sys.stderr = sys.stderr or _text_to(2)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it is ignored, nobody can wait for a child


def _text_to(fd: int) -> TextIO:
    return os.fdopen(fd, "w", encoding="ascii", errors="backslashreplace", closefd=False)
