# SPDX-License-Identifier: GPL-2.0-or-later
"""Live connections along a path of qubes, of which one stops to let some through."""

import select
import socket
from contextlib import ExitStack, suppress
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import pytest
from helpers import BOUND_S
from wired import FAMILIES, FIREWALL, LAN, NET, V4, WORK, Addresses, Wired

from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.common.nftconfig import NftConfig, Role
from qubes_fwd_qrexec.common.values import (
    ListenPorts,
    Proto,
    QubeName,
    RuleName,
    Sources,
    TargetPorts,
    parse_address,
    unmapped,
)
from qubes_fwd_qrexec.firewall.cutting import Cutter
from qubes_fwd_qrexec.firewall.inforce import InForce
from qubes_fwd_qrexec.firewall.nfttool import Nft
from qubes_fwd_qrexec.firewall.pathrules import Kept
from qubes_fwd_qrexec.firewall.wanted import Firewall, Wanted
from qubes_fwd_qrexec.lab.stockrules import Shape

PATH = (NET, FIREWALL, WORK)
# The rules of Qubes 4.2 and 4.3.
shapes = pytest.mark.parametrize("shape", list(Shape))
# What is closed, and what goes on beside it: exposed ports, and those of the target.
CLOSED, KEPT = (80, 8080), (81, 8081)
EVERYBODY = Sources.parse("192.168.77.0/24,192.168.88.0/24,fd77::/64,fd88::/64")
ALLOWED = Sources.parse("192.168.77.0/24,fd77::/64")
# As `socket` has it.
_Peer = tuple[Any, ...]


def configs(
    proto: Proto, ports: tuple[int, int], name: str = "closed", sources: Sources = EVERYBODY
) -> dict[str, NftConfig]:
    """What the qubes of the path are told about a forward."""
    exposed, own = ListenPorts(ports[0], ports[0]), TargetPorts(ports[0], ports[0])
    mapped = TargetPorts(ports[1], ports[1])
    hop = NftConfig(
        target=QubeName(WORK),
        name=RuleName(f"{name}-{proto}"),
        role=Role.HOP,
        side=Side.OUTER,
        proto=proto,
        listen_ports=exposed,
        target_ports=own,
        sources=sources,
        to4=IPv4Address(V4.firewall),
        to6=IPv6Address(FAMILIES[1].firewall),
    )
    last = replace(
        hop,
        side=Side.UPLINK,
        target_ports=mapped,
        to4=IPv4Address(V4.work),
        to6=IPv6Address(FAMILIES[1].work),
    )
    listen = ListenPorts(ports[1], ports[1])
    target = replace(last, role=Role.TARGET, listen_ports=listen, to4=None, to6=None)
    return dict(zip(PATH, (hop, last, target), strict=True))


class Helper:
    """What the program does in one qube at each change; it notices nothing by itself."""

    def __init__(self, wired: Wired, qube: str) -> None:
        self._enter = wired.places.entering(qube)
        self._firewall = Firewall(Nft())
        self._in_force = InForce(self._firewall, Cutter())
        self.qube = qube
        self.kept: tuple[Kept, ...] = ()

    def put(self, *kept: Kept) -> None:
        self.kept = kept
        with self._enter():
            self._in_force.put(Wanted(paths=kept))

    def only_rules(self, *kept: Kept) -> None:
        """As they would be with the time; the program is dead, and ends nothing."""
        with self._enter():
            self._firewall.keep(Wanted(paths=kept))


