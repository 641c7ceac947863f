# SPDX-License-Identifier: GPL-2.0-or-later
"""inotify(7) of Linux through ctypes: what happened in some directories, as values.

The standard library does not have it, and nothing should be installed in dom0 for it. It only watches
directories, and decides nothing.
"""

import ctypes
import errno
import os
import struct
from pathlib import Path
from typing import NamedTuple

# linux/inotify.h
IN_CLOSE_WRITE = 0x8
IN_MOVED_FROM = 0x40
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_DELETE_SELF = 0x400
IN_MOVE_SELF = 0x800
IN_Q_OVERFLOW = 0x4000
IN_IGNORED = 0x8000
IN_ISDIR = 0x40000000
_IN_ONLYDIR = 0x01000000
# A file counts once it is complete: closed after writing, renamed, or gone.
_MASK = (
    IN_CLOSE_WRITE
    | IN_MOVED_FROM
    | IN_MOVED_TO
    | IN_CREATE
    | IN_DELETE
    | IN_DELETE_SELF
    | IN_MOVE_SELF
    | _IN_ONLYDIR
)
_HEADER = struct.Struct("iIII")
# Room for more than 200 of the longest events: one takes at most 272 bytes, see NAME_MAX.
_READ_MAX = 1 << 16


class Notice(NamedTuple):
    """One event; ``watch`` is the number that `Inotify.add` returned, or -1 for an overflow."""

    watch: int
    mask: int
    name: str

    def has(self, flags: int) -> bool:
        return bool(self.mask & flags)


class Inotify:
    """A queue of notices; reading it never blocks. Close it in the end. Its methods raise `OSError`."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._checked(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), None)

    def close(self) -> None:
        os.close(self._fd)

    def fileno(self) -> int:
        return self._fd

    def add(self, directory: Path) -> int:
        """Watch a directory. Returns a number, which is the same for the same directory."""
        path = ctypes.c_char_p(os.fsencode(directory))
        return self._checked(self._libc.inotify_add_watch(self._fd, path, _MASK), directory)

    def remove(self, watch: int) -> None:
        """Stop watching a directory, which may be gone already."""
        self._libc.inotify_rm_watch(self._fd, watch)

    def read(self) -> list[Notice]:
        """Return all notices that are there."""
        found: list[Notice] = []
        while True:
            try:
                data = os.read(self._fd, _READ_MAX)
            except BlockingIOError:
                return found
            while data:
                watch, mask, _, size = _HEADER.unpack_from(data)
                end = _HEADER.size + size
                found.append(Notice(watch, mask, os.fsdecode(data[_HEADER.size : end].rstrip(b"\0"))))
                data = data[end:]

    @staticmethod
    def _checked(result: int, path: Path | None) -> int:
        if result >= 0:
            return result
        code = ctypes.get_errno()
        text = os.strerror(code)
        if code in (errno.ENOSPC, errno.EMFILE):
            text = f"the limits of inotify are reached, see fs.inotify in sysctl: {text}"
        raise OSError(code, text, None if path is None else str(path))
