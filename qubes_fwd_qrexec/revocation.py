# SPDX-License-Identifier: GPL-2.0-or-later
"""How dom0 ends the tunnels of a forward: ``qubes.ForwardRevoke+PORTS+SOURCE``, in the target.

A tunnel outlives the policy that allowed it, and its lease ends only new streams. So each tunnel of the
target leaves a note in a directory of this qube: which ports, for which caller, which process. The RPC,
which only dom0 may call, finds the notes that fit and asks those processes to end: at once, or with
``+drain`` behind the source when their last connection ends, and to take no new one.

A tunnel that dom0 allowed just before, and that has not left its note yet, would be missed. So the RPC
leaves a mark with the time first, and a tunnel whose process is older than the mark ends itself. What is
left is the moment between dom0's word and the start of the process.

Each tunnel that was not revoked leaves a mark too: dom0 has just allowed this caller these ports. It
begins the lease of the caller's other tunnels to them anew.
"""

import fcntl
import os
import signal
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Self

from .errors import ForwardError, TextError
from .exitstatus import ExitStatus
from .rules import OnExpire
from .values import QubeName, TargetPorts, parse_number, parse_qube_name

SERVICE = "qubes.ForwardRevoke"
# Made by the package (tmpfiles.d), for the user that qrexec services run as; a lab names another.
DIRECTORY = "/run/qubes-forward"
DIRECTORY_VARIABLE = "QUBES_FORWARD_RUN_DIR"
_REVOKED, _ALLOWED = "revoked", "allowed"
# What a tunnel's process is told.
SIGNALS = {OnExpire.CUT: signal.SIGTERM, OnExpire.DRAIN: signal.SIGUSR1}
# What anybody else may not do to the directory: a foreign note could name any process of ours.
_WRITABLE_TO_OTHERS = stat.S_IWGRP | stat.S_IWOTH
# proc_pid_stat(5): starttime is field 22, and the second field, in parentheses, may hold blanks.
_START_TIME_AFTER_NAME = 22 - 3


class RevocationError(ForwardError):
    """A tunnel cannot be noted, or could not be ended."""


class _Note(NamedTuple):
    """A note is the name of an empty file, ``PORTS+SOURCE+PID``."""

    ports: TargetPorts
    source: QubeName
    pid: int

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """None for the name of any other file."""
        try:
            ports, source, pid = name.split("+")
            note = cls(TargetPorts.parse(ports), parse_qube_name(source), parse_number(pid))
        except (ValueError, TextError):
            return None
        return note if str(note) == name else None

    def __str__(self) -> str:
        return f"{argument(self.ports, self.source)}+{self.pid}"


def directory() -> Path:
    """Where this qube's tunnels leave their notes."""
    return Path(os.environ.get(DIRECTORY_VARIABLE, DIRECTORY))


def argument(ports: TargetPorts, source: QubeName, how: OnExpire = OnExpire.CUT) -> str:
    """What the RPC is called with to end all tunnels to exactly these ports that ``source`` has opened."""
    return f"{ports}+{source}" if how is OnExpire.CUT else f"{ports}+{source}+{how}"


def parse_argument(untrusted_argument: str) -> tuple[TargetPorts, QubeName, OnExpire]:
    """The one spelling that `argument` makes. Raises `TextError`."""
    untrusted_ports, _, rest = untrusted_argument.partition("+")
    untrusted_source, plus, _ = rest.partition("+")
    ports, source = TargetPorts.parse(untrusted_ports), parse_qube_name(untrusted_source)
    how = OnExpire.DRAIN if plus else OnExpire.CUT
    if argument(ports, source, how) != untrusted_argument:
        raise TextError(untrusted_argument, "PORT-PORT+QUBE, the ports as two, and perhaps +drain")
    return ports, source, how


@contextmanager
def noted(ports: TargetPorts, source: QubeName, place: Path) -> Iterator[None]:
    """Leave a note about this process for as long as the block runs.

    The process holds a lock on its note, so that a note outlived by a crash is never taken for another
    process of the same number. Raises `RevocationError`: a tunnel that could not be ended must not be, nor
    one that was revoked while this process started.
    """
    note = _Note(ports, source, os.getpid())
    path = place / str(note)
    hidden = place / f".{note}"
    with ExitStack() as undo:
        try:
            _check_place(place)
            # Locked before it is seen: who finds a note that nobody holds takes it for a dead one's.
            fd = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            undo.callback(os.close, fd)
            undo.callback(hidden.unlink, missing_ok=True)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            hidden.rename(path)
            undo.callback(path.unlink, missing_ok=True)
            # In this order, and the RPC's is the reverse: one of the two sees what the other has left.
            started_s = _started_s()
            is_revoked = started_s <= _marked_s(_mark(_REVOKED, ports, source, place))
            if not is_revoked:
                _leave_mark(_mark(_ALLOWED, ports, source, place), started_s)
        except OSError as error:
            raise RevocationError(f"{path}: {error.strerror}; dom0 could not end this tunnel") from error
        if is_revoked:
            raise RevocationError(f"{path}: revoked by dom0 while it started")
        yield


