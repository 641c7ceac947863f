# SPDX-License-Identifier: GPL-2.0-or-later
"""Locks between programs, of root and of its group alike; one ends with the process that holds it."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qubes_fwd_qrexec.common.errors import StoreError, why

_RETRY_S = 0.02


@contextmanager
def hold(path: Path, timeout_s: float, busy: str, who_may: str = "") -> Iterator[None]:
    """Hold the lock. Raises `StoreError`: with ``busy`` if another one does, and with ``who_may`` if there is
    none to be had.

    `is_held` takes it for microseconds, so a lock that nobody holds needs a timeout too.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o660)
    except OSError as error:
        raise StoreError(f"{path}: {why(error)}{who_may}") from error
    try:
        with suppress(PermissionError):
            # Whatever the umask is: the group has to be able to open it too.
            os.fchmod(fd, 0o660)
        deadline = time.monotonic() + timeout_s
        while not _lock(fd, fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                raise StoreError(f"{path}: {busy}")
            time.sleep(_RETRY_S)
        yield
    finally:
        os.close(fd)


def why_not(path: Path) -> str | None:
    """Why this user cannot take the lock; None if he can."""
    place, how = (path, os.R_OK) if os.path.exists(path) else (path.parent, os.W_OK)
    return None if os.access(place, how, effective_ids=True) else f"{place}: {os.strerror(errno.EACCES)}"


def is_held(path: Path) -> bool:
    """In doubt, as where this user may not look, yes."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        return not _lock(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


def _lock(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
