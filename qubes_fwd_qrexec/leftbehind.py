# SPDX-License-Identifier: GPL-2.0-or-later
"""What a listener that was stopped still carries: a note in its runtime directory, for whoever asks.

The process that drains has closed its sockets, so nobody can ask it. It rewrites the note as connections
end, and holds a lock on it while it lives: a note that nobody holds is a dead process's, and says nothing.
"""

import fcntl
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from .document import REPORT_MAX_BYTES, Reader, ReportError, dump, load
from .report import FORWARDS_MAX, DrainingReport

_PREFIX = "draining."
# The service that reads it runs as another user.
_MODE = 0o644
# More listeners than this do not drain at once: each has a minute.
_NOTES_MAX = 64


class Note:
    """The note of this process in ``place``. Raises OSError where it cannot be written."""

    def __init__(self, place: Path) -> None:
        self._path = place / f"{_PREFIX}{os.getpid()}"
        self._fd = -1

    def write(self, draining: Iterable[DrainingReport]) -> None:
        """Say what drains now, in place of what was said before."""
        hidden = self._path.with_name(f".{self._path.name}")
        hidden.unlink(missing_ok=True)
        fd = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, _MODE)
        try:
            os.fchmod(fd, _MODE)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(fd, dump({"draining": [forward.as_json() for forward in draining]}))
            hidden.rename(self._path)
        except OSError:
            os.close(fd)
            with suppress(OSError):
                hidden.unlink(missing_ok=True)
            raise
        self._let_go()
        self._fd = fd

    def remove(self) -> None:
        """Nothing drains any more."""
        self._path.unlink(missing_ok=True)
        self._let_go()

    def _let_go(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def left_behind(place: Path) -> tuple[DrainingReport, ...]:
    """What drains in processes that were stopped; notes that cannot be read are passed over."""
    found: list[DrainingReport] = []
    try:
        notes = sorted(path for path in place.iterdir() if path.name.startswith(_PREFIX))
    except OSError:
        return ()
    for path in notes[:_NOTES_MAX]:
        with suppress(OSError, ReportError):
            found += _read(path)
    return tuple(found[:FORWARDS_MAX])


def _read(path: Path) -> tuple[DrainingReport, ...]:
    # Whatever lies there is not waited for: a FIFO has nobody at its other end.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            untrusted = Reader(load(file.read(REPORT_MAX_BYTES + 1)), path.name)
            return untrusted.several("draining", FORWARDS_MAX, DrainingReport.read)
    return ()
