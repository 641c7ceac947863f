# SPDX-License-Identifier: GPL-2.0-or-later
"""Live traffic along the path of forwards by nft, which judges every packet that has passed.

Each message says of what kind it is and when it was sent. A message that arrives was let through at some time
between, and there must have been a permit for it then.
"""

import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from typing import Any

import trio

from bench.road import FIREWALL, NET, WORK, Road
from qubes_fwd_qrexec.common.values import Proto

from .findings import Findings
from .permits import Permit

# The number of the kind, and when it was sent.
_MESSAGE = struct.Struct("!Id")
_LIFE_S = (0.3, 4.0)
_EACH_S = (0.03, 0.2)
_CONNECT_S = 1.5
_AGAIN_S = 0.05
# How often something is sent that must never arrive, and how many may be on their way.
_PROBE_S = 0.02
_PROBES_MAX = 64
# A server goes on for so long with clients of which it hears nothing.
_SERVE_S = 6.0
_PUSH_S = 0.25
_PEERS_MAX = 16
# Of `socket`, from linux/in.h and linux/in6.h: as in tests, addresses that are another's.
_TRANSPARENT = {4: (socket.IPPROTO_IP, 19), 6: (socket.IPPROTO_IPV6, 75)}

clock = time.monotonic


@dataclass(frozen=True, slots=True)
class Kind:
    """Packets from a qube or the LAN, and when they may pass. ``source`` may be another's address."""

    qube: str
    version: int
    proto: Proto
    source: str
    to: str
    port: int
    permit: Permit

    def __str__(self) -> str:
        whence = f"{self.qube} as {self.source}" if self.source else self.qube
        return f"{self.proto} from {whence} to {self.to} port {self.port}"


