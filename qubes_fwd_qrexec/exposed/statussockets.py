# SPDX-License-Identifier: GPL-2.0-or-later
"""The status of a running listener: UNIX sockets in its runtime directory.

``status.sock`` answers each connection with one JSON document (`ListenerReport`) and closes it. The listener
looks at its configuration again for that, so dom0 need not ask twice after a change. ``clients.sock`` does
the same, and its document also has who is connected.
``metrics.sock`` answers an HTTP request with the same figures for Prometheus. ``try.sock`` takes the key of a
forward on a line, sends a connection through that forward and returns the result (`Trial`).

These are open to every user of this qube, as the service that dom0 calls does not run as the listener's user.
They show figures and the addresses of clients, which the kernel shows everybody for TCP alone, and carry no
data of connections.

``cut.sock`` is for root: it takes the key of a forward and which of its clients on a line (`WhichClients`),
cuts these and returns how many there were (`CutReport`).
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
from qubes_fwd_qrexec.common.clientreport import WHICH_MAX_BYTES, CutReport, WhichClients
from qubes_fwd_qrexec.common.errors import ConfigError, TextError
from qubes_fwd_qrexec.common.report import Answer, ListenerReport, Trial
from qubes_fwd_qrexec.relay.acceptloop import SHORTAGE_PAUSE_S
from qubes_fwd_qrexec.system.bugs import Bugs
from qubes_fwd_qrexec.system.logs import RateLimit, warn
from qubes_fwd_qrexec.system.unixsockets import open_unix_listening

from . import metrics

_logger = logging.getLogger(__name__)

# Set for a unit with RuntimeDirectory=; several are separated by colons (systemd.exec(5)).
RUNTIME_VARIABLE = "RUNTIME_DIRECTORY"
CLIENTS, STATUS, METRICS, TRY, CUT = "clients.sock", "status.sock", "metrics.sock", "try.sock", "cut.sock"
# Connecting needs write permission: a service runs as the qube's user or as root, the listener as its own.
_FOR_ALL, _FOR_ROOT = 0o666, 0o600
# In the order in which they appear: a listener with status.sock and without those before it is an older one.
_MODES = {CLIENTS: _FOR_ALL, CUT: _FOR_ROOT, STATUS: _FOR_ALL, METRICS: _FOR_ALL, TRY: _FOR_ALL}
# How long a peer may take to ask and to read the answer, which has at most a few megabytes.
_PATIENCE_S = 5.0
# dom0 asks one question at a time, and so does a collector of metrics. Each user has its own number of
# connections, so that nobody can use up dom0's; the second number is for all users together.
AT_ONCE_MAX = 8
_ALL_AT_ONCE_MAX = 64
_PEER_CREDENTIALS = struct.Struct("iII")
_BACKLOG = 16
_KEY_MAX_BYTES = 64
_CUT_MAX_BYTES = _KEY_MAX_BYTES + WHICH_MAX_BYTES


class Reporting(Protocol):
    """What this module needs of the listener."""

    bugs: Bugs

    async def look_anew(self) -> None: ...

    def report(self, *, with_clients: bool = False) -> ListenerReport: ...

    async def try_out(self, untrusted_key: str) -> Trial:
        """Raises `ConfigError` or `TextError` if it is not the key of an open forward."""

    async def cut(self, untrusted_key: str, which: WhichClients) -> int:
        """Raises `ConfigError` or `TextError` if it is no key."""


def runtime_directory(environ_value: str | None) -> Path | None:
    """The directory that the service manager made for this unit, if any."""
    first = (environ_value or "").split(":")[0]
    return Path(first) if first else None


@asynccontextmanager
async def open_status(place: Path | None, listener: Reporting) -> AsyncIterator[Callable[[], None]]:
    """Answer during the block, or until the returned function is called, which frees the paths for another
    process.

    If the sockets cannot be made, that is logged, and the listener works without them.
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
                        handlers.start_soon(serving.accept, listening, handler, handlers)

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
    """Open all sockets, or none with a line in the log."""
    opened = {}
    try:
        place.mkdir(mode=0o755, exist_ok=True)
        for name, mode in _MODES.items():
            opened[name] = open_unix_listening(place / name, mode, _BACKLOG)
            undo.callback((place / name).unlink, missing_ok=True)
    except OSError as error:
        for sock in opened.values():
            sock.close()
        undo.close()
        _logger.error("%s: %s; the status of this listener is not available", place, error.strerror)
        return {}
    return opened


_Handler = Callable[[trio.SocketStream], Awaitable[None]]


class _Serving:
    """Serves the connections to the sockets."""

    def __init__(self, listener: Reporting) -> None:
        self._listener = listener
        self._taken = Counter[int]()
        self._limit = RateLimit()
        self.handlers: dict[str, _Handler] = {
            STATUS: self._status,
            CLIENTS: self._clients,
            METRICS: self._metrics,
            TRY: self._try,
            CUT: self._cut,
        }

    async def accept(self, listening: trio.SocketListener, handler: _Handler, handlers: trio.Nursery) -> None:
        """As `trio.serve_listeners`, which logs a traceback ten times in a second while descriptors lack."""
        async with listening:
            while True:
                try:
                    stream = await listening.accept()
                except OSError as error:
                    text = f"cannot answer who asks how this listener is: {error.strerror}"
                    warn(_logger, self._limit, "shortage", text)
                    await trio.sleep(SHORTAGE_PAUSE_S)
                else:
                    handlers.start_soon(handler, stream)

    def bounded(self, handler: _Handler) -> _Handler:
        """The handler with bounds on number and time, which always closes the connection in the end."""

        async def handle(stream: trio.SocketStream) -> None:
            user = _user_of(stream)
            if self._taken[user] >= AT_ONCE_MAX or self._taken.total() >= _ALL_AT_ONCE_MAX:
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
        await self._listener.look_anew()
        await stream.send_all(report.dump(self._listener.report().as_json()))

    async def _clients(self, stream: trio.SocketStream) -> None:
        await self._listener.look_anew()
        await stream.send_all(report.dump(self._listener.report(with_clients=True).as_json()))

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

    async def _cut(self, stream: trio.SocketStream) -> None:
        untrusted_line = await _until(stream, b"\n", _CUT_MAX_BYTES)
        if untrusted_line is None:
            return
        untrusted_key, _, which = untrusted_line.decode("ascii", "backslashreplace")[:-1].partition(" ")
        try:
            done = CutReport(await self._listener.cut(untrusted_key, WhichClients.parse(which)))
        except (ConfigError, TextError) as error:
            done = CutReport(0, str(error)[: report.TEXT_MAX])
        await stream.send_all(report.dump(done.as_json()))


def _user_of(stream: trio.SocketStream) -> int:
    """The user of the connected process, according to the kernel."""
    size = _PEER_CREDENTIALS.size
    _, user, _ = _PEER_CREDENTIALS.unpack(stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(user)


async def _until(stream: trio.SocketStream, end: bytes, most: int) -> bytes | None:
    """Read up to and including ``end``; None if it does not come within ``most`` bytes."""
    received = b""
    while end not in received:
        more = await stream.receive_some(max(1, most - len(received)))
        if not more or len(received) + len(more) > most:
            return None
        received += more
    return received
