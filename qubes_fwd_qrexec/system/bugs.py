# SPDX-License-Identifier: GPL-2.0-or-later
"""Bugs of our own, in programs that carry everybody's connections.

A bug ends what it happened to and nothing else. It is logged with a traceback the first time, and counted,
so that `qvm-forward status` can show that something is wrong. Only unexpected exceptions come here: an error
with a meaning is caught where its meaning is known.
"""

import errno
import itertools
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# In the directory for notes of calls: one byte for each bug in a process of the target's service, as that
# process has ended when dom0 asks.
_FILE = "bugs"
# Counting stops here, so that a recurring bug does not fill /run.
FILE_MAX_BYTES = 100_000


A_BUG = "a bug of this program; its log says more"


class BugError(OSError):
    """Something failed because of a bug, which was logged and counted already."""

    def __init__(self) -> None:
        super().__init__(errno.ENOTRECOVERABLE, A_BUG)


class Bugs:
    """The bugs of one process, noted from any thread. ``noted`` is called for each."""

    def __init__(self, noted: Callable[[], None] = lambda: None) -> None:
        self.count = 0
        self._noted = noted
        self._logged: set[tuple[type[BaseException], str, int | None]] = set()
        # Threads that note one at the same time get a number each.
        self._numbers = itertools.count(1)

    def note(self, bug: BaseException) -> None:
        """Count it, and log it with its traceback unless one of the same kind and place was logged."""
        import logging  # importing these at once would delay each single call of the service
        import traceback

        self.count = next(self._numbers)
        last = traceback.extract_tb(bug.__traceback__)[-1:]
        place = {(type(bug), frame.filename, frame.lineno) for frame in last}
        if not place <= self._logged:
            self._logged |= place
            if not logging.getLogger().handlers:
                from .logs import start_logging  # a called service, which has no log before there is a bug

                start_logging(is_called=True)
            logger = logging.getLogger(__name__)
            logger.error("a bug, which ends what it happened to: %r", bug, exc_info=bug)
        self._noted()

    def guarded(self, end: Callable[[], None], call: Callable[..., None], *arguments: object) -> None:
        """Call ``call``. If it raises, that is a bug, and ``end`` is called to end what it belongs to."""
        try:
            call(*arguments)
        except Exception as bug:  # noqa: BLE001 - this is the one place
            self.ended(bug, end)

    def ended(self, bug: Exception, end: Callable[[], None]) -> None:
        """Note a bug, and call ``end`` to end what it happened to."""
        self.note(bug)
        try:
            end()
        except Exception as another:  # noqa: BLE001
            self.note(another)


def leave(place: "Path") -> None:
    """Count a bug of this qube's service in the directory ``place``; does nothing if that fails."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with suppress(OSError):
        fd = os.open(place / _FILE, flags, 0o600)
        try:
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode) and status.st_size < FILE_MAX_BYTES:
                os.write(fd, b".")
        finally:
            os.close(fd)


def left(place: "Path") -> int:
    """How many bugs of this qube's service are counted in the directory ``place``."""
    try:
        status = (place / _FILE).lstat()
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0
