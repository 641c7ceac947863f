# SPDX-License-Identifier: GPL-2.0-or-later
"""Plays one script between two sockets, whatever lies between them, and says what each side saw."""

import errno
import socket
import struct
from dataclasses import dataclass
from typing import cast

import trio

from qubes_fwd_qrexec.relay.copy import undelivered_bytes

from .scripts import How, Part, Script

_CHUNK = 65536
# More than any script takes; a connection that needs more has hung.
BOUND_S = 20.0
# Of a call that was killed: how long its service may still connect (docs/behaviours.md, 28, and some more).
_LATE_S = 3.0
_LOOK_S = 0.002
# So many pauses at most, or pieces of one byte take all day.
_PAUSES_MAX = 20


@dataclass(frozen=True, slots=True)
class Seen:
    """What a side saw of the other: how many bytes, whether all of them were right, and the end."""

    count: int
    is_right: bool
    end: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """None for a side that aborted without waiting: how far it had read is chance."""

    client: Seen | None
    server: Seen | None


class _Side:
    """One end of the connection, doing its part."""

    def __init__(self, part: Part, sends: bytes, expects: bytes) -> None:
        self.part = part
        self.has_finished = False
        self._sends = memoryview(sends)
        self._expects = memoryview(expects)
        self._count = 0
        self._is_right = True
        self._end: str | None = None
        self._was_reset = False
        self._heard = trio.Event()
        self._read_over = trio.Event()

    @property
    def seen(self) -> Seen:
        # The kernel reports an RST once (docs/facts.md, L2). If the writer got it, the reader saw an end of
        # file, perhaps earlier: trio gives other tasks a turn before it raises.
        return Seen(self._count, self._is_right, "RST" if self._was_reset else self._end or "nothing")

    def __str__(self) -> str:
        return f"{self.seen}, {'has' if self.has_finished else 'has not'} sent all"

    def has_lost(self) -> None:
        """There was no connection at all."""
        self._end = "RST"

    async def run(self, sock: trio.socket.SocketType) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read, sock)
            if await self._write(sock) and self.part.how is How.RST:
                nursery.cancel_scope.cancel()
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()

    async def _read(self, sock: trio.socket.SocketType) -> None:
        await trio.sleep(self.part.stall_s)
        try:
            while chunk := await sock.recv(_CHUNK):
                self._is_right &= chunk == self._expects[self._count : self._count + len(chunk)]
                self._count += len(chunk)
                self._heard.set()
            self._end = "EOF"
        except OSError:
            self._end = "RST"
        self._heard.set()
        self._read_over.set()

    async def _write(self, sock: trio.socket.SocketType) -> bool:
        """Whether all was sent and ended as the part says; if not, the other side is gone."""
        pauses = 0
        try:
            for start in range(0, len(self._sends), self.part.chunk):
                await _send_all(sock, self._sends[start : start + self.part.chunk])
                if self.part.pause_s and pauses < _PAUSES_MAX:
                    pauses += 1
                    await trio.sleep(self.part.pause_s)
            if self.part.waits:
                await self._read_over.wait()
            if self.part.how is How.FIN:
                sock.shutdown(socket.SHUT_WR)
            else:
                await self._heard.wait()
                await self._delivered(sock)
        except OSError as error:
            # EPIPE follows an RST that was reported before, or a FIN.
            self._was_reset = error.errno not in (errno.EPIPE, errno.ENOTCONN)
            return False
        self.has_finished = True
        return True

    async def _delivered(self, sock: trio.socket.SocketType) -> None:
        """Wait until the peer's kernel has everything that was sent; an abort would take it back."""
        while undelivered_bytes(cast("socket.socket", sock)):  # noqa: ASYNC110 - the kernel has no event for it
            await trio.sleep(_LOOK_S)


async def _send_all(sock: trio.socket.SocketType, data: memoryview) -> None:
    while data:
        data = data[await sock.send(data) :]


async def play(script: Script, seed: int, address: tuple[str, int], port: int) -> tuple[Outcome, list[str]]:
    """Play it between a client that connects to ``address`` and a server on ``port``.

    Returns what they saw, and what is wrong with that in calm or storm.
    """
    upload, download = script.data(seed, "client"), script.data(seed, "server")
    client = _Side(script.client, upload, download)
    server = _Side(script.server, download, upload)
    client_over = trio.Event()

    async def run_client() -> None:
        with trio.socket.socket() as sock:
            try:
                await sock.connect(address)
            except OSError:
                client.has_lost()
            else:
                await client.run(sock)
        client_over.set()

    async def run_server(listening: trio.socket.SocketType) -> None:
        with trio.CancelScope() as waiting:
            nursery.start_soon(_cancel_late, client_over, waiting)
            accepted, _ = await listening.accept()
        if waiting.cancelled_caught:
            server.has_lost()
            return
        waiting.cancel()
        with accepted:
            await server.run(accepted)

    with trio.move_on_after(BOUND_S) as bound, trio.socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        await listening.bind(("127.0.0.1", port))
        listening.listen(16)
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as both:
                both.start_soon(run_client)
                both.start_soon(run_server, listening)
            nursery.cancel_scope.cancel()
    problems = [*_problems("client", client, server), *_problems("server", server, client)]
    if bound.cancelled_caught:
        problems.append(f"hangs: {client} and {server}")
    return Outcome(_comparable(client), _comparable(server)), problems


async def _cancel_late(client_over: trio.Event, waiting: trio.CancelScope) -> None:
    await client_over.wait()
    waiting.deadline = trio.current_time() + _LATE_S


def _comparable(side: _Side) -> Seen | None:
    return side.seen if side.part.how is How.FIN or side.part.waits else None


def _problems(name: str, side: _Side, other: _Side) -> list[str]:
    """What must never happen, whatever was killed."""
    seen = side.seen
    found = []
    if not seen.is_right:
        found.append(f"the {name} got wrong bytes")
    if seen.end == "EOF" and (other.part.how is How.RST or not other.has_finished):
        found.append(f"the {name} saw a clean end that the other side did not make")
    elif seen.end == "EOF" and seen.count != other.part.size:
        found.append(f"the {name} saw a clean end after {seen.count} of {other.part.size} bytes")
    return found
