# SPDX-License-Identifier: GPL-2.0-or-later
"""Closing closes: what becomes of live connections when one qube of the path stops letting them through.

Each qube is tested alone, while the two others go on as if nothing had happened. Beside what is closed there
is always another forward on the same path, whose packets are sent after those that must not arrive: once they
are there, the others would have been.
"""

import json
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import pytest
from helpers import BOUND_S
from spaces import Spaces
from wired import BESIDE_WORK, FAMILIES, FIREWALL, LAN, NET, PROBLEM, V4, WORK, Addresses, Wired

from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.common.nftconfig import NftConfig, Role
from qubes_fwd_qrexec.common.rules import OnExpire
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
from qubes_fwd_qrexec.firewall.cutting import TCP_HOLD_S, UDP_HOLD_S, Cutter
from qubes_fwd_qrexec.firewall.inforce import InForce
from qubes_fwd_qrexec.firewall.nfttool import Nft
from qubes_fwd_qrexec.firewall.pathrules import DRAIN_MAX_S, Kept
from qubes_fwd_qrexec.firewall.tables import OWN
from qubes_fwd_qrexec.firewall.wanted import Firewall, Wanted
from qubes_fwd_qrexec.lab.stockrules import Shape

pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))

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


@pytest.fixture
def wired(fresh: Wired) -> Wired:
    return fresh


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def tcp(wired: Wired, opened: ExitStack) -> Road:
    return Road(wired, opened, Proto.TCP)


@pytest.fixture
def udp(wired: Wired, opened: ExitStack) -> Road:
    return Road(wired, opened, Proto.UDP)


@shapes
@pytest.mark.parametrize("qube", PATH)
def test_a_client_that_goes_on_gets_a_reset_and_so_does_the_server(
    tcp: Road, qube: str, shape: Shape
) -> None:
    flows, beside = tcp.both(), tcp.both(KEPT)
    tcp.put(qube)
    for flow in flows:
        if qube != WORK:
            flow.to_server(b"lost")
        flow.assert_client_reset()
        if qube != WORK:
            flow.to_client(b"lost")
        flow.assert_server_ended()
    assert not any(tcp.is_open(family) for family in FAMILIES)
    assert all(flow.is_alive() for flow in beside)


@pytest.mark.parametrize("qube", [NET, FIREWALL])
def test_a_server_that_goes_on_gets_a_reset_and_its_client_nothing_of_it(tcp: Road, qube: str) -> None:
    """What it sends would make a new entry, and come to the client as if nothing had happened."""
    flows = tcp.both()
    tcp.put(qube)
    for flow in flows:
        flow.to_client(b"lost")
        flow.assert_server_ended()
        flow.to_server(b"lost")
        flow.assert_client_reset()


def test_an_idle_connection_is_ended_by_the_target_though_nobody_moves(tcp: Road) -> None:
    flows = tcp.both()
    tcp.put(WORK)
    for flow in flows:
        flow.assert_client_reset()
        flow.assert_server_ended()


@shapes
@pytest.mark.parametrize("qube", PATH)
def test_udp_is_over_at_once_in_both_directions(udp: Road, qube: str, shape: Shape) -> None:
    flows, beside = udp.both(), udp.both(KEPT)
    udp.put(qube)
    for flow, other in zip(flows, beside, strict=True):
        flow.assert_silent(other)
        assert other.is_alive()
    assert not any(udp.is_open(family) for family in FAMILIES)


@pytest.mark.parametrize("qube", PATH)
def test_a_forward_that_is_open_again_works_beside_what_holds_the_old_connections(
    tcp: Road, qube: str
) -> None:
    """Also for a client whose SYN speaks of congestion, by bits that are none of the others' business."""
    tcp.wired.run(LAN, "sysctl", "-qw", "net.ipv4.tcp_ecn=1")
    old = tcp.both()
    tcp.put(qube)
    tcp.put(qube, tcp.closed[qube])
    new = tcp.both()
    for flow in old:
        if qube != WORK:
            flow.to_server(b"lost")
        flow.assert_client_reset()
    assert all(flow.is_alive() for flow in new)


