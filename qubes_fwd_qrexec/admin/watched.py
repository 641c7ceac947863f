# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether `watch` runs: it holds a lock, and whoever makes a promise that needs it asks for that."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qubes_fwd_qrexec.common.errors import StoreError, why

# Who asks has it for microseconds.
_BUSY_S = 1.0
_RETRY_S = 0.02


@contextmanager
def watching(place: Path) -> Iterator[None]:
    """Say so for as long as it is entered. Raises `StoreError` if another one does already."""
    try:
        fd = os.open(place, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o660)
    except OSError as error:
        raise StoreError(f"{place}: {why(error)}") from error
    try:
        with suppress(PermissionError):
            # Whatever the umask is: the group is to look too.
            os.fchmod(fd, 0o660)
        deadline = time.monotonic() + _BUSY_S
        while not _locked(fd, fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                raise StoreError(f"{place}: another 'qvm-forward watch' runs already")
            time.sleep(_RETRY_S)
        yield
    finally:
        os.close(fd)


def is_watched(place: Path) -> bool:
    """In doubt, as where it is not for this user to know, yes."""
    try:
        fd = os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        return not _locked(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


def _locked(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
