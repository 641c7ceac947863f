# SPDX-License-Identifier: GPL-2.0-or-later
"""One flow in the target: a socket of UDP that is connected to the user's server.

The server is at 127.0.0.1, or at ::1 if the port is closed at 127.0.0.1, or where `servers` says. That a port
is closed is heard of only after a datagram was sent to it, so the first ones are kept until the server has
answered, or its port was found closed. Nothing waits: what a socket does not take is dropped and counted.
"""

import errno
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Protocol

from qubes_fwd_qrexec.mux import FlowCode, FlowRequested
from qubes_fwd_qrexec.relay.loop import READ, Loop
from qubes_fwd_qrexec.system.datagrams import (
    MAX_DATAGRAM_BYTES,
    MAX_SEGMENTS,
    READ_MAX_BYTES,
    READS_MAX,
    Buffer,
    Lost,
    count,
    reads,
    receive_batches,
    receive_connected,
    send,
)

from .proxyheader import datagram_header
from .servers import LOCALHOSTS, ServerAddress

# docs/behaviours.md, 57: how long a flow may be idle before the server has answered, and after.
UNANSWERED_S = 30.0
ANSWERED_S = 120.0
# What is kept for the next address: so many first batches of a flow, and so many bytes of all flows.
_KEPT_MAX = 4
KEPT_BYTES = 4 << 20
# What the kernel keeps of what a server sends (it doubles the number): a burst for so many of the flows in
# which something moves, and a few datagrams for each of the others. With 16,384 flows it is 308 MiB if all
# their servers flood.
BURSTS_MAX = 128
_BURST_BYTES = 212_992
_FEW_BYTES = 8192
# How often to try for a socket that does not have the server's own port.
_TRIES = 3

NewSocket = Callable[[int], socket.socket]
"""Makes a socket of UDP of an address family. Raises OSError."""


def new_socket(family: int) -> socket.socket:
    """A non-blocking socket of UDP that receives batches. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        receive_batches(sock)
    except OSError:
        sock.close()
        raise
    return sock


def connected(family: int, host: str, port: int, new: NewSocket = new_socket) -> socket.socket:
    """A socket that is connected to a port of this qube, from another one. Raises OSError.

    The kernel may choose the server's port for the socket, if it is closed. Then the socket would meet itself
    (docs/facts.md, L13).
    """
    unlucky: list[socket.socket] = []
    try:
        while True:
            sock = new(family)
            unlucky.append(sock)  # it has the port while another one is tried
            sock.connect((host, port))
            if sock.getsockname()[1] != port:
                unlucky.pop()
                return sock
            if len(unlucky) == _TRIES:
                raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    finally:
        for sock in unlucky:
            sock.close()


class FlowOwner(Protocol):
    """The service that a flow belongs to; called in the loop's thread."""

    loop: Loop
    lost_to_server: int
    """How many datagrams to servers were dropped."""
    lost_by_kernel: int
    """How many datagrams of servers the kernel has dropped for lack of room."""
    kept_bytes: int
    """What all flows keep of their first datagrams."""
    bursts: int
    """How many flows have room for a burst of their server's."""

    def answer(self, flow_id: int, data: bytes, segment: int) -> None:
        """The server of a flow has sent datagrams."""

    def end(self, flow_id: int, code: FlowCode) -> None:
        """A flow has ended here."""

    def left(self, flow_id: int) -> None:
        """The other end has ended a flow."""