@pytest.mark.parametrize("qube", PATH)
def test_udp_that_is_open_again_works_beside_what_holds_the_old_flows(udp: Road, qube: str) -> None:
    old = udp.both()
    udp.put(qube)
    for flow, beside in zip(old, udp.both(KEPT), strict=True):
        flow.assert_server_unheard(beside)
    udp.put(qube, udp.closed[qube])
    assert all(flow.is_alive() for flow in udp.both())
    assert all(flow.is_alive() for flow in old)  # as they would be new to the kernel


@pytest.mark.parametrize("qube", PATH)
def test_what_a_server_keeps_sending_by_udp_does_not_come_through_when_the_guards_are_over(
    udp: Road, qube: str
) -> None:
    """It would be something new that the target begins."""
    flows, beside = udp.both(), udp.both(KEPT)
    udp.put(qube)
    for flow, other in zip(flows, beside, strict=True):
        flow.assert_server_unheard(other)
    assert remove_guards(udp, qube, UDP_HOLD_S)
    for flow, other in zip(flows, beside, strict=True):
        flow.assert_silent(other)
        assert other.is_alive()


@pytest.mark.parametrize("qube", [NET, FIREWALL])
def test_a_connection_that_was_reset_is_gone_when_the_guards_are_over(tcp: Road, qube: str) -> None:
    flows, beside = tcp.both(), tcp.both(KEPT)
    tcp.put(qube)
    for flow in flows:
        flow.to_server(b"lost")
        flow.assert_client_reset()
        flow.to_client(b"lost")
        flow.assert_server_ended()
    assert remove_guards(tcp, qube, TCP_HOLD_S + 3600)
    assert not any(tcp.is_open(family) for family in FAMILIES)
    assert all(flow.is_alive() for flow in beside)


@pytest.mark.parametrize("qube", [NET, FIREWALL])
def test_a_connection_that_was_idle_for_hours_does_not_come_back(tcp: Road, qube: str) -> None:
    """Its ends have noticed nothing, and ask each other after two hours (tcp_keepalive_time)."""
    flows, beside = tcp.both(), tcp.both(KEPT)
    tcp.put(qube)
    assert not remove_guards(tcp, qube, 2 * 3600)
    for flow, one in zip(flows, beside, strict=True):
        flow.to_client(b"lost")
        flow.assert_server_ended()
        flow.to_server(b"lost")
        flow.assert_client_reset()
        assert one.is_alive()


def remove_guards(road: Road, qube: str, later_s: int) -> int:
    """As after so many seconds. Returns how many were over by then."""
    removed = 0
    for family in ("ip", "ip6"):
        listed = json.loads(road.nft(qube, "-j", "list", "table", family, OWN))["nftables"]
        for entry in listed:
            rule = entry.get("rule", {})
            word, _, rest = rule.get("comment", "").partition(" ")
            if word == "until" and int(rest.partition(" ")[0]) <= time.time() + later_s + 60:
                handle = str(rule["handle"])
                road.nft(qube, "delete", "rule", family, OWN, rule["chain"], "handle", handle)
                removed += 1
    return removed


@pytest.mark.parametrize("qube", PATH)
@pytest.mark.parametrize("proto", Proto.BOTH.each)
def test_only_those_lose_their_connections_who_are_let_in_no_more(
    wired: Wired, opened: ExitStack, proto: Proto, qube: str
) -> None:
    road = Road(wired, opened, proto)
    allowed = road.both()
    refused = [road.open(family, source=family.lan_refused) for family in FAMILIES]
    road.put(qube, replace(road.closed[qube], sources=ALLOWED))
    for flow, beside in zip(refused, allowed, strict=True):
        assert beside.is_alive()
        if proto is Proto.UDP:
            flow.assert_silent(beside)
        else:
            if qube != WORK:
                flow.to_server(b"lost")
            flow.assert_client_reset()
    assert all(road.is_open(family) for family in FAMILIES)


