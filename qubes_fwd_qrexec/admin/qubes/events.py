# SPDX-License-Identifier: GPL-2.0-or-later
"""The events of qubesd that matter, as news that something changed.

`qubesadmin.events.EventsDispatcher` receives them, in an asyncio loop that runs only while
`QubesChanges.wait` does: events that come meanwhile stay in the socket. qubesd has no events for policy, so
in dom0 all policy files are watched too, as any of them may deny calls; a management qube cannot see them.
"""

import asyncio
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from qubes_fwd_qrexec.admin.inventory import feature_matters
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.system.inotify import Inotify

# qubes-core-qrexec qrexec/__init__.py
POLICY_DIR = Path("/etc/qubes/policy.d")
RUN_POLICY_DIR = Path("/run/qubes/policy.d")
_POLICY, _INCLUDE = ".policy", "include"
# What the plan is made from. qubes-core-admin qubes/app.py: that default_netvm was set comes also as a reset
# of netvm for each qube that has the default; that it was reset does not. The -del ones are an older name.
_MATTER = re.compile(
    r"connection-established|domain-(add|delete|start|start-failed|shutdown)"
    r"|property-(set|reset|del):(netvm|default_netvm|template|template_for_dispvms|provides_network|ip|ip6)"
    # Nothing is decided by it, and it is shown.
    r"|property-set:label"
    # Rules name tags, too; and whether a qube has an IPv6 address depends on the feature of its netvms.
    r"|domain-tag-(add|delete):.+|domain-feature-(set|delete):ipv6"
)
# Not "*": for an event that has a handler the dispatcher looks up the devices among its parameters. Those are
# calls that a management qube may not make, and their error ends the listening.
_PATTERNS = ("connection-established", "domain-*", "property-*")
_OF_FEATURES = ("domain-feature-set", "domain-feature-delete")
# In a management qube the connection is a process, which the dispatcher kills and does not wait for. asyncio
# complains at length if it has not seen its end before the loop is closed.
PROCESS_ENDS_S = 0.1


def matters(event: str) -> bool:
    """Whether the event of that name may change what is to be open."""
    kind, _, key = event.partition(":")
    return (kind in _OF_FEATURES and feature_matters(key)) or _MATTER.fullmatch(event) is not None


class QubesChanges:
    """`admin.backend.Changes` of a Qubes system, and its context manager.

    The dispatcher's own reconnecting is not used: it tries each second, for ever and in silence. ``linger_s``
    is how long a connection that is a process may take to end, see `PROCESS_ENDS_S`.
    """

    def __init__(
        self, dispatcher: Any, policy_dirs: Sequence[Path], wakers: Sequence[int] = (), linger_s: float = 0.0
    ) -> None:
        self.linger_s = linger_s
        self._dispatcher = dispatcher
        self.policy_dirs = policy_dirs
        self._wakers = wakers
        self._has_changed = False
        self._woken = asyncio.Event()
        self._listening: asyncio.Task[None] | None = None
        self._inotify: Inotify | None = None
        self._included: set[int] = set()
        for pattern in _PATTERNS:
            dispatcher.add_handler(pattern, self._on_event)

    def __enter__(self) -> "QubesChanges":
        self._loop = asyncio.new_event_loop()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._loop.run_until_complete(self._close())
        finally:
            self._loop.close()
            if self._inotify is not None:
                self._inotify.close()

    def wait(self, timeout_s: float | None) -> bool:
        if not self._has_changed:
            try:
                self._loop.run_until_complete(self._wait(timeout_s))
            except OSError as error:
                raise StoreError(f"{error.filename or self.policy_dirs[0]}: {error.strerror}") from error
        if self._has_changed:
            self._has_changed = False
            return True
        if self._listening is not None and self._listening.done():
            # It ends without an exception also where there is no socket, and where qubesd refuses.
            why = self._listening.exception()
            told = "" if why is None else f" ({why!r})"
            raise StoreError(
                f"qubesd sends no events{told}; is it running, and does it allow admin.Events?"
            ) from why
        return False

    async def _wait(self, timeout_s: float | None) -> None:
        """Until anything happens that `wait` is to judge."""
        if self._listening is None:
            self._inotify = Inotify()
            for directory in self.policy_dirs:
                with suppress(FileNotFoundError, NotADirectoryError):
                    self._inotify.add(directory)
                    self._included.add(self._inotify.add(directory / _INCLUDE))
            self._loop.add_reader(self._inotify.fileno(), self._on_policy, self._inotify)
            for fd in self._wakers:
                self._loop.add_reader(fd, self._woken.set)
            self._listening = self._loop.create_task(self._dispatcher.listen_for_events(reconnect=False))
            self._listening.add_done_callback(lambda _: self._woken.set())
        self._woken.clear()
        if not self._listening.done():
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._woken.wait()

    async def _close(self) -> None:
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait([self._listening])
        await asyncio.sleep(self.linger_s)

    def _on_policy(self, inotify: Inotify) -> None:
        """Of what lies in a directory, qrexec reads what has its ending; and all that other files include."""
        for notice in inotify.read():
            is_read = notice.watch in self._included or notice.name.endswith(_POLICY)
            if is_read and not notice.name.startswith("."):
                self._changed()

    def _on_event(self, subject: object, event: str, **_: object) -> None:
        if matters(event):
            self._changed()

    def _changed(self) -> None:
        self._has_changed = True
        self._woken.set()