def allowed_s(ports: TargetPorts, source: QubeName, place: Path) -> float:
    """When dom0 last allowed ``source`` a tunnel to these ports, in seconds since the start of this qube.

    0 where that cannot be known: then nothing is longer allowed because of it.
    """
    try:
        return _marked_s(_mark(_ALLOWED, ports, source, place))
    except (OSError, RevocationError):
        return 0.0


def revoke(ports: TargetPorts, source: QubeName, place: Path, how: OnExpire = OnExpire.CUT) -> int:
    """End the tunnels to these ports that ``source`` has opened; how many they were.

    Notes of dead processes are removed, whatever their ports. Raises `RevocationError` in the end if
    anything went wrong on the way.
    """
    try:
        _check_place(place)
        _leave_mark(_mark(_REVOKED, ports, source, place), time.clock_gettime(time.CLOCK_BOOTTIME))
        notes = [note for path in place.iterdir() if (note := _Note.parse(path.name)) is not None]
    except OSError as error:
        raise RevocationError(f"{place}: {error.strerror}") from error
    ended = 0
    problems = []
    for note in notes:
        try:
            is_meant = (note.ports, note.source) == (ports, source)
            ended += _end(note, place, SIGNALS[how] if is_meant else None)
        except OSError as error:
            problems.append(f"{place / str(note)}: {error.strerror}")
    if problems:
        raise RevocationError("; ".join(problems))
    return ended


def tunnels(place: Path) -> Iterator[tuple[TargetPorts, QubeName]]:
    """Ports and source of every tunnel that lives now. Raises `RevocationError`."""
    try:
        notes = [note for path in place.iterdir() if (note := _Note.parse(path.name)) is not None]
        for note in notes:
            with suppress(FileNotFoundError), (place / str(note)).open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    yield note.ports, note.source
    except FileNotFoundError:
        return  # there never was a tunnel
    except OSError as error:
        raise RevocationError(f"{place}: {error.strerror}") from error


def _end(note: _Note, place: Path, how: signal.Signals | None) -> bool:
    """Whether the note's process lived and was told to end; the note of a dead one is removed."""
    with ExitStack() as undo:
        process_fd = None
        with suppress(ProcessLookupError):
            # Before the look at the lock: if that is held after this, this is the one who holds it.
            process_fd = os.pidfd_open(note.pid)
            undo.callback(os.close, process_fd)
        path = place / str(note)
        try:
            note_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return False
        undo.callback(os.close, note_fd)
        try:
            # Shared, for two revocations at once would take each other for the note's process.
            fcntl.flock(note_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            if process_fd is None or how is None:
                return False
            try:
                signal.pidfd_send_signal(process_fd, how)
            except ProcessLookupError:
                return False
            return True
        path.unlink(missing_ok=True)
        return False


def _check_place(place: Path) -> None:
    """Make the directory if it is missing.

    Raises OSError, or `RevocationError` unless it is there and ours alone.
    """
    try:
        with suppress(FileExistsError):
            place.mkdir(mode=0o700)
    except OSError as error:
        problem = f"the directory for notes of tunnels is missing, and cannot be made: {error.strerror}"
        raise RevocationError(f"{place}: {problem}") from error
    status = place.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise RevocationError(f"{place}: not a directory")
    if status.st_uid != os.geteuid() or status.st_mode & _WRITABLE_TO_OTHERS:
        raise RevocationError(f"{place}: must belong to the user of this process, and nobody else may write")


def _mark(kind: str, ports: TargetPorts, source: QubeName, place: Path) -> Path:
    return place / f"{kind}+{argument(ports, source)}"


def _leave_mark(path: Path, at_s: float) -> None:
    hidden = path.with_name(f".{path.name}+{os.getpid()}")
    hidden.write_text(repr(at_s), encoding="ascii")
    hidden.rename(path)


def _marked_s(path: Path) -> float:
    """The time of a mark, in seconds since the start of this qube; 0 where there is none."""
    try:
        return float(path.read_text(encoding="ascii"))
    except FileNotFoundError:
        return 0.0
    except ValueError as error:
        raise RevocationError(f"{path}: not a time") from error


def _started_s() -> float:
    """When this process was started, rounded down to a tick of the kernel, in seconds since the start."""
    fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    return int(fields[_START_TIME_AFTER_NAME]) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    """The RPC: ``argv[1]`` is its argument. Says on stdout how many tunnels were ended."""
    try:
        ports, source, how = parse_argument(sys.argv[1] if len(sys.argv) == 2 else "")
        print(revoke(ports, source, directory(), how))
    except TextError as error:
        print(f"{SERVICE}: {error}", file=sys.stderr)
        return ExitStatus.BAD_ARGUMENT
    except RevocationError as error:
        print(f"{SERVICE}: {error}", file=sys.stderr)
        return ExitStatus.TROUBLE
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main())