class Flow:
    """A flow of UDP, or a connection of TCP: the client's socket, and the server's towards that client."""

    def __init__(self, client: socket.socket, server: socket.socket, peer: _Peer | None = None) -> None:
        """``peer``: the client as the server's socket of UDP has it."""
        self.client = client
        self._server = server
        self._peer = peer
        for sock in (client, server):
            sock.setblocking(False)

    def to_server(self, data: bytes) -> None:
        self.client.sendall(data)

    def to_client(self, data: bytes) -> None:
        if self._peer is None:
            self._server.sendall(data)
        else:
            self._server.sendto(data, self._peer)

    def at_server(self) -> bytes:
        """What comes next to the server."""
        return _next(self._server)

    def at_client(self) -> bytes:
        return _next(self.client)

    def is_alive(self) -> bool:
        self.to_server(b"q")
        question = self.at_server()
        self.to_client(b"a")
        return (question, self.at_client()) == (b"q", b"a")

    def assert_silent(self, beside: "Flow") -> None:
        """Nothing passes in either direction, while it does by the flow beside it."""
        self.assert_client_unheard(beside)
        self.assert_server_unheard(beside)

    def assert_over(self, proto: Proto, beside: "Flow") -> None:
        """Whoever goes on is reset, or is not heard by UDP; ``beside`` lives."""
        if proto is Proto.UDP:
            self.assert_silent(beside)
        else:
            self.to_client(b"lost")
            self.assert_server_ended()
            self.to_server(b"lost")
            self.assert_client_reset()
        assert beside.is_alive()

    def assert_client_unheard(self, beside: "Flow") -> None:
        self.to_server(b"lost")
        beside.to_server(b"x")
        assert beside.at_server() == b"x"
        with pytest.raises(BlockingIOError):
            self._server.recv(64)

    def assert_server_unheard(self, beside: "Flow") -> None:
        with suppress(PermissionError):  # as a rule of its own qube tells a program at once
            self.to_client(b"lost")
        beside.to_client(b"x")
        assert beside.at_client() == b"x"
        with pytest.raises(BlockingIOError):
            self.client.recv(64)

    def assert_client_reset(self) -> None:
        """The client's next news is the end; nothing came before it."""
        with pytest.raises(ConnectionResetError):
            self.at_client()

    def assert_server_ended(self) -> None:
        with pytest.raises(ConnectionError):
            self.at_server()


def _next(sock: socket.socket) -> bytes:
    assert select.select([sock], [], [], BOUND_S)[0]
    return sock.recv(64)


class Road:
    """The path with both forwards in force everywhere, and what serves them."""

    def __init__(self, wired: Wired, opened: ExitStack, proto: Proto) -> None:
        self.wired = wired
        self.proto = proto
        self._opened = opened
        self.closed = configs(proto, CLOSED)
        self.kept = configs(proto, KEPT, "kept")
        self.helpers = {qube: Helper(wired, qube) for qube in PATH}
        for qube in reversed(PATH):
            self.put(qube, self.closed[qube])
        self._servers = {
            (one, port): wired.serve(one, WORK, port) for one in proto.each for _, port in (CLOSED, KEPT)
        }

    def put(self, qube: str, *now: NftConfig) -> None:
        """What is in force in one qube, beside the forward that is kept."""
        self.helpers[qube].put(*map(Kept, now), Kept(self.kept[qube]))

    def open(
        self,
        family: Addresses,
        ports: tuple[int, int] = CLOSED,
        source: str = "",
        proto: Proto | None = None,
    ) -> Flow:
        """A live connection of a client on the LAN, whose address the server sees."""
        exposed, own = ports
        proto = proto or self.proto
        server = self._servers[proto, own]
        source = source or family.lan
        if proto is Proto.TCP:
            client = self.wired.connect(LAN, family.net, exposed, source)
            far, seen = server.accept()
            flow = Flow(client, far)
        else:
            client = self._datagrams(source)
            client.connect((family.net, exposed))
            client.send(b"first")
            assert select.select([server.sock], [], [], BOUND_S)[0]
            data, peer = server.sock.recvfrom(64)
            assert data == b"first"
            flow, seen = Flow(client, server.sock, peer), str(peer[0])
        assert unmapped(parse_address(seen.removeprefix("::ffff:"))) == ip_address(source)
        assert flow.is_alive()
        return flow

    def both(self, ports: tuple[int, int] = CLOSED, proto: Proto | None = None) -> list[Flow]:
        """One in each family."""
        return [self.open(family, ports, proto=proto) for family in FAMILIES]

    def is_open(self, family: Addresses) -> bool:
        """Whether somebody new comes through to the server."""
        said = self.wired.send(self.proto, LAN, family.net, CLOSED[0], family.lan)
        return said == f"answered by {WORK}"

    def nft(self, qube: str, *arguments: str) -> str:
        return self.wired.run(qube, "nft", *arguments).stdout

    def _datagrams(self, source: str) -> socket.socket:
        family = socket.AF_INET6 if ":" in source else socket.AF_INET
        with self.wired.places.entering(LAN)():
            sock = self._opened.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        sock.bind((source, 0))
        return sock
