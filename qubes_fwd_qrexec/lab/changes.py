# SPDX-License-Identifier: GPL-2.0-or-later
"""What qubesd would tell dom0 by events: changes of a lab, seen in its directory by inotify.

It stands in for `admin.qubes.events`: features that matter, a qube's properties, qubes that come and go, and
the policy files. It says that something has changed and never what; the caller reads everything again.
"""

import math
import select
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum, auto
from pathlib import Path
from typing import NamedTuple

from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.system.inotify import (
    IN_CREATE,
    IN_DELETE_SELF,
    IN_IGNORED,
    IN_ISDIR,
    IN_MOVE_SELF,
    IN_MOVED_FROM,
    IN_MOVED_TO,
    IN_Q_OVERFLOW,
    Inotify,
    Notice,
)

from .directory import LabDirectory, QubeDirectory


class LabChanges:
    """`admin.backend.Changes` of a lab, and its context manager.

    ``matters`` judges a feature by its key.
    """

    def __init__(self, lab: LabDirectory, matters: Callable[[str], bool], wakers: Sequence[int] = ()) -> None:
        self._lab = lab
        self._matters = matters
        self._wakers = wakers
        self._watches: _Watches | None = None

    def __enter__(self) -> "LabChanges":
        return self

    def __exit__(self, *_: object) -> None:
        if self._watches is not None:
            self._watches.inotify.close()

    def wait(self, timeout_s: float | None) -> bool:
        try:
            if self._watches is None:
                self._watches = _Watches(self._lab, self._matters)
                self._watches.add_all()
                return True
            return self._wait(self._watches, timeout_s)
        except OSError as error:
            raise StoreError(f"{error.filename or self._lab.root}: {error.strerror}") from error

    def _wait(self, watches: "_Watches", timeout_s: float | None) -> bool:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        own_fd = watches.inotify.fileno()
        poll = select.poll()
        for fd in (own_fd, *self._wakers):
            poll.register(fd, select.POLLIN)
        while not watches.take():
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = poll.poll(None if left_s is None else math.ceil(left_s * 1000))
            if any(fd != own_fd for fd, _ in ready):
                return watches.take()
            if not ready:
                return False
        return True


class _Role(Enum):
    """What a watched directory is."""

    ROOT = auto()
    POLICY = auto()
    QUBES = auto()
    QUBE = auto()
    FEATURES = auto()


class _Watched(NamedTuple):
    role: _Role
    path: Path


class _Watches:
    """The directories that are watched, by inotify's numbers."""

    def __init__(self, lab: LabDirectory, matters: Callable[[str], bool]) -> None:
        self.inotify = Inotify()
        self._lab = lab
        self._matters = matters
        self._watched: dict[int, _Watched] = {}

    def add_all(self) -> None:
        """Watch whatever is there. What appears meanwhile is found here or reported; both does no harm."""
        self._add(_Role.ROOT, self._lab.root)
        self._add(_Role.POLICY, self._lab.policy_dir)
        self._add(_Role.QUBES, self._lab.qubes_dir)
        for name in self._lab.qube_names():
            self._add_qube(self._lab.qubes_dir / name)

    def _add(self, role: _Role, path: Path) -> None:
        self._watched[self.inotify.add(path)] = _Watched(role, path)

    def _add_qube(self, path: Path) -> None:
        # It may be gone again, or be no qube. If its features come later, that is reported.
        with suppress(FileNotFoundError, NotADirectoryError):
            self._add(_Role.QUBE, path)
            self._add(_Role.FEATURES, QubeDirectory(path).features)

    def _forget_qube(self, path: Path) -> None:
        for number, watched in list(self._watched.items()):
            if watched.path.is_relative_to(path):
                del self._watched[number]
                self.inotify.remove(number)

    def take(self) -> bool:
        """Read all notices and return whether one matters. Raises `StoreError` if no more can come."""
        # Judge all of them before any(), which may stop early: each may bring something new to watch.
        judged = [self._judge(notice) for notice in self.inotify.read()]
        return any(judged)

    def _judge(self, notice: Notice) -> bool:
        if notice.has(IN_Q_OVERFLOW):
            self.add_all()
            return True
        watched = self._watched.get(notice.watch)
        if watched is None:
            return False
        if notice.has(IN_IGNORED | IN_DELETE_SELF | IN_MOVE_SELF):
            if watched.role in (_Role.ROOT, _Role.POLICY, _Role.QUBES):
                raise StoreError(f"{watched.path}: it was moved or removed")
            if notice.has(IN_IGNORED):
                del self._watched[notice.watch]
            return False
        if notice.has(IN_CREATE) and not notice.has(IN_ISDIR):
            return False  # a file is news when it has been closed
        return self._concerns(watched, notice)

    def _concerns(self, watched: _Watched, notice: Notice) -> bool:
        role, path = watched
        if role is _Role.POLICY:
            return notice.name.endswith(".policy") and not notice.name.startswith(".")
        if role is _Role.FEATURES:
            return self._matters(notice.name)
        if role is _Role.QUBES:
            if notice.has(IN_MOVED_FROM):
                self._forget_qube(path / notice.name)
            if notice.has(IN_CREATE | IN_MOVED_TO):
                self._add_qube(path / notice.name)
            return not notice.name.startswith(".")
        if role is _Role.QUBE:
            place = QubeDirectory(path)
            if notice.name == place.features.name and notice.has(IN_CREATE | IN_MOVED_TO):
                self._add_qube(path)
            return notice.name in (place.file.name, place.features.name)
        return False
