# SPDX-License-Identifier: GPL-2.0-or-later
"""The package ``qubesdb`` and the daemon behind it, as strict as the real ones and with their traps.

Written from python/qubesdb.c, client/qdb-client.c and daemon/ of qubes-core-qubesdb: values are bytes;
a path that ends in a slash is watched with all below it; an event that arrives during another command is
queued in the handle, and its descriptor is not readable any more; after the daemon's end a command fails
once and the handle then connects again by itself, without its watches; a closed handle fails with EINVAL.
Everything that the listener has no use for is missing, and asking for it fails the test.
"""

import errno
import os
import re
import select
import socket
import threading
from collections import deque
from collections.abc import Callable

_PATH = re.compile(r"/[A-Za-z0-9_.:@/-]{0,62}")
_RECORD_BYTES = 64
_VALUE_MAX = 3071


class Error(RuntimeError):
    """``qubesdb.Error``: a number and its meaning."""


class DisconnectedError(Error):
    """``qubesdb.DisconnectedError``: a sentence."""


def _error(number: int) -> Error:
    return Error(number, os.strerror(number))


class FakeQubesDB:
    """The module, with its one daemon: give it where the package ``qubesdb`` is asked for."""

    Error = Error
    DisconnectedError = DisconnectedError

    def __init__(self, entries: dict[str, bytes] | None = None) -> None:
        self.lock = threading.RLock()
        self.entries = {f"/vm-config/{key}": value for key, value in (entries or {}).items()}
        self.handles: list[Handle] = []
        self.opened = 0
        self.is_up = True
        self.can_list = True
        """Otherwise a list is None, which the real one's can be after an error."""
        self.before_list: Callable[[], None] = lambda: None
        """Called without the lock when a list is asked for: to hang, to fail or to change something."""
        self.before_read: Callable[[str], None] = lambda path: None

    def QubesDB(self, *arguments: object) -> "Handle":  # noqa: N802 - as it is named there
        assert not arguments, "a qube has only its own"
        with self.lock:
            self.opened += 1
            handle = Handle(self)
            if not self.is_up:
                raise _error(errno.ECONNREFUSED)
            handle.connect()
            self.handles.append(handle)
            return handle

    def set(self, key: str, value: bytes) -> None:
        """What dom0 does."""
        path = f"/vm-config/{key}"
        assert _PATH.fullmatch(path)
        assert len(value) <= _VALUE_MAX
        assert 0 not in value
        with self.lock:
            self.entries[path] = value
            self.fire(path)

    def remove(self, key: str) -> None:
        with self.lock:
            del self.entries[f"/vm-config/{key}"]
            self.fire(f"/vm-config/{key}")

    def fire(self, path: str) -> None:
        """Tell all who watch it that it has changed."""
        for handle in self.handles:
            for watched in handle.watches:
                if path == watched or (watched.endswith("/") and path.startswith(watched)):
                    handle.far.sendall(path.encode().ljust(_RECORD_BYTES, b"\0"))

    def end(self) -> None:
        """The daemon ends, and with it all connections."""
        with self.lock:
            self.is_up = False
            for handle in self.handles:
                handle.disconnect()

    def begin(self) -> None:
        with self.lock:
            self.is_up = True

    @property
    def watchers(self) -> "list[Handle]":
        with self.lock:
            return [handle for handle in self.handles if handle.watches]


class Handle:
    """``qubesdb.QubesDB``. One thread at a time may use it, as with the real one."""

    def __init__(self, daemon: FakeQubesDB) -> None:
        self._daemon = daemon
        self._queued: deque[str] = deque()
        self._user = threading.Lock()
        self._is_closed = False
        self._is_connected = False
        self.watches: list[str] = []
        self.near: socket.socket
        self.far: socket.socket

    def connect(self) -> None:
        self.near, self.far = socket.socketpair()
        self._is_connected = True

    def disconnect(self) -> None:
        """What the end of the daemon does to it."""
        self.watches.clear()
        self._is_connected = False
        self.far.close()

    def list(self, path: str, /) -> "list[str] | None":
        self._daemon.before_list()
        with self._command(path):
            if not self._daemon.can_list:
                return None
            return sorted(found for found in self._daemon.entries if found.startswith(path))

    def read(self, path: str, /) -> bytes | None:
        self._daemon.before_read(path)
        with self._command(path):
            return self._daemon.entries.get(path)

    def watch(self, path: str, /) -> None:
        with self._command(path):
            self.watches.append(path)

    def watch_fd(self) -> int:
        self._check()
        return self.near.fileno()

    def read_watch(self) -> str:
        self._check()
        assert self._user.acquire(blocking=False), "two threads use one handle"
        try:
            if self._queued:
                return self._queued.popleft()
            record = self.near.recv(_RECORD_BYTES, socket.MSG_WAITALL)
        finally:
            self._user.release()
        if not record:
            raise DisconnectedError("QubesDB disconnected")
        return record.rstrip(b"\0").decode()

    def close(self) -> None:
        self._check()
        assert not self._user.locked(), "closed while another thread uses it"
        with self._daemon.lock:
            self._is_closed = True
            self._daemon.handles.remove(self)
            self.near.close()
            self.far.close()

    def _command(self, path: str) -> "_Command":
        self._check()
        assert isinstance(path, str)
        if not _PATH.fullmatch(path):
            raise _error(errno.EINVAL)
        return _Command(self, self._daemon)

    def _check(self) -> None:
        if self._is_closed:
            raise _error(errno.EINVAL)

    def begin_command(self) -> None:
        if not self._is_connected:
            if self.near.fileno() >= 0:
                self.near.close()
                raise DisconnectedError("QubesDB disconnected")
            if not self._daemon.is_up:
                raise DisconnectedError("QubesDB disconnected")
            self.connect()

    def end_command(self) -> None:
        while self._is_connected and select.select([self.near], [], [], 0)[0]:
            self._queued.append(self.near.recv(_RECORD_BYTES, socket.MSG_WAITALL).rstrip(b"\0").decode())


class _Command:
    def __init__(self, handle: Handle, daemon: FakeQubesDB) -> None:
        self._handle = handle
        self._daemon = daemon

    def __enter__(self) -> None:
        assert self._handle._user.acquire(blocking=False), "two threads use one handle"
        self._daemon.lock.acquire()
        try:
            self._handle.begin_command()
        except BaseException:
            self._daemon.lock.release()
            self._handle._user.release()
            raise

    def __exit__(self, *_: object) -> None:
        self._handle.end_command()
        self._daemon.lock.release()
        self._handle._user.release()
