# SPDX-License-Identifier: GPL-2.0-or-later
"""How dom0 ends calls: ``qubes.ForwardRevoke`` in the target, with all that dom0 allows on its stdin.

A call outlives the policy that allowed it. So dom0 sends the whole list of what it still allows
(`allowance`), and every other call of our service in this target ends at once, mux call or single call. The
list is kept with its time, and judges whatever dom0 had allowed before it, also a call whose service begins
only later: the calling qube can keep the agent waiting for as long as it likes.

A call first leaves its note and then looks at the list; the RPC first writes the list and then looks at the
notes. So one of the two sees the other. The process that serves the call is asked to look at the list anew,
and obeys by itself. Who has not obeyed within two seconds is killed: its connections end in RST.

Each mux call that was let in leaves a mark too, when dom0 allowed it: the lease of the caller's other mux
calls to these ports begins anew with it.
"""

import errno
import fcntl
import os
import select
import signal
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from qubes_fwd_qrexec.common.allowance import ALLOWANCE_MAX_BYTES, Allowance, Calls, Revoked
from qubes_fwd_qrexec.common.errors import TextError, why
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.services import REVOKE_SERVICE
from qubes_fwd_qrexec.system.cleanstart import start_clean

from .callnotes import HeldNote, Kind, Note, RevocationError, check_place, directory, left_note, living
from .callstart import TICKS_PER_S, CallStart, boot_ticks

# How old dom0's word may be when a call of its own begins: as old as a mux call's, for no list may have come
# through since. qrexec itself gives both qubes 120 s to connect, and then the caller all the time it likes.
WAIT_S = 300
# What a process is told: that the list has changed.
LOOK = signal.SIGUSR1
_LIST, _ALLOWED = "allowance", "allowed"
# How long those who are to end may take before they are killed, and how often that is looked at.
OBEY_S = 2.0
_LOOK_AGAIN_S = 0.02
# A list that another process writes is written by then, or never.
_LOCK_S = 2.0
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
READ_S = 5.0


class RevokedError(RevocationError):
    """dom0 has taken back that it allowed the call."""


class _List(NamedTuple):
    """What dom0 has said last, and when: in ticks of the kernel."""

    at: int
    allowance: Allowance


def judge(note: Note, at: int, allowance: Allowance) -> Note | None:
    """What becomes of a call by a list of that time: None if it is over, else the note it has then."""
    if note.began > at:
        return note  # it was allowed after the list was made
    if note.calls in allowance.keeps:
        return replace(note, until=0)
    if note.calls in allowance.drains:
        until = at + allowance.drains[note.calls] * TICKS_PER_S
        return replace(note, until=min(until, note.until or until))
    return note if note.until and not allowance.cuts_drains else None


class Permission:
    """What dom0 allows of one call of this process, as long as the call lives."""

    def __init__(self, held: HeldNote) -> None:
        self._held = held

    @property
    def drain_left_s(self) -> float | None:
        """For how many seconds it may go on; None unless it drains."""
        until = self._held.note.until
        return max(0.0, until / TICKS_PER_S - time.clock_gettime(time.CLOCK_BOOTTIME)) if until else None

    def look(self) -> bool:
        """Look at the list again. False if the call is over: it must end now, also in doubt."""
        try:
            told = _read_list(self._held.place)
            note = self._held.note if told is None else judge(self._held.note, *told)
            if note is not None and note.until != self._held.note.until:
                self._held.set_until(note.until)
        except (OSError, RevocationError):
            return False
        return note is not None


@contextmanager
def permitted(
    kind: Kind, calls: Calls, start: CallStart, place: Path, number: int = 0
) -> Iterator[Permission]:
    """A call that dom0 allows, with a note for as long as the block runs.

    Raises `RevokedError` where dom0 has taken its word back since, and `RevocationError` where it could not
    end the call later.
    """
    with left_note(kind, calls, start, place, number) as held:
        told = _read_list(place)
        if told is not None:
            note = judge(held.note, *told)
            if note is None or note.until:
                raise RevokedError(f"{calls}: dom0 has taken back that it allowed this call")
        if kind is Kind.MUX:
            _leave_mark(calls, start, place)
        elif time.monotonic() - start.monotonic_s > WAIT_S:
            raise RevokedError(f"{calls}: dom0 allowed this call more than {WAIT_S} s ago")
        yield Permission(held)


def allowed_s(calls: Calls, place: Path) -> float:
    """When dom0 last allowed a mux call of these calls (`time.monotonic`); 0 where nobody knows."""
    with suppress(OSError, ValueError):
        fd = os.open(_mark(calls, place), os.O_RDONLY | _OPEN)
        try:
            return _marked_ns(fd) / 1e9
        finally:
            os.close(fd)
    return 0.0


def revoke(allowance: Allowance, place: Path, obey_s: float = OBEY_S) -> Revoked:
    """Hold all living calls to what dom0 allows now. Raises `RevocationError` where that did not succeed.

    Calls are ended also where the list itself cannot be written.
    """
    problems: list[str] = []
    at = boot_ticks()
    try:
        check_place(place)
        at = _write_list(allowance, place)
    except OSError as error:
        problems.append(f"{place / _LIST}: {error.strerror}")
    deadline = time.monotonic() + obey_s
    ended: set[tuple[Calls, int, int]] = set()
    told: set[int] = set()
    while True:
        notes = living(place)
        verdicts = [(note, judge(note, at, allowance)) for note in notes]
        unsettled = [note for note, verdict in verdicts if verdict != note]
        ended |= {(note.calls, note.pid, note.number) for note, verdict in verdicts if verdict is None}
        if not unsettled:
            break
        is_late = time.monotonic() >= deadline
        for pid in {note.pid for note in unsettled} - (set() if is_late else told):
            told.add(pid)
            problem = _tell(pid, place, signal.SIGKILL if is_late else LOOK)
            if problem is not None:
                problems.append(problem)
        if time.monotonic() >= deadline + obey_s:
            problems += [f"{note}: goes on" for note in unsettled]
            break
        time.sleep(_LOOK_AGAIN_S)
    if problems:
        raise RevocationError("; ".join(problems))
    return Revoked(len(ended), sum(bool(note.until) for note in notes))