@pytest.mark.parametrize("qube", PATH)
def test_a_port_that_a_range_has_no_more_is_cut_alone(wired: Wired, opened: ExitStack, qube: str) -> None:
    """The range is first in force everywhere."""
    road = Road(wired, opened, Proto.TCP)
    for one in reversed(PATH):
        road.helpers[one].put(Kept(both_ports(road.closed[one])))
    kept, cut = road.both(CLOSED), road.both(KEPT)
    road.helpers[qube].put(Kept(road.closed[qube]))
    for flow in cut:
        if qube != WORK:
            flow.to_server(b"lost")
        flow.assert_client_reset()
    assert all(flow.is_alive() for flow in kept)


@pytest.mark.parametrize("qube", PATH)
def test_of_a_forward_of_both_protocols_each_ends_as_it_does_alone(
    wired: Wired, opened: ExitStack, qube: str
) -> None:
    """First UDP is taken out of it, and then TCP is closed too."""
    road = Road(wired, opened, Proto.BOTH)
    connections, flows = road.both(proto=Proto.TCP), road.both(proto=Proto.UDP)
    beside = road.both(KEPT, Proto.UDP)
    road.put(qube, replace(road.closed[qube], proto=Proto.TCP))
    for flow, one in zip(flows, beside, strict=True):
        flow.assert_silent(one)
    assert all(connection.is_alive() for connection in connections)
    road.put(qube)
    for connection in connections:
        if qube != WORK:
            connection.to_client(b"lost")
            connection.assert_server_ended()
            connection.to_server(b"lost")
        connection.assert_client_reset()
    assert all(flow.is_alive() for flow in beside)


def both_ports(config: NftConfig) -> NftConfig:
    """The range that begins with the only port."""
    exposed, own = config.listen_ports.first, config.target_ports.first
    return replace(
        config, listen_ports=ListenPorts(exposed, exposed + 1), target_ports=TargetPorts(own, own + 1)
    )


@pytest.mark.parametrize(("qube", "other"), [(NET, "beside_firewall"), (FIREWALL, "beside_work")])
@pytest.mark.parametrize("proto", Proto.BOTH.each)
def test_connections_do_not_go_on_to_the_old_place_when_the_next_hop_is_another_one(
    wired: Wired, opened: ExitStack, proto: Proto, qube: str, other: str
) -> None:
    """Nor to the new one."""
    road = Road(wired, opened, proto)
    flows, beside = road.both(), road.both(KEPT)
    to4, to6 = (getattr(family, other) for family in FAMILIES)
    road.put(qube, replace(road.closed[qube], to4=IPv4Address(to4), to6=IPv6Address(to6)))
    for flow, one in zip(flows, beside, strict=True):
        if proto is Proto.UDP:
            flow.assert_silent(one)
        else:
            flow.to_client(b"lost")
            flow.assert_server_ended()
            flow.to_server(b"lost")
            flow.assert_client_reset()
        assert one.is_alive()


@pytest.mark.parametrize("qube", PATH)
@pytest.mark.parametrize("proto", Proto.BOTH.each)
def test_when_time_is_over_the_kernel_alone_lets_nothing_through(
    wired: Wired, opened: ExitStack, proto: Proto, qube: str
) -> None:
    """The program is dead: it has made rules with an end, and that has come."""
    road = Road(wired, opened, proto)
    flows, beside = road.both(), road.both(KEPT)
    over = replace(road.closed[qube], expire=int(time.time()) - 1)
    road.helpers[qube].only_rules(Kept(over), Kept(road.kept[qube]))
    for flow, one in zip(flows, beside, strict=True):
        flow.assert_silent(one)
        assert one.is_alive()
    assert not any(road.is_open(family) for family in FAMILIES)


