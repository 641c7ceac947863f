# SPDX-License-Identifier: GPL-2.0-or-later
"""Clients and a server of UDP that number what they send, and judge everything that arrives.

All are in one process, so what was sent and what was heard are compared at once, and a datagram that was sent
after a forward had closed is known by its time.
"""

import math
import socket
import struct
import time
from collections import deque
from dataclasses import dataclass, field
from ipaddress import ip_network
from random import Random

import trio

from .findings import Findings

# Of which flow it is, its number in that direction, when it was sent, and whether it is an answer.
_HEAD = struct.Struct("!IId?")
_MOST = 65_507
# Empty ones and others that are too short for a number, what fits into a frame of Ethernet, and the largest.
_SIZES = (0, 1, _HEAD.size - 1, 40, 40, 40, 100, 100, 512, 1200, 1472, 9000, 32_768, _MOST)
_FLOOD_BYTES = 1200
# The PROXY protocol, section 2.2: how a header of version 2 begins for datagrams over IPv4 and over IPv6. Its
# length follows, then addresses and ports.
_HEADERS = tuple(b"\r\n\r\n\0\r\nQUIT\n\x21" + family for family in (b"\x12", b"\x22"))
_LENGTH_AT, _ADDRESSES_AT = 14, 16
# linux/sock_diag.h and asm-generic/socket.h: nine numbers about a socket, the last is what it has dropped.
_SO_MEMINFO, _MEMINFO = 55, struct.Struct("=9I")
_PEERS_MAX = 32
# What is read of one socket before others have their turn.
_READS = 64


@dataclass(slots=True)
class Heard:
    """What has arrived of a flow in one direction."""

    numbers: set[int] = field(default_factory=set)
    last: int = -1

    def problem(self, number: int, is_calm: bool) -> str | None:
        """Take one in. In calm each comes behind all that were sent before it, and always but once."""
        if number in self.numbers:
            return f"number {number} has come twice"
        late = is_calm and number < self.last
        self.numbers.add(number)
        self.last = max(self.last, number)
        return f"number {number} has come behind a later one" if late else None


@dataclass(slots=True)
class Group:
    """Clients of one network, who write to ``host``.

    What they send must not pass after ``closed_at``, and no answer comes for them while it ``is_shut``.
    """

    name: str
    network: str
    host: str
    closed_at: float = math.inf
    is_shut: bool = False

    def open(self) -> None:
        self.closed_at, self.is_shut = math.inf, False

    def close(self, *, is_shut: bool) -> None:
        self.closed_at, self.is_shut = time.monotonic(), is_shut


class Flow:
    """A client with a socket of its own.

    ``drains``: it may go on though its group is closed. ``headers``: whether the server gets a PROXY header
    in front of what it sends, where both may be.
    """

    def __init__(
        self, group: Group, flow_id: int, sock: socket.socket, to: tuple[str, int], headers: set[bool]
    ) -> None:
        self.group = group
        self.flow_id = flow_id
        self.sock = sock
        self.to = to
        self.drains = False
        self.headers = headers
        self.asked = self.answers = self.shorts = 0
        self.there, self.back = Heard(), Heard()

    def addresses(self) -> bytes:
        """What a PROXY header says of it."""
        own, own_port = self.sock.getsockname()[:2]
        to, to_port = self.to
        packed = b"".join(socket.inet_pton(self.sock.family, host) for host in (own, to))
        return packed + struct.pack("!HH", own_port, to_port)

    def __str__(self) -> str:
        return f"flow {self.flow_id} of {self.group.name}"