class Traffic:
    """Clients and servers of all kinds of packets."""

    def __init__(self, road: Road, findings: Findings, seed: int) -> None:
        self.kinds: list[Kind] = []
        self.arrived: Counter[int] = Counter()
        """How many messages of each kind a server got."""
        self._road = road
        self._findings = findings
        self._random = Random(f"{seed} traffic")

    async def run(self, live: Sequence[Kind], never: Sequence[Kind], ports: Iterable[int]) -> None:
        """Go on until cancelled. ``live`` kinds are flows that go on; of the others one packet is sent."""
        self.kinds = [*live, *never]
        async with trio.open_nursery() as nursery:
            for qube in (NET, FIREWALL, WORK):
                for port in ports:
                    for version in (4, 6):
                        nursery.start_soon(self._serve_datagrams, self._bound(qube, version, Proto.UDP, port))
                        listening = self._bound(qube, version, Proto.TCP, port)
                        listening.listen(64)
                        nursery.start_soon(self._serve_streams, listening)
            for number in range(len(live)):
                nursery.start_soon(self._flow_after_flow, number)
            nursery.start_soon(self._probe, range(len(live), len(self.kinds)))

    # Clients

    async def _flow_after_flow(self, number: int) -> None:
        while True:
            with trio.move_on_after(self._random.uniform(*_LIFE_S)), suppress(OSError):
                await self._flow(number)
            await trio.sleep(_AGAIN_S)

    async def _flow(self, number: int) -> None:
        with self._client(number) as sock:
            await self._connect(sock, number)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._hear, sock, number)
                while True:
                    if not await _send(sock, number):
                        break
                    await trio.sleep(self._random.uniform(*_EACH_S))
                self._findings.played["flows that were ended"] += 1
                nursery.cancel_scope.cancel()

    async def _hear(self, sock: trio.socket.SocketType, number: int) -> None:
        """What a client hears must have passed as well."""
        while data := await _receive(sock):
            self._judge(number, _MESSAGE.unpack(data)[1], "an answer")

    async def _probe(self, numbers: Sequence[int]) -> None:
        slots = trio.CapacityLimiter(_PROBES_MAX)
        async with trio.open_nursery() as nursery:
            while True:
                for number in self._random.sample(numbers, len(numbers)):
                    await slots.acquire_on_behalf_of(token := object())
                    nursery.start_soon(self._probe_once, number, slots, token)
                    await trio.sleep(_PROBE_S)

    async def _probe_once(self, number: int, slots: trio.CapacityLimiter, token: object) -> None:
        with trio.move_on_after(_CONNECT_S), suppress(OSError), self._client(number) as sock:
            await self._connect(sock, number)
            await _send(sock, number)
        self._findings.played["packets that must not pass"] += 1
        slots.release_on_behalf_of(token)

    async def _connect(self, sock: trio.socket.SocketType, number: int) -> None:
        kind, begun = self.kinds[number], clock()
        with trio.move_on_after(_CONNECT_S) as bound:
            await sock.connect((kind.to, kind.port))
        if bound.cancelled_caught:
            raise TimeoutError
        if kind.proto is Proto.TCP:
            self._judge(number, begun, "a connection")

    def _client(self, number: int) -> trio.socket.SocketType:
        kind = self.kinds[number]
        sock = self._road.socket(kind.qube, kind.version, _type(kind.proto))
        if kind.source:
            sock.setsockopt(*_TRANSPARENT[kind.version], 1)
            sock.bind((kind.source, 0))
        return trio.socket.from_stdlib_socket(sock)

    # Servers

    def _bound(self, qube: str, version: int, proto: Proto, port: int) -> trio.socket.SocketType:
        sock = self._road.socket(qube, version, _type(proto))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("0.0.0.0" if version == 4 else "::", port))
        return trio.socket.from_stdlib_socket(sock)

    async def _serve_datagrams(self, sock: trio.socket.SocketType) -> None:
        peers: deque[tuple[float, int, Any]] = deque(maxlen=_PEERS_MAX)
        with sock:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._push_datagrams, sock, peers)
                while True:
                    data, peer = await sock.recvfrom(_MESSAGE.size)
                    number = self._arrive(data)
                    peers.append((clock(), number, peer))
                    await _send(sock, number, peer)

    async def _push_datagrams(
        self, sock: trio.socket.SocketType, peers: deque[tuple[float, int, Any]]
    ) -> None:
        while True:
            await trio.sleep(_PUSH_S)
            for heard, number, peer in list(peers):
                if heard > clock() - _SERVE_S:
                    await _send(sock, number, peer)

    async def _serve_streams(self, listening: trio.socket.SocketType) -> None:
        with listening:
            async with trio.open_nursery() as nursery:
                while True:
                    with suppress(OSError):
                        sock, _ = await listening.accept()
                        nursery.start_soon(self._serve_stream, sock)

    async def _serve_stream(self, sock: trio.socket.SocketType) -> None:
        with sock, trio.move_on_after(_SERVE_S) as silence:
            async with trio.open_nursery() as nursery:
                while data := await _receive(sock):
                    silence.deadline = trio.current_time() + _SERVE_S
                    number = self._arrive(data)
                    if not nursery.child_tasks:
                        nursery.start_soon(self._push_stream, sock, number)
                    await _send(sock, number)
                nursery.cancel_scope.cancel()

    async def _push_stream(self, sock: trio.socket.SocketType, number: int) -> None:
        while True:
            await trio.sleep(_PUSH_S)
            if not await _send(sock, number):
                return

    def _arrive(self, data: bytes) -> int:
        number, sent = _MESSAGE.unpack(data)
        self._judge(number, sent, "a message")
        self.arrived[number] += 1
        return int(number)

    def _judge(self, number: int, sent: float, what: str) -> None:
        """Something of a kind has passed since it was sent."""
        kind = self.kinds[number]
        if late_s := kind.permit.late_s(sent, clock()):
            when = "which no rule ever allowed" if late_s == float("inf") else f"{late_s:.2f} s too late"
            self._findings.note(f"{what} has passed {when}: {kind}")
        else:
            self._findings.played[f"{what} by {kind.proto}"] += 1


async def _send(sock: trio.socket.SocketType, number: int, peer: Any = None) -> bool:
    """Send a message. False if the connection or the way is gone, or if a rule of the qube itself says no."""
    message = _MESSAGE.pack(number, clock())
    try:
        await (sock.send(message) if peer is None else sock.sendto(message, peer))
    except OSError:
        return False
    return True


async def _receive(sock: trio.socket.SocketType) -> bytes:
    """One message; empty at the end."""
    data = b""
    while len(data) < _MESSAGE.size:
        try:
            more = await sock.recv(_MESSAGE.size - len(data))
        except OSError:
            return b""
        if not more:
            return b""
        data += more
    return data


def _type(proto: Proto) -> socket.SocketKind:
    return socket.SOCK_STREAM if proto is Proto.TCP else socket.SOCK_DGRAM
