# SPDX-License-Identifier: GPL-2.0-or-later
"""`qubesadmin.events` of a system whose qubes are those of a lab: what inotify tells of its directory, as
qubesd would say it.
"""

import asyncio
import fnmatch
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.qube import Qube
from qubes_fwd_qrexec.system.inotify import Inotify

_Known = tuple[Qube, dict[str, str]] | None


def module(lab: LabDirectory) -> ModuleType:
    """The module, for `sys.modules`."""
    made = ModuleType("qubesadmin.events")
    made.EventsDispatcher = lambda app, **options: Dispatcher(lab)  # type: ignore[attr-defined]
    return made


class Dispatcher:
    """`qubesadmin.events.EventsDispatcher`, as far as `admin.qubes.events` uses it."""

    def __init__(self, lab: LabDirectory) -> None:
        self._lab = lab
        self._handlers: dict[str, Callable[..., None]] = {}
        self._watched: dict[int, Path] = {}
        self._known: dict[str, _Known] = {}

    def add_handler(self, event: str, handler: Callable[..., None]) -> None:
        self._handlers[event] = handler

    async def listen_for_events(self, vm: object = None, reconnect: bool = True) -> None:
        inotify, news = Inotify(), asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(inotify.fileno(), news.set)
        try:
            self._watch(inotify, self._lab.qubes_dir)
            for name in self._lab.qube_names():
                self._known[name] = self._watched_look(inotify, name)
            self._tell(None, "connection-established")
            while True:
                await news.wait()
                news.clear()
                paths = [self._watched[notice.watch] / notice.name for notice in inotify.read()]
                for name in dict.fromkeys(path.relative_to(self._lab.qubes_dir).parts[0] for path in paths):
                    self._compare(inotify, name)
        except asyncio.CancelledError:
            return  # the real one swallows it
        finally:
            loop.remove_reader(inotify.fileno())
            inotify.close()

    def _watch(self, inotify: Inotify, path: Path) -> None:
        self._watched[inotify.add(path)] = path

    def _watched_look(self, inotify: Inotify, name: str) -> _Known:
        """Look at a qube once it is watched, so that what changes later is told."""
        place = self._lab.qube_dir(name)
        with suppress(FileNotFoundError, NotADirectoryError):
            self._watch(inotify, place.root)
            self._watch(inotify, place.features)
        return self._look(name)

    def _look(self, name: str) -> _Known:
        try:
            return self._lab.qube(name), dict(self._lab.features(name))
        except StoreError:
            return None

    def _compare(self, inotify: Inotify, name: str) -> None:
        """Tell how a qube differs from what it was."""
        before, now = self._known.get(name), self._watched_look(inotify, name)
        self._known[name] = now
        if before is None or now is None:
            if before != now:
                self._tell(None, "domain-add" if now else "domain-delete")
            return
        for event in (*_changed(*before, *now),):
            self._tell(name, event)

    def _tell(self, subject: str | None, event: str) -> None:
        for pattern, handler in self._handlers.items():
            if fnmatch.fnmatch(event, pattern):
                handler(subject, event)


def _changed(old: Qube, had: dict[str, str], new: Qube, has: dict[str, str]) -> Iterator[str]:
    """The events that such a change of a qube makes."""
    for key in sorted(had.keys() | has.keys()):
        if key not in has:
            yield f"domain-feature-delete:{key}"
        elif had.get(key) != has[key]:
            yield f"domain-feature-set:{key}"
    values: list[tuple[str, Any, Any]] = [
        (key, getattr(old, key), getattr(new, key)) for key in Qube.__slots__
    ]
    for key, was, is_now in values:
        if was == is_now:
            continue
        if key == "state":
            yield "domain-start" if new.is_running else "domain-shutdown"
        elif key == "tags":
            yield from (f"domain-tag-add:{tag}" for tag in set(is_now) - set(was))
            yield from (f"domain-tag-delete:{tag}" for tag in set(was) - set(is_now))
        else:
            yield f"property-set:{key}"
