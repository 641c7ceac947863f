# SPDX-License-Identifier: GPL-2.0-or-later
"""What the programs in the qubes say to the journal: one event a line, short, and never a flood.

Names, errors and addresses may come from another qube or from the network. A line shows them escaped,
so that nobody can forge a second line or move the reader's terminal about. And nobody waits for it to be
read (`outlet`).
"""

import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from .outlet import Outlet

# docs/behaviours.md, 45: whatever arrives, one line of at most so many characters.
LINE_MAX = 200
# docs/behaviours.md, 34: at most one line in so many seconds for one kind of trouble.
REPEAT_S = 10.0
# syslog(3): where the journal listens, and a message of the facility user with the severity err.
_JOURNAL = "/dev/log"
_USER_ERROR = 1 << 3 | 3
_NAME = "qubes-forward-service"


def one_line(text: str) -> str:
    """``text`` in printable ASCII on one line of at most 200 characters; the rest shows as ``...``."""
    # A prefix is enough, and it bounds the work for a text of any size: escapes only make it longer.
    escaped = "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in text[: LINE_MAX + 1])
    return escaped if len(escaped) <= LINE_MAX else escaped[: LINE_MAX - 3] + "..."


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = one_line(f"{record.levelname.lower()}: {record.getMessage()}")
        if record.exc_info is None:
            return line
        return "\n".join([line, *map(one_line, self.formatException(record.exc_info).split("\n"))])


class _NeverWaits(logging.Handler):
    """To stderr, as far as that takes it at once; a record's lines are bounded by `_OneLine`."""

    def __init__(self) -> None:
        super().__init__()
        self._outlet = Outlet()

    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).split("\n"):
            self._outlet.say(line)


class _Journal(logging.Handler):
    """The journal of this qube, for a program whose stderr goes to its caller in another one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Not waiting either; where there is no journal, nothing."""
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
            journal.setblocking(False)
            journal.connect(_JOURNAL)
            for line in self.format(record).split("\n"):
                journal.send(f"<{_USER_ERROR}>{_NAME}[{os.getpid()}]: {line}".encode("ascii", "replace"))


def start_logging(*, is_verbose: bool = False, is_called: bool = False) -> None:
    """Send the log of this process to stderr, where systemd takes it up.

    ``is_called``: a qrexec call has started it, and has its stderr; the log goes to the journal.
    """
    handler = _Journal() if is_called else _NeverWaits()
    handler.setFormatter(_OneLine())
    logging.basicConfig(level=logging.DEBUG if is_verbose else logging.INFO, handlers=[handler], force=True)


class RateLimit:
    """Says for each kind of event whether it may be logged now, and how many were held back since."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: dict[str, tuple[float, int]] = {}

    def admit(self, kind: str) -> int | None:
        """The number of events of this kind held back since the last one, or None to hold this back too."""
        now = self._clock()
        last, held_back = self._last.get(kind, (-REPEAT_S, 0))
        if now - last < REPEAT_S:
            self._last[kind] = (last, held_back + 1)
            return None
        self._last[kind] = (now, 0)
        return held_back


def warn(logger: logging.Logger, limit: RateLimit, kind: str, message: str) -> None:
    """Log a warning unless the same kind was logged a moment ago; then the next one says how many."""
    _log(logger, logging.WARNING, limit, kind, message)


def inform(logger: logging.Logger, limit: RateLimit, kind: str, message: str) -> None:
    """The same of what is no trouble."""
    _log(logger, logging.INFO, limit, kind, message)


def _log(logger: logging.Logger, level: int, limit: RateLimit, kind: str, message: str) -> None:
    held_back = limit.admit(kind)
    if held_back is not None:
        logger.log(level, "%s%s", message, f" (and {held_back} more like it)" if held_back else "")
