# SPDX-License-Identifier: GPL-2.0-or-later
"""Each live call of our service has a note, by which dom0 finds it: an empty file whose name says everything.

    KIND+PORTS+CALLER+PID.NUMBER+BEGAN+UNTIL

The process that serves the call holds a lock on the note for as long as the call lives. So a note that was
left by a crash is recognized, and never mistaken for that of another process with the same PID. Everything
is in the name, because an empty file can be made on a full disk, and renaming it changes everything at once.
"""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Self

from qubes_fwd_qrexec.common.allowance import Calls
from qubes_fwd_qrexec.common.errors import ForwardError, TextError
from qubes_fwd_qrexec.common.values import Proto, TargetPorts, parse_number, parse_qube_name

from .callstart import CallStart

# Made by the package (tmpfiles.d), for the user that qrexec services run as; a lab sets another one.
DIRECTORY = "/run/qubes-forward"
DIRECTORY_VARIABLE = "QUBES_FORWARD_RUN_DIR"
# Nobody else may write to the directory: a foreign note could name any process of ours.
_WRITABLE_TO_OTHERS = stat.S_IWGRP | stat.S_IWOTH
# Notes come and go during a look, so it is repeated until it sees a consistent state, or this many times.
_PASSES_MAX = 50
# Never block on something that is not a file: opening a FIFO would.
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class RevocationError(ForwardError):
    """A call cannot have a note, dom0 has ended it, or dom0 could not end it."""


class Kind(StrEnum):
    """What a call carries: connections of TCP, flows of UDP, or one connection."""

    MUX = "mux"
    UDP = "udp"
    SINGLE = "call"

    @property
    def proto(self) -> Proto:
        return Proto.UDP if self is Kind.UDP else Proto.TCP


@dataclass(frozen=True, slots=True)
class Note:
    """One live call: what it is, which process serves it, and when dom0 allowed it.

    ``number`` tells the calls of one process apart. ``began`` and ``until`` are in kernel ticks
    (`callstart`); ``until`` is when a draining call is cut, and 0 for one that does not drain.
    """

    kind: Kind
    calls: Calls
    pid: int
    number: int
    began: int
    until: int = 0

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """Parse the name of a note; None for any other name."""
        try:
            kind, ports, caller, process, began, until = name.split("+")
            pid, number = process.split(".")
            calls = Calls(TargetPorts.parse(ports), parse_qube_name(caller), Kind(kind).proto)
            numbers = map(parse_number, (pid, number, began, until))
            note = cls(Kind(kind), calls, *numbers)
        except (ValueError, TextError):
            return None
        return note if str(note) == name else None

    def __str__(self) -> str:
        calls = self.calls
        return f"{self.kind}+{calls.ports}+{calls.caller}+{self.pid}.{self.number}+{self.began}+{self.until}"


class HeldNote:
    """A note of this process, which exists as long as the call lives."""

    def __init__(self, note: Note, place: Path) -> None:
        self.note = note
        self.place = place

    def set_until(self, until: int) -> None:
        """Set when the call is cut, in kernel ticks; 0 if it does not drain. Raises OSError."""
        note = replace(self.note, until=until)
        (self.place / str(self.note)).rename(self.place / str(note))
        self.note = note


def directory() -> Path:
    """The directory with the notes of this qube's calls."""
    return Path(os.environ.get(DIRECTORY_VARIABLE, DIRECTORY))


@contextmanager
def left_note(kind: Kind, calls: Calls, start: CallStart, place: Path, number: int = 0) -> Iterator[HeldNote]:
    """Keep a note of a call of this process for as long as the block runs.

    Raises `RevocationError` if it cannot be made, and leaves nothing behind then: the call must not be
    served, as dom0 could not end it.
    """
    held = HeldNote(Note(kind, calls, os.getpid(), number, start.boot_ticks), place)
    with ExitStack() as undo:
        try:
            check_place(place)
            # Locked before anybody can see it, as a note without a lock counts as left by a crash.
            hidden = place / f".{held.note}"
            fd = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN, 0o600)
            undo.callback(os.close, fd)
            undo.callback(hidden.unlink, missing_ok=True)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            hidden.rename(place / str(held.note))
            undo.callback(_remove, held)
        except OSError as error:
            raise RevocationError(
                f"{place / str(held.note)}: {error.strerror}; dom0 could not end this call"
            ) from error
        yield held


def _remove(held: HeldNote) -> None:
    (held.place / str(held.note)).unlink(missing_ok=True)


def living(place: Path) -> list[Note]:
    """Return the notes of live calls, and remove those left by crashes. Raises `RevocationError`."""
    notes: list[Note] = []
    for _ in range(_PASSES_MAX):
        notes = []
        is_whole = True
        try:
            names = os.listdir(place)
        except FileNotFoundError:
            return []  # no call yet
        except OSError as error:
            raise RevocationError(f"{place}: {error.strerror}") from error
        for name in names:
            note = Note.parse(name)
            if note is None:
                continue
            try:
                if is_held(place / name):
                    notes.append(note)
            except FileNotFoundError:
                is_whole = False  # its call has ended, or has begun to drain, which changes the name
        if is_whole:
            break
    return notes


def is_held(path: Path) -> bool:
    """Whether a live process holds the note; if not, the note is removed. Raises FileNotFoundError.

    Something that is no file of this user is no note, and stays.
    """
    try:
        fd = os.open(path, os.O_RDONLY | _OPEN)
    except FileNotFoundError:
        raise
    except OSError:
        return False
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return False
        # A shared lock: two processes that look at once must not take each other for the note's holder.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    with suppress(OSError):
        path.unlink()
    return False


def _made(place: Path) -> os.stat_result:
    try:
        with suppress(FileExistsError):
            place.mkdir(mode=0o700)
    except OSError as error:
        problem = f"the directory for notes of calls is missing, and cannot be made: {error.strerror}"
        raise RevocationError(f"{place}: {problem}") from error
    return place.lstat()


def check_place(place: Path) -> None:
    """Make the directory if it is missing.

    Raises `RevocationError` unless it is there and only we can write to it, and OSError.
    """
    try:
        status = place.lstat()
    except FileNotFoundError:
        status = _made(place)
    if not stat.S_ISDIR(status.st_mode):
        raise RevocationError(f"{place}: not a directory for notes of calls")
    if status.st_uid != os.geteuid() or status.st_mode & _WRITABLE_TO_OTHERS:
        raise RevocationError(f"{place}: must belong to the user of this process, and nobody else may write")
