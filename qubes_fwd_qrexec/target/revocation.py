# SPDX-License-Identifier: GPL-2.0-or-later
"""How dom0 ends calls: ``qubes.ForwardRevoke`` in the target, with everything that dom0 allows on its stdin.

A call outlives the policy that allowed it. So dom0 sends the complete list of what it still allows
(`allowance`), and every other call of our service in this target ends at once, mux call or single call. The
list is kept with its time. It applies to every call that dom0 had allowed before, even if the call's service
starts later: the calling qube can keep the agent waiting for as long as it likes.

A call first makes its note and then reads the list; the RPC first writes the list and then reads the notes.
So at least one of them sees the other. The process that serves a call is sent a signal to read the list
again, and ends the call itself. A process that has not done so within two seconds is killed: its connections
end with RST.

Each mux call that was let in also leaves a mark with the time at which dom0 allowed it, as it renews the
lease of the caller's other mux calls to the same ports.
"""

import errno
import fcntl
import math
import os
import select
import signal
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from qubes_fwd_qrexec.common.allowance import ALLOWANCE_MAX_BYTES, Allowance, Calls, Revoked
from qubes_fwd_qrexec.common.errors import TextError, why
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.services import REVOKE_SERVICE
from qubes_fwd_qrexec.common.values import Proto
from qubes_fwd_qrexec.system.cleanstart import start_clean

from .callnotes import HeldNote, Kind, Note, RevocationError, check_place, directory, left_note, living
from .callstart import TICKS_PER_S, CallStart, boot_ticks

# How long after dom0 allowed it a single call may begin: as long as a lease, as no list may have arrived
# since. qrexec itself gives both qubes 120 s to connect, and then the caller as long as it likes.
WAIT_S = 300
# Tells a process that the list has changed.
LOOK = signal.SIGUSR1
_LIST, _ALLOWED = "allowance", "allowed"
# How long calls may take to end before their processes are killed, and how often to check.
OBEY_S = 2.0
_LOOK_AGAIN_S = 0.02
# How long to wait for another process that is writing a list.
_LOCK_S = 2.0
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
READ_S = 5.0


class RevokedError(RevocationError):
    """dom0 no longer allows the call."""


class _List(NamedTuple):
    """The last list from dom0, and when it came, in kernel ticks."""

    at: int
    allowance: Allowance


def judge(note: Note, at: int, allowance: Allowance) -> Note | None:
    """Apply a list of the time ``at`` to a call. Returns its new note, or None if it is over."""
    if note.began > at:
        return note  # it was allowed after the list was made
    if note.calls in allowance.keeps:
        return replace(note, until=0)
    if note.calls in allowance.drains:
        until = at + allowance.drains[note.calls] * TICKS_PER_S
        return replace(note, until=min(until, note.until or until))
    return note if note.until and not allowance.cuts_drains else None


class Permission:
    """What dom0 allows one call of this process, while the call lives."""

    def __init__(self, held: HeldNote) -> None:
        self._held = held

    @property
    def drain_left_s(self) -> float | None:
        """For how many seconds it may go on draining; None if it does not drain."""
        until = self._held.note.until
        return max(0.0, until / TICKS_PER_S - time.clock_gettime(time.CLOCK_BOOTTIME)) if until else None

    def look(self) -> bool:
        """Read the list again. Returns False if the call must end now, also in doubt."""
        try:
            last = _read_list(self._held.place)
            note = self._held.note if last is None else judge(self._held.note, *last)
            if note is not None and note.until != self._held.note.until:
                self._held.set_until(note.until)
        except (OSError, RevocationError):
            return False
        return note is not None


@contextmanager
def permitted(
    kind: Kind, calls: Calls, start: CallStart, place: Path, number: int = 0
) -> Iterator[Permission]:
    """Keep a note of a call for as long as the block runs, if dom0 still allows the call.

    Raises `RevokedError` if dom0 no longer allows it, and `RevocationError` if dom0 could not end it later.
    """
    with left_note(kind, calls, start, place, number) as held:
        last = _read_list(place)
        if last is not None:
            note = judge(held.note, *last)
            if note is None or note.until:
                raise RevokedError(f"{calls}: dom0 no longer allows this call")
        if kind is not Kind.SINGLE:
            _leave_mark(calls, start, place)
        elif time.monotonic() - start.monotonic_s > WAIT_S:
            raise RevokedError(f"{calls}: dom0 allowed this call more than {WAIT_S} s ago")
        yield Permission(held)


def allowed_s(calls: Calls, place: Path) -> float:
    """When dom0 last allowed such a mux call (`time.monotonic`); -inf if that is unknown."""
    with suppress(OSError, ValueError):
        fd = os.open(_mark(calls, place), os.O_RDONLY | _OPEN)
        try:
            return _marked_s(fd)
        finally:
            os.close(fd)
    return -math.inf