@pytest.mark.parametrize("qube", PATH)
@pytest.mark.parametrize("proto", Proto.BOTH.each)
def test_what_drains_goes_on_for_a_while_without_anybody_new(
    wired: Wired, opened: ExitStack, proto: Proto, qube: str
) -> None:
    road = Road(wired, opened, proto)
    flows, beside = road.both(), road.both(KEPT)
    over = replace(road.closed[qube], expire=int(time.time()) - 1, on_expire=OnExpire.DRAIN)
    road.helpers[qube].only_rules(Kept(over), Kept(road.kept[qube]))
    assert all(flow.is_alive() for flow in flows)  # as long as the program has not noticed
    road.helpers[qube].put(Kept(over, is_draining=True), Kept(road.kept[qube]))
    assert all(flow.is_alive() for flow in flows)
    assert not any(road.is_open(family) for family in FAMILIES)
    long_over = replace(over, expire=int(time.time()) - DRAIN_MAX_S - 1)
    road.helpers[qube].only_rules(Kept(long_over, is_draining=True), Kept(road.kept[qube]))
    for flow, one in zip(flows, beside, strict=True):
        flow.assert_silent(one)
    road.put(qube)
    assert all(flow.is_alive() for flow in beside)


@pytest.mark.parametrize("qube", [FIREWALL, WORK])
def test_an_internal_forward_ends_as_well(wired: Wired, qube: str) -> None:
    """Both ends come by vifs, and the netvm's own address is the one that the client has called."""
    told = configs(Proto.TCP, CLOSED, sources=Sources.parse("10.137.0.0/16,fd09:24ef:4179::/64"))
    told[FIREWALL] = replace(told[FIREWALL], side=Side.VIFS)
    helpers = {one: Helper(wired, one) for one in (WORK, FIREWALL)}
    for one, helper in helpers.items():
        helper.put(Kept(told[one]))
    server = wired.serve("tcp", WORK, CLOSED[1])
    flows = []
    for family in FAMILIES:
        client = wired.connect(BESIDE_WORK, family.firewall, CLOSED[0])
        flows.append(Flow(client, server.accept()[0]))
    assert all(flow.is_alive() for flow in flows)
    helpers[qube].put()
    for flow in flows:
        if qube != WORK:
            flow.to_client(b"lost")
        flow.assert_server_ended()
        if qube != WORK:
            flow.to_server(b"lost")
        flow.assert_client_reset()


def has_flowtables() -> bool:
    if PROBLEM is not None:
        return False
    table = "table inet t { flowtable f { hook ingress priority filter; devices = { lo }; }\n}\n"
    with Spaces("one") as spaces, spaces.within("one"):
        made = subprocess.run(
            ["nft", "-c", "-f", "-"], input=table, capture_output=True, text=True, check=False
        )
    return made.returncode == 0


@pytest.mark.skipif(not has_flowtables(), reason="this kernel has no flowtables (CONFIG_NF_FLOW_TABLE)")
@pytest.mark.parametrize("proto", Proto.BOTH.each)
def test_a_flow_that_passes_by_all_rules_ends_the_same(wired: Wired, opened: ExitStack, proto: Proto) -> None:
    """In sys-firewall the kernel takes it over, once both ends have answered."""
    road = Road(wired, opened, proto)
    flows, beside = road.both(), road.both(KEPT)
    for flow in (*flows, *beside):
        assert all(flow.is_alive() for _ in range(8))
    table = Path("/proc/net/nf_conntrack")
    with wired.places.entering(FIREWALL)():
        assert not table.exists() or "[OFFLOAD]" in table.read_text()
    road.put(FIREWALL)
    for flow, one in zip(flows, beside, strict=True):
        if proto is Proto.UDP:
            flow.assert_silent(one)
        else:
            flow.to_client(b"lost")
            flow.assert_server_ended()
            flow.to_server(b"lost")
            flow.assert_client_reset()
        assert one.is_alive()
