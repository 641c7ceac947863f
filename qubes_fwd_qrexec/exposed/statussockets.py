# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a running listener is asked how it is: UNIX sockets in its runtime directory.

``status.sock`` answers whoever connects with one JSON document (`ListenerReport`) and closes.
``metrics.sock`` answers an HTTP request with the same figures for Prometheus. ``try.sock`` takes the key
of a forward on a line, sends a connection through it and tells what came of it (`Trial`).

They are open to every user of this qube: the service that dom0 calls runs as another one than the
listener. They tell figures, and carry nobody's bytes.
"""

import contextlib
import logging
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

import trio

from qubes_fwd_qrexec.common import report
from qubes_fwd_qrexec.common.errors import ConfigError, TextError
from qubes_fwd_qrexec.common.report import Answer, ListenerReport, Trial
from qubes_fwd_qrexec.system.bugs import Bugs
from qubes_fwd_qrexec.system.unixsockets import open_unix_listening

from . import metrics

_logger = logging.getLogger(__name__)

# systemd.exec(5): set for a unit with RuntimeDirectory=, and colon-separated if there are several.
RUNTIME_VARIABLE = "RUNTIME_DIRECTORY"
STATUS, METRICS, TRY = "status.sock", "metrics.sock", "try.sock"
# Connect is writing: the RPC runs as the user of the qube, the listener as one of its own.
_MODE = 0o666
# Whoever neither asks nor takes the answer is left; an answer is at most a few megabytes on this machine.
_PATIENCE_S = 5.0
# dom0 asks one question at a time, and a collector of metrics another. So many places each user has of its
# own, that none can take dom0's; and so many there are in all.
_AT_ONCE_MAX = 8
_ALL_AT_ONCE_MAX = 64
_PEER_CREDENTIALS = struct.Struct("iII")
_BACKLOG = 16
_KEY_MAX_BYTES = 64


class Reporting(Protocol):
    """The listener, as it is asked."""

    bugs: Bugs

    def report(self) -> ListenerReport: ...

    async def try_out(self, untrusted_key: str) -> Trial:
        """Raises `ConfigError` or `TextError` for what is no forward."""


def runtime_directory(environ_value: str | None) -> Path | None:
    """The directory that the service manager made for this unit, if any."""
    first = (environ_value or "").split(":")[0]
    return Path(first) if first else None


@asynccontextmanager
async def open_status(place: Path | None, listener: Reporting) -> AsyncIterator[Callable[[], None]]:
    """Answer within the block, or until what it gives is called: then the paths are free for another process.

    Where the sockets cannot be made, the listener works without them.
    """
    with contextlib.ExitStack() as undo:
        sockets = {} if place is None else _open(place, undo)
        serving = _Serving(listener)
        scope = trio.CancelScope()

        async def serve() -> None:
            with scope:
                async with trio.open_nursery() as handlers:
                    for name, sock in sockets.items():
                        listening = trio.SocketListener(trio.socket.from_stdlib_socket(sock))
                        handler = serving.bounded(serving.handlers[name])
                        handlers.start_soon(trio.serve_listeners, handler, [listening])

        def close() -> None:
            scope.cancel()
            undo.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            try:
                yield close
            finally:
                scope.cancel()


def _open(place: Path, undo: contextlib.ExitStack) -> dict[str, socket.socket]:
    """All sockets, or none with a line in the log."""
    opened = {}
    try:
        place.mkdir(mode=0o755, exist_ok=True)
        for name in (STATUS, METRICS, TRY):
            opened[name] = open_unix_listening(place / name, _MODE, _BACKLOG)
            undo.callback((place / name).unlink, missing_ok=True)
    except OSError as error:
        for sock in opened.values():
            sock.close()
        undo.close()
        _logger.error("%s: %s; nobody can ask how this listener is", place, error.strerror)
        return {}
    return opened


_Handler = Callable[[trio.SocketStream], Awaitable[None]]


class _Serving:
    """What becomes of each connection to one of the sockets."""

    def __init__(self, listener: Reporting) -> None:
        self._listener = listener
        self._taken = Counter[int]()
        self.handlers: dict[str, _Handler] = {STATUS: self._status, METRICS: self._metrics, TRY: self._try}

    def bounded(self, handler: _Handler) -> _Handler:
        """The same, with bounds on number and time, and closed in the end whatever happens."""

        async def handle(stream: trio.SocketStream) -> None:
            user = _user_of(stream)
            if self._taken[user] >= _AT_ONCE_MAX or self._taken.total() >= _ALL_AT_ONCE_MAX:
                await trio.aclose_forcefully(stream)
                return
            self._taken[user] += 1
            try:
                with trio.move_on_after(_PATIENCE_S):
                    try:
                        await handler(stream)
                    except trio.BrokenResourceError:
                        return
                    except Exception as bug:  # noqa: BLE001 - it is of this answer alone
                        self._listener.bugs.note(bug)
            finally:
                self._taken[user] -= 1
                if not self._taken[user]:
                    del self._taken[user]
                await trio.aclose_forcefully(stream)

        return handle

    async def _status(self, stream: trio.SocketStream) -> None:
        await stream.send_all(report.dump(self._listener.report().as_json()))

    async def _metrics(self, stream: trio.SocketStream) -> None:
        untrusted_request = await _until(stream, b"\r\n\r\n", metrics.REQUEST_MAX_BYTES)
        if untrusted_request is not None:
            await stream.send_all(metrics.answer(untrusted_request, self._listener.report()))

    async def _try(self, stream: trio.SocketStream) -> None:
        untrusted_line = await _until(stream, b"\n", _KEY_MAX_BYTES)
        if untrusted_line is None:
            return
        untrusted_key = untrusted_line.decode("ascii", "backslashreplace").removesuffix("\n")
        try:
            trial = await self._listener.try_out(untrusted_key)
        except (ConfigError, TextError) as error:
            trial = Trial(Answer.FAILED, "", str(error)[: report.TEXT_MAX])
        await stream.send_all(report.dump(trial.as_json()))


def _user_of(stream: trio.SocketStream) -> int:
    """The user of the process that has connected, as the kernel says."""
    size = _PEER_CREDENTIALS.size
    _, user, _ = _PEER_CREDENTIALS.unpack(stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(user)


async def _until(stream: trio.SocketStream, end: bytes, most: int) -> bytes | None:
    """What comes up to ``end``; None if that does not come within ``most`` bytes."""
    received = b""
    while end not in received:
        more = await stream.receive_some(max(1, most - len(received)))
        if not more or len(received) + len(more) > most:
            return None
        received += more
    return received