def revoke(allowance: Allowance, place: Path, obey_s: float = OBEY_S) -> Revoked:
    """End all live calls that dom0 no longer allows. Raises `RevocationError` if that did not fully succeed.

    Calls are ended even if the list itself cannot be written. It takes up to twice ``obey_s`` seconds.
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
    signalled: set[int] = set()
    is_killing = False
    while True:
        is_over = time.monotonic() >= deadline  # before looking, as this process too may have to wait
        notes = living(place)
        verdicts = [(note, judge(note, at, allowance)) for note in notes]
        unsettled = [note for note, verdict in verdicts if verdict != note]
        ended |= {(note.calls, note.pid, note.number) for note, verdict in verdicts if verdict is None}
        if not unsettled:
            break
        if is_over and is_killing:
            problems += [f"{note}: does not end" for note in unsettled]
            break
        is_killing = is_killing or is_over
        for pid in {note.pid for note in unsettled} - (set() if is_killing else signalled):
            signalled.add(pid)
            problem = _signal(pid, place, signal.SIGKILL if is_killing else LOOK)
            if problem is not None:
                problems.append(problem)
        if is_over:
            deadline = time.monotonic() + obey_s
        time.sleep(_LOOK_AGAIN_S)
    if problems:
        raise RevocationError("; ".join(problems))
    return Revoked(len(ended), sum(bool(note.until) for note in notes))


def _signal(pid: int, place: Path, how: signal.Signals) -> str | None:
    """Send a signal to a process that has a note, and to no other with its PID. Returns what went wrong."""
    try:
        process_fd = os.pidfd_open(pid)
    except OSError:
        return None  # it is gone, which the next look at its notes will find out
    try:
        # If its note is held after the pidfd was opened, this is the process that holds it.
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
    """Replace the list. Returns its time in kernel ticks. Raises OSError.

    The time of the list is the file's modification time. On a full disk the file is empty, which allows no
    older call, to be safe.
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
    """Write the text. Returns False if the disk is full. Raises OSError."""
    try:
        return os.write(fd, text) == len(text)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return False
        raise


def _ticks(boot_ns: int) -> int:
    return boot_ns * TICKS_PER_S // 1_000_000_000


def _lock(fd: int) -> None:
    """Lock, so that no list is replaced by an earlier one; but not for ever, as the list must be written."""
    deadline = time.monotonic() + _LOCK_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOOK_AGAIN_S)
        else:
            return


def _read_list(place: Path) -> _List | None:
    """The last list; None if dom0 has sent none since this qube started. Raises `RevocationError`."""
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
        return _List(at, _parsed(text) if text else Allowance(cuts_drains=True))
    except (OSError, ValueError, TextError) as error:
        raise RevocationError(f"{path}: {why(error)}") from error
    finally:
        os.close(fd)


@lru_cache(1)
def _parsed(text: bytes) -> Allowance:
    """A process that serves many calls looks at the same list for each, which may name thousands."""
    return Allowance.parse(text)


def _checked(fd: int) -> os.stat_result:
    """Raises ValueError unless it is a regular file of this user."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        raise ValueError("not a file of this user")
    return status


def _mark(calls: Calls, place: Path) -> Path:
    proto = f"{calls.proto}+" if calls.proto is not Proto.TCP else ""
    return place / f"{_ALLOWED}+{proto}{calls.ports}+{calls.caller}"


def _leave_mark(calls: Calls, start: CallStart, place: Path) -> None:
    """Make an empty file with the mark as its modification time. Raises `RevocationError`."""
    path = _mark(calls, place)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | _OPEN, 0o600)
        try:
            if _marked_s(fd) < start.monotonic_s:
                started_ns = int(start.monotonic_s * 1e9)
                os.utime(fd, ns=(started_ns, started_ns))
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:
        raise RevocationError(f"{path}: {why(error)}; the lease of this mux call cannot be kept") from error


def _marked_s(fd: int) -> float:
    """The time of a mark; -inf for a new file, which has the time of the wall. Raises OSError, ValueError."""
    marked_s = _checked(fd).st_mtime_ns / 1e9
    return marked_s if marked_s <= time.monotonic() else -math.inf


def main() -> int:
    """The RPC: reads what dom0 allows from stdin, and writes the result to stdout."""
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
    """All of stdin, or more than is allowed. Raises OSError, and TimeoutError if it does not end in time."""
    deadline = time.monotonic() + READ_S
    poll = select.poll()
    poll.register(0, select.POLLIN)
    received = b""
    while len(received) <= ALLOWANCE_MAX_BYTES:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError(f"the list on stdin did not end within {READ_S:g} s")
        more = os.read(0, ALLOWANCE_MAX_BYTES)
        if not more:
            break
        received += more
    return received


if __name__ == "__main__":
    sys.exit(main())
