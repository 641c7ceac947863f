# SPDX-License-Identifier: GPL-2.0-or-later
"""The log of the programs in the qubes: one short line for each event, and never a flood.

Names, errors and addresses may come from another qube or from the network. They are escaped, so that nobody
can forge a second line or send control sequences to the reader's terminal. Logging never blocks (`outlet`).
"""

import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress

from .journal import JOURNAL, is_journal, write_entry
from .outlet import STDERR, Outlet

# docs/behaviours.md, 45: one line of at most so many characters, whatever it quotes.
LINE_MAX = 200
# docs/behaviours.md, 34: at most one line in so many seconds for one kind of event.
REPEAT_S = 10.0
# syslog(3): where the journal listens, and a message of the facility user with the severity err.
_SYSLOG = "/dev/log"
_USER_ERROR = 1 << 3 | 3
_NAME = "qubes-forward-service"
# The severity info, which is also what systemd gives the lines of a unit's stderr.
_INFO = 6


def one_line(text: str) -> str:
    """``text`` in printable ASCII on one line of at most 200 characters; ``...`` replaces the rest."""
    # A prefix is enough, as escaping only makes it longer, and it bounds the work for long texts.
    escaped = "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in text[: LINE_MAX + 1])
    return escaped if len(escaped) <= LINE_MAX else escaped[: LINE_MAX - 3] + "..."


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = one_line(f"{record.levelname.lower()}: {record.getMessage()}")
        if record.exc_info is None:
            return line
        return "\n".join([line, *map(one_line, self.formatException(record.exc_info).split("\n"))])


class _NeverWaits(logging.Handler):
    """Writes to stderr as much as that takes without blocking; `_OneLine` bounds the length of lines.

    A record with ``fields`` goes to the ``journal`` under this program's ``name`` instead, if there is a name
    and the journal takes it now.
    """

    def __init__(self, name: str | None, journal: str) -> None:
        super().__init__()
        self._outlet = Outlet()
        self._name = name
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        fields = getattr(record, "fields", None)
        if fields is not None and self._name is not None:
            known = {"MESSAGE": text, "PRIORITY": str(_INFO), "SYSLOG_IDENTIFIER": self._name}
            if write_entry(known | {name: one_line(fields[name]) for name in fields}, self._journal):
                return
        for line in text.split("\n"):
            self._outlet.say(line)


class _Syslog(logging.Handler):
    """Writes to this qube's journal, for a program whose stderr goes to a caller in another qube."""

    def emit(self, record: logging.LogRecord) -> None:
        """Does not block, either; does nothing without a journal."""
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
            journal.setblocking(False)
            journal.connect(_SYSLOG)
            for line in self.format(record).split("\n"):
                journal.send(f"<{_USER_ERROR}>{_NAME}[{os.getpid()}]: {line}".encode("ascii", "replace"))


def start_logging(
    *,
    is_verbose: bool = False,
    is_called: bool = False,
    name: str | None = None,
    journal: str = JOURNAL,
) -> None:
    """Send the log of this process to stderr, which systemd passes to the journal.

    ``is_called``: a qrexec call started the process and reads its stderr, so the log goes to the journal
    directly. ``name``: what the journal calls this program, for records that have fields
    (``extra={"fields": {...}}``); where stderr is not the journal, they are written without.
    """
    if not is_journal(STDERR, os.environ.get("JOURNAL_STREAM")):
        name = None
    handler = _Syslog() if is_called else _NeverWaits(name, journal)
    handler.setFormatter(_OneLine())
    logging.basicConfig(level=logging.DEBUG if is_verbose else logging.INFO, handlers=[handler], force=True)


class RateLimit:
    """Decides for each kind of event whether to log it now, and counts those that are left out.

    It remembers each kind for good, so a kind is one of a few words, and never a text that others choose.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: dict[str, tuple[float, int]] = {}

    def admit(self, kind: str) -> int | None:
        """How many events of this kind were left out since the last line; None to leave out this one, too."""
        now = self._clock()
        last, held_back = self._last.get(kind, (-REPEAT_S, 0))
        if now - last < REPEAT_S:
            self._last[kind] = (last, held_back + 1)
            return None
        self._last[kind] = (now, 0)
        return held_back


Message = str | Callable[[], str]
"""What to log; a function is called only if it is logged."""


def warn(logger: logging.Logger, limit: RateLimit, kind: str, message: Message) -> None:
    """Log a warning, unless one of the same kind was logged just before; the next line then says how many."""
    _log(logger, logging.WARNING, limit, kind, message)


def inform(logger: logging.Logger, limit: RateLimit, kind: str, message: Message) -> None:
    """The same for what is not a problem."""
    _log(logger, logging.INFO, limit, kind, message)


def _log(logger: logging.Logger, level: int, limit: RateLimit, kind: str, message: Message) -> None:
    held_back = limit.admit(kind)
    if held_back is not None:
        text = message if isinstance(message, str) else message()
        logger.log(level, "%s%s", text, f" (and {held_back} more like it)" if held_back else "")