class Datagrams:
    """The clients, the server, and the account of what both have sent and heard."""

    def __init__(self, findings: Findings, seed: int, target_port: int) -> None:
        self.findings = findings
        self.sent = self.heard = 0
        """Datagrams of both directions."""
        self.to_nobody = 0
        """Of what was sent: while nobody listened."""
        self.is_calm = True
        self.is_port_closed = False
        self.flows: dict[int, Flow] = {}
        self._target_port = target_port
        self._random = Random(f"{seed} datagrams")
        self._body = self._random.randbytes(2 * (_MOST + 1))
        self._next_id = self._shorts = self._dropped = 0
        self._headers = {False}
        self._server: socket.socket | None = None
        self._peers: deque[tuple[Flow, tuple[str, int]]] = deque(maxlen=_PEERS_MAX)

    # Clients

    def begin(self, group: Group, port: int) -> Flow:
        """A new client, at some address of the group's network; it hears, with `listen_to`."""
        network = ip_network(group.network)
        sock = socket.socket(socket.AF_INET6 if network.version == 6 else socket.AF_INET, socket.SOCK_DGRAM)
        sock.setblocking(False)
        sock.bind((str(network[self._random.randrange(network.num_addresses)]), 0))
        self._next_id += 1
        flow = Flow(group, self._next_id, sock, (group.host, port), set(self._headers))
        self.flows[self._next_id] = flow
        return flow

    def may_have_header(self, has_header: bool) -> None:
        """From now on the server may be told who sends what, or may no longer."""
        self._headers.add(has_header)
        for flow in self.flows.values():
            flow.headers.add(has_header)

    def must_have_header(self, has_header: bool) -> None:
        """From now on it is like that for each client that begins."""
        self._headers = {has_header}

    def ask(self, flow: Flow, size: int | None = None) -> None:
        """Send one datagram, by default of any size."""
        size = self._random.choice(_SIZES) if size is None else size
        if size < _HEAD.size:
            data = bytes([flow.flow_id & 0xFF]) * size
        else:
            data = self._made(flow.flow_id, flow.asked, size, is_answer=False)
        try:
            flow.sock.sendto(data, flow.to)
        except BlockingIOError:
            return
        self.sent += 1
        self.to_nobody += self.is_port_closed and not flow.drains
        if size < _HEAD.size:
            flow.shorts += 1
            self._shorts += 1
        else:
            flow.asked += 1

    def flood(self, flow: Flow, number: int) -> None:
        for _ in range(number):
            self.ask(flow, _FLOOD_BYTES)

    async def listen_to(self, flow: Flow) -> None:
        """Hear and judge answers until the flow is closed."""
        while flow.flow_id in self.flows:
            try:
                await trio.lowlevel.wait_readable(flow.sock)
            except trio.ClosedResourceError:
                return
            self.hear(flow)

    def hear(self, flow: Flow) -> None:
        """Judge what has come for a client by now."""
        while flow.sock.fileno() >= 0:
            try:
                data, sender = flow.sock.recvfrom(1 << 16)
            except BlockingIOError:
                return
            self.heard += 1
            self.findings.played["answers"] += 1
            self._judge_answer(flow, data, sender)

    def end(self, flow: Flow) -> None:
        """Close a client, once nothing comes for it any more."""
        self.hear(flow)
        del self.flows[flow.flow_id]
        self._dropped += _dropped_by(flow.sock)
        trio.lowlevel.notify_closing(flow.sock)
        flow.sock.close()

    def _judge_answer(self, flow: Flow, data: bytes, sender: tuple[str, int]) -> None:
        problem = None
        if sender[:2] != flow.to:
            problem = f"it is from {sender}, not from {flow.to}"
        elif flow.group.is_shut and not flow.drains:
            problem = "it has passed after the forward was closed"
        elif len(data) < _HEAD.size:
            flow.shorts -= 1
            if flow.shorts < 0 or data.strip(bytes([flow.flow_id & 0xFF])):
                problem = "it is short and another's, or has come twice"
        else:
            flow_id, number, _, is_answer = _HEAD.unpack_from(data)
            if flow_id != flow.flow_id or not is_answer or number >= flow.answers:
                problem = f"it was sent to flow {flow_id}, with the number {number}"
            elif not self._is_whole(data, flow_id, number):
                problem = f"number {number} is not as it was sent"
            else:
                problem = flow.back.problem(number, self.is_calm)
        if problem is not None:
            self.findings.note(f"an answer of {len(data)} bytes to {flow}: {problem}")

    # The server

    def open_server(self) -> None:
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        server.setblocking(False)
        server.bind(("127.0.0.1", self._target_port))
        self._server = server

    def close_server(self) -> None:
        """It stops; what has come for it by now is still heard, and answered."""
        server, self._server = self._server, None
        if server is not None:
            while self._serve_one(server):
                pass
            self._dropped += _dropped_by(server)
            trio.lowlevel.notify_closing(server)
            server.close()
            self._peers.clear()

    async def serve(self) -> None:
        """Answer until the server is closed."""
        server = self._server
        while server is not None and server is self._server:
            try:
                await trio.lowlevel.wait_readable(server)
            except trio.ClosedResourceError:
                return
            for _ in range(_READS):
                if server is not self._server or not self._serve_one(server):
                    break

    def flood_clients(self, number: int) -> None:
        """The server sends without being asked, to those who asked last."""
        for index in range(number):
            if self._server is None or not self._peers:
                return
            flow, peer = self._peers[index % len(self._peers)]
            self._answer(self._server, flow, peer, _FLOOD_BYTES)

    def _serve_one(self, server: socket.socket) -> bool:
        try:
            data, peer = server.recvfrom(1 << 16)
        except BlockingIOError:
            return False
        except ConnectionRefusedError:
            return True
        self.heard += 1
        self.findings.played["questions"] += 1
        addresses, data = _without_header(data)
        if len(data) < _HEAD.size:
            self._shorts -= 1
            if self._shorts < 0:
                self.findings.note("more short questions have come than were sent")
            if _sent(server, data, peer):
                self.sent += 1
            return True
        flow_id, number, sent_at, is_answer = _HEAD.unpack_from(data)
        flow = self.flows.get(flow_id)
        if flow is None:
            self.findings.note(f"a question of flow {flow_id}, which is over or never was")
            return True
        problem = None
        if is_answer or number >= flow.asked or not self._is_whole(data, flow_id, number):
            problem = "it is not as it was sent"
        elif (addresses is not None) not in flow.headers:
            problem = f"it has {'no' if addresses is None else 'a'} PROXY header"
        elif addresses not in (None, flow.addresses()):
            problem = f"its PROXY header says {addresses!r}"
        elif sent_at > flow.group.closed_at and not flow.drains:
            problem = f"it was sent {sent_at - flow.group.closed_at:.3f} s after the forward was closed"
        else:
            problem = flow.there.problem(number, self.is_calm)
        if problem is not None:
            self.findings.note(f"a question of {len(data)} bytes, number {number} of {flow}: {problem}")
        self._peers.append((flow, peer))
        self._answer(server, flow, peer, len(data))
        return True

    def _answer(self, server: socket.socket, flow: Flow, peer: tuple[str, int], size: int) -> None:
        if _sent(server, self._made(flow.flow_id, flow.answers, size, is_answer=True), peer):
            flow.answers += 1
            self.sent += 1

    # What both send

    def _made(self, flow_id: int, number: int, size: int, *, is_answer: bool) -> bytes:
        head = _HEAD.pack(flow_id, number, time.monotonic(), is_answer)
        return head + self._filling(flow_id, number, size - _HEAD.size)

    def _is_whole(self, data: bytes, flow_id: int, number: int) -> bool:
        return data[_HEAD.size :] == self._filling(flow_id, number, len(data) - _HEAD.size)

    def _filling(self, flow_id: int, number: int, size: int) -> bytes:
        start = (flow_id * 8191 + number * 31) % _MOST
        return self._body[start : start + size]

    # The account

    @property
    def dropped(self) -> int:
        """How many datagrams the sockets of the clients and of the server had no room for."""
        live = [flow.sock for flow in self.flows.values()]
        if self._server is not None:
            live.append(self._server)
        return self._dropped + sum(map(_dropped_by, live))


def _without_header(data: bytes) -> tuple[bytes | None, bytes]:
    """What a PROXY header in front of it says, and what follows."""
    if not data.startswith(_HEADERS):
        return None, data
    end = _ADDRESSES_AT + int.from_bytes(data[_LENGTH_AT:_ADDRESSES_AT], "big")
    return data[_ADDRESSES_AT:end], data[end:]


def _sent(server: socket.socket, data: bytes, peer: tuple[str, int]) -> bool:
    """Send, unless the kernel has no room. An error is of a datagram before this one, so try again."""
    for _ in range(_PEERS_MAX):
        try:
            server.sendto(data, peer)
        except ConnectionRefusedError:
            continue
        except BlockingIOError:
            return False
        return True
    return False


def _dropped_by(sock: socket.socket) -> int:
    """How many datagrams a socket had no room for."""
    return int(_MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size))[8])