def _tell(pid: int, place: Path, how: signal.Signals) -> str | None:
    """Send a signal to a process that has a note, and to no other of its number; what went wrong."""
    try:
        process_fd = os.pidfd_open(pid)
    except OSError:
        return None  # it is gone, and its notes will be seen to be nobody's
    try:
        # If a note is held after the process was taken hold of, that is the one who holds it.
        if any(note.pid == pid for note in living(place)):
            signal.pidfd_send_signal(process_fd, how)
    except ProcessLookupError:
        return None
    except OSError as error:
        return f"process {pid}: {error.strerror}"
    finally:
        os.close(process_fd)
    return None


def _write_list(allowance: Allowance, place: Path) -> int:
    """Put the list in the place of the one before; its time in ticks. Raises OSError.

    The file's own time is that of the list. Where there is no room for the text the file is empty: it then
    allows nothing of what is older, in doubt, and needs no room.
    """
    text = str(allowance).encode("ascii")
    place_fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    hidden = place / f".{_LIST}+{os.getpid()}"
    try:
        _lock(place_fd)
        at_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        hidden.unlink(missing_ok=True)
        fd = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN, 0o600)
        try:
            if not _is_written(fd, text):
                os.ftruncate(fd, 0)
            os.utime(fd, ns=(at_ns, at_ns))
        finally:
            os.close(fd)
        hidden.rename(place / _LIST)
    except OSError:
        hidden.unlink(missing_ok=True)
        raise
    finally:
        os.close(place_fd)
    return _ticks(at_ns)


def _is_written(fd: int, text: bytes) -> bool:
    """False where there is no room for it. Raises OSError."""
    try:
        return os.write(fd, text) == len(text)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return False
        raise


def _ticks(boot_ns: int) -> int:
    return boot_ns * TICKS_PER_S // 1_000_000_000


def _lock(fd: int) -> None:
    """So that a list is never replaced by an earlier one. In doubt it is written all the same."""
    deadline = time.monotonic() + _LOCK_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOOK_AGAIN_S)
        else:
            return


def _read_list(place: Path) -> _List | None:
    """None where dom0 has said nothing since this qube started. Raises `RevocationError`."""
    path = place / _LIST
    try:
        fd = os.open(path, os.O_RDONLY | _OPEN)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RevocationError(f"{path}: {error.strerror}") from error
    try:
        at = _ticks(_checked(fd).st_mtime_ns)
        with open(fd, "rb", closefd=False) as file:
            text = file.read(ALLOWANCE_MAX_BYTES + 1)
        return _List(at, Allowance.parse(text) if text else Allowance(cuts_drains=True))
    except (OSError, ValueError, TextError) as error:
        raise RevocationError(f"{path}: {why(error)}") from error
    finally:
        os.close(fd)


def _checked(fd: int) -> os.stat_result:
    """Raises ValueError for what is no file of this user."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        raise ValueError("not a file of this user")
    return status


def _mark(calls: Calls, place: Path) -> Path:
    return place / f"{_ALLOWED}+{calls.ports}+{calls.caller}"


def _leave_mark(calls: Calls, start: CallStart, place: Path) -> None:
    """An empty file, whose own time is the mark: it needs no room. Raises `RevocationError`."""
    path = _mark(calls, place)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | _OPEN, 0o600)
        try:
            started_ns = int(start.monotonic_s * 1e9)
            if _marked_ns(fd) < started_ns:
                os.utime(fd, ns=(started_ns, started_ns))
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        raise RevocationError(f"{path}: {why(error)}; the lease of this mux call cannot be kept") from error


def _marked_ns(fd: int) -> int:
    """The time of a mark; 0 for a new file, whose time is that of the wall. Raises OSError, ValueError."""
    marked_ns = _checked(fd).st_mtime_ns
    return marked_ns if marked_ns <= time.monotonic_ns() else 0


def main() -> int:
    """The RPC: what dom0 allows is on stdin, and what came of it goes to stdout."""
    start_clean()
    try:
        if len(sys.argv) > 1 and sys.argv[1]:
            raise TextError(
                sys.argv[1][:80], f"empty: {REVOKE_SERVICE} takes no argument, and a list on stdin"
            )
        print(revoke(Allowance.parse(_read_stdin()), directory()), flush=True)
    except TextError as error:
        print(f"{REVOKE_SERVICE}: {error}", file=sys.stderr)
        return ExitStatus.BAD_ARGUMENT
    except (RevocationError, OSError) as error:
        print(f"{REVOKE_SERVICE}: {error}", file=sys.stderr)
        return ExitStatus.TROUBLE
    return os.EX_OK


def _read_stdin() -> bytes:
    """All of it, or more than there may be. Raises OSError, and TimeoutError where no end comes."""
    deadline = time.monotonic() + READ_S
    poll = select.poll()
    poll.register(0, select.POLLIN)
    received = b""
    while len(received) <= ALLOWANCE_MAX_BYTES:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError(f"the list on stdin has no end after {READ_S:g} s")
        more = os.read(0, ALLOWANCE_MAX_BYTES)
        if not more:
            break
        received += more
    return received


if __name__ == "__main__":
    sys.exit(main())
