# SPDX-License-Identifier: GPL-2.0-or-later
"""Closing closes: what becomes of live connections when one qube of the path stops letting them through.

Each qube is tested alone, while the two others go on as if nothing had happened. Beside what is closed there
is always another forward on the same path, whose packets are sent after those that must not arrive: once they
are there, the others would have been.
"""

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest
from closingroad import ALLOWED, CLOSED, KEPT, PATH, Flow, Helper, Road, configs, shapes
from spaces import Spaces
from wired import BESIDE_WORK, FAMILIES, FIREWALL, LAN, NET, PROBLEM, WORK, Wired

from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.common.nftconfig import NftConfig
from qubes_fwd_qrexec.common.rules import OnExpire
from qubes_fwd_qrexec.common.values import (
    ListenPorts,
    Proto,
    RuleName,
    Sources,
    TargetPorts,
)
from qubes_fwd_qrexec.firewall.cutting import TCP_HOLD_S, UDP_HOLD_S
from qubes_fwd_qrexec.firewall.pathrules import DRAIN_MAX_S, Kept
from qubes_fwd_qrexec.firewall.tables import OWN
from qubes_fwd_qrexec.lab.stockrules import Shape

pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))


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
        flow.assert_over(proto, one)


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


@pytest.mark.parametrize("gone", [Side.UPLINK, Side.VIFS])
def test_of_two_forwards_from_one_port_to_one_place_each_ends_alone(wired: Wired, gone: Side) -> None:
    """They let in anybody, one from outside and one from other qubes."""
    told = configs(Proto.TCP, CLOSED, sources=Sources.parse("any"))
    inside = replace(told[FIREWALL], name=RuleName("inside"), side=Side.VIFS)
    helpers = {one: Helper(wired, one) for one in PATH}
    for one, helper in helpers.items():
        helper.put(Kept(told[one]), *([Kept(inside)] if one == FIREWALL else []))
    server = wired.serve("tcp", WORK, CLOSED[1])
    flows: dict[Side, list[Flow]] = {Side.UPLINK: [], Side.VIFS: []}
    for family in FAMILIES:
        from_lan = wired.connect(LAN, family.net, CLOSED[0], family.lan)
        flows[Side.UPLINK].append(Flow(from_lan, server.accept()[0]))
        beside = wired.connect(BESIDE_WORK, family.firewall, CLOSED[0])
        flows[Side.VIFS].append(Flow(beside, server.accept()[0]))
    helpers[FIREWALL].put(Kept(inside if gone is Side.UPLINK else told[FIREWALL]))
    for flow in flows.pop(gone):
        flow.to_server(b"lost")
        flow.assert_client_reset()
    (kept,) = flows.values()
    for flow in kept:
        # What its client sends would be sent on anew.
        flow.to_client(b"x")
        assert flow.at_client() == b"x"
        assert flow.is_alive()


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
        flow.assert_over(proto, one)