class UdpFlow:
    """The end of a flow that `relay.flowmux` asks for. It ends by itself where the server's port is closed.

    ``addresses`` are where its server may be, in the order in which to try. Raises OSError if there is no
    socket for it.
    """

    __slots__ = (
        "_addresses",
        "_event",
        "_has_burst",
        "_header",
        "_is_answered",
        "_kept",
        "_looked_at",
        "_lost",
        "_moved_at",
        "_new",
        "_owner",
        "_sock",
        "_turn",
    )

    def __init__(
        self,
        owner: FlowOwner,
        event: FlowRequested,
        new: NewSocket = new_socket,
        addresses: Iterable[ServerAddress] = LOCALHOSTS,
    ) -> None:
        self._owner = owner
        self._event = event
        self._header = datagram_header(event.proxy, event.origin)
        self._addresses = iter(addresses)
        self._new = new
        self._has_burst = False
        self._sock: socket.socket | None = None
        self._kept: list[tuple[bytes, int]] | None = []
        self._is_answered = False
        self._moved_at = self._looked_at = time.monotonic()
        self._lost = Lost()
        self._turn = -1
        self._connect()

    def look(self, now: float) -> bool:
        """Count what the kernel has dropped, and return whether nothing has moved for too long.

        What it drops comes behind something that moves; so where nothing has since the last look, it is not
        asked, and room for a burst goes back while half of all there is has been given.
        """
        if self._moved_at >= self._looked_at:
            self._count_lost()
        elif self._has_burst and self._owner.bursts > BURSTS_MAX // 2:
            self._set_burst(False)
        self._looked_at = now
        return now - self._moved_at >= (ANSWERED_S if self._is_answered else UNANSWERED_S)

    def settle(self) -> None:
        """Keep no first datagrams any more: no other address will be tried."""
        if self._kept is not None:
            self._owner.kept_bytes -= sum(len(data) for data, _ in self._kept)
            self._kept = None

    def close(self) -> None:
        """Let go of the socket; a second call changes nothing."""
        self.settle()
        self._leave_socket()
        if self._has_burst:
            self._set_burst(False)

    # As the end of a flow

    def deliver(self, data: memoryview, segment: int) -> None:
        self._moved_at = time.monotonic()
        if not self._has_burst and self._owner.bursts < BURSTS_MAX and self._sock is not None:
            self._set_burst(True)
        if not self._header:
            self._send(data, segment)
            return
        too_long = count(len(data), segment)
        for batch, its_segment in with_header(self._header, data, segment):
            too_long -= count(len(batch), its_segment)
            self._send(batch, its_segment)
        self._owner.lost_to_server += too_long

    def ended(self, code: FlowCode) -> None:
        self.close()
        self._owner.left(self._event.flow_id)

    def fail(self) -> None:
        self._end(FlowCode.INTERNAL)

    # To and from the server

    def _send(self, data: Buffer, segment: int) -> None:
        kept = self._kept
        if kept is not None and len(kept) < _KEPT_MAX and self._owner.kept_bytes + len(data) <= KEPT_BYTES:
            kept.append((bytes(data), segment))
            self._owner.kept_bytes += len(data)
            self._send_now(data, segment, is_kept=True)
        else:
            self._send_now(data, segment)

    def _send_now(self, data: Buffer, segment: int, is_kept: bool = False) -> None:
        sock = self._sock
        sent, problem = (0, None) if sock is None else send(sock, data, segment)
        if isinstance(problem, ConnectionRefusedError) and is_kept:
            self._closed_there(FlowCode.REFUSED)  # and if there is another address, it has gone there
            return
        self._owner.lost_to_server += count(len(data), segment) - sent
        if isinstance(problem, ConnectionRefusedError):
            self._closed_there(FlowCode.REFUSED)

    def _on_socket(self, _events: int) -> None:
        if self._sock is None:
            return
        problem: FlowCode | None = None
        left_bytes = READ_MAX_BYTES
        loop = self._owner.loop
        most = 1 if loop.turn != self._turn + 1 else reads(loop.served)  # as in `exposed.udpport`
        self._turn = loop.turn
        for number in range(READS_MAX):
            if problem is None and number >= most:
                break
            try:
                data, segment = receive_connected(self._sock)
            except BlockingIOError:
                break
            except ConnectionRefusedError:  # what the server sent before that comes behind it
                problem = FlowCode.REFUSED
                continue
            except OSError:
                problem = problem or FlowCode.UNREACHABLE
                continue
            self._is_answered = True
            self._moved_at = time.monotonic()
            self.settle()
            self._owner.answer(self._event.flow_id, data, segment)
            left_bytes -= len(data)
            if left_bytes <= 0:
                break
        if problem is not None:
            self._closed_there(problem)

    def _closed_there(self, code: FlowCode) -> None:
        """Nobody is at the server's port. Try the next address, unless somebody was at this one."""
        if self._is_answered or not self._try_next():
            self._end(code)
            return
        for data, segment in self._kept or ():
            self._send_now(data, segment)
        self.settle()

    def _try_next(self) -> bool:
        """Connect to the next address instead, and return whether there is one."""
        self._leave_socket()
        try:
            self._connect()
        except OSError:
            return False
        return True

    def _count_lost(self) -> None:
        if self._sock is not None:
            self._owner.lost_by_kernel += self._lost.more(self._sock)

    def _set_burst(self, has_burst: bool) -> None:
        self._has_burst = has_burst
        self._owner.bursts += 1 if has_burst else -1
        if self._sock is not None:
            with suppress(OSError):
                self._set_room(self._sock)

    def _set_room(self, sock: socket.socket) -> None:
        room = _BURST_BYTES if self._has_burst else _FEW_BYTES
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)

    def _leave_socket(self) -> None:
        if self._sock is not None:
            self._count_lost()
            self._lost = Lost()
            self._owner.loop.unwatch(self._sock.fileno())
            self._sock.close()
            self._sock = None

    def _connect(self) -> None:
        """Connect to the next address of the server. Raises OSError if there is none."""
        trouble: OSError | None = None
        for family, host in self._addresses:
            try:
                sock = connected(family, host, self._event.port, self._new)
            except OSError as error:
                trouble = trouble or error
                continue
            try:
                self._set_room(sock)
                self._owner.loop.watch(sock.fileno(), READ, self._on_socket, self.fail)
            except OSError as error:
                sock.close()
                trouble = trouble or error
                continue
            self._sock = sock
            return
        raise trouble or ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))

    def _end(self, code: FlowCode) -> None:
        self.close()
        self._owner.end(self._event.flow_id, code)


def with_header(header: bytes, data: memoryview, segment: int) -> Iterator[tuple[bytes, int]]:
    """Each datagram of a batch with the header in front of it, in as few batches as it takes.

    Those that the header makes too long are left out.
    """
    whole = len(header) + segment
    if not segment or whole > MAX_DATAGRAM_BYTES:
        step = segment or max(len(data), 1)
        for start in range(0, max(len(data), 1), step):
            if len(header) + len(data[start : start + step]) <= MAX_DATAGRAM_BYTES:
                yield header + data[start : start + step], 0
        return
    most = min(MAX_SEGMENTS, MAX_DATAGRAM_BYTES // whole) * segment
    for first in range(0, len(data), most):
        part = data[first : first + most]
        each = (header + part[start : start + segment] for start in range(0, len(part), segment))
        yield b"".join(each), whole if len(part) > segment else 0
