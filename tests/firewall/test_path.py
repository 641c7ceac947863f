# SPDX-License-Identifier: GPL-2.0-or-later
"""Forwards by nft along a path of qubes, with packets, against the rules of stock Qubes.

Each test says of a packet what becomes of it. What is let through is one line; the rest is what must not be.
"""

import json
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
from wired import (
    BEHIND_VPN,
    BESIDE_FIREWALL,
    BESIDE_WORK,
    FAMILIES,
    FIREWALL,
    LAN,
    NET,
    PROBLEM,
    PROVIDER,
    V4,
    V6,
    VPN,
    WORK,
    Addresses,
    Wired,
    open_wired,
)

from qubes_fwd_qrexec.common.nftconfig import NftConfig
from qubes_fwd_qrexec.firewall.cutting import Cutter
from qubes_fwd_qrexec.firewall.inforce import InForce
from qubes_fwd_qrexec.firewall.nfttool import Nft
from qubes_fwd_qrexec.firewall.pathrules import Kept
from qubes_fwd_qrexec.firewall.wanted import Firewall, Wanted
from qubes_fwd_qrexec.lab.stockrules import Shape

pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))

EXPOSED, INTERNAL, OTHER = 80, 8080, 81
PROTOS = ("tcp", "udp")
LAN_ONLY = f"{V4.lan_network},{V6.lan_network}"
KEY = "nft.work.web"
ANSWERED = "answered by work"

families = pytest.mark.parametrize("at", FAMILIES, ids=lambda at: at.nft)
protos = pytest.mark.parametrize("proto", PROTOS)
KINDS = tuple(product(PROTOS, FAMILIES))
"""For tests that look at packets of each kind in one world, as it takes long to make one."""


def entry(key: str = KEY, **options: object) -> NftConfig:
    given = {"version": 1, "proto": "tcp", "srchosts": LAN_ONLY} | options
    given.setdefault("dstports", given["srcports"])
    return NftConfig.parse(key, " ".join(f"{name.replace('_', '-')}={v}" for name, v in given.items()))


def hop(to: str, key: str = KEY, **options: object) -> NftConfig:
    """A hop that sends to a qube of the path; ``to4`` or ``to6`` among the options stand for both."""
    number = {FIREWALL: "firewall", WORK: "work"}[to]
    addresses = {"to4": getattr(V4, number), "to6": getattr(V6, number)}
    if "to4" in options or "to6" in options:
        addresses = {}
    return entry(key, **{"role": "hop", "srcports": EXPOSED, **addresses, **options})


def path(
    proto: str = "tcp", key: str = KEY, *, first: int = EXPOSED, **options: object
) -> dict[str, list[NftConfig]]:
    """What each qube is told of a forward from sys-net to work."""
    more = {"proto": proto, **options}
    exposed = {name: more.pop(name) for name in ("limits", "listen") if name in more}
    return {
        NET: [hop(FIREWALL, key, side="outer", srcports=first, **more, **exposed)],
        FIREWALL: [hop(WORK, key, side="uplink", srcports=first, dstports=INTERNAL, **more)],
        WORK: [entry(key, role="target", side="uplink", srcports=INTERNAL, **more)],
    }


def each(key: str = "nft.work", **options: Any) -> dict[str, list[NftConfig]]:
    """The same with a forward for each protocol."""
    return both(*(path(proto, f"{key}.{proto}", **options) for proto in PROTOS))


def both(*paths: dict[str, list[NftConfig]]) -> dict[str, list[NftConfig]]:
    return {qube: [config for one in paths for config in one.get(qube, [])] for qube in (NET, FIREWALL, WORK)}


def put(wired: Wired, configs: dict[str, list[NftConfig]]) -> None:
    """Put exactly this in force, in each of these qubes."""
    for qube, told in configs.items():
        with wired.places.entering(qube)():
            InForce(Firewall(Nft()), Cutter()).put(Wanted(paths=tuple(map(Kept, told))))


def serve(wired: Wired) -> None:
    for qube in (LAN, NET, FIREWALL, WORK, BESIDE_FIREWALL, BESIDE_WORK):
        for proto in PROTOS:
            for port in (EXPOSED, INTERNAL, OTHER):
                wired.serve(proto, qube, port)


@pytest.fixture(scope="module", params=[(Shape.R4_2, PROTOS), (Shape.R4_3, ("both",))])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wired]:
    """Port 80 of sys-net is forwarded to 8080 of work, by TCP and UDP; every qube has servers on both.

    On Qubes 4.2 each protocol has a forward of its own, on 4.3 one forward has both. The qubes beside have no
    firewall of their own: they are out for mischief.
    """
    shape, told = request.param
    with open_wired(tmp_path_factory.mktemp("w") / "lab", shape) as made:
        serve(made)
        for qube in (BESIDE_FIREWALL, BESIDE_WORK):
            made.nft(qube, "flush ruleset")
        put(made, both(*(path(proto, f"nft.work.{proto}") for proto in told)))
        yield made


@protos
@families
def test_a_client_of_the_rules_sources_reaches_the_server(opened: Wired, proto: str, at: Addresses) -> None:
    assert opened.send(proto, LAN, at.net, EXPOSED, at.lan) == ANSWERED


Somewhere = Callable[[Addresses], str]
REFUSED: dict[str, tuple[str, Somewhere, int, Somewhere]] = {
    "another source": (LAN, lambda at: at.net_refused, EXPOSED, lambda at: at.lan_refused),
    "another source, at the same address": (LAN, lambda at: at.net, EXPOSED, lambda at: at.lan_refused),
    "another port": (LAN, lambda at: at.net, OTHER, lambda at: at.lan),
    "the internal port": (LAN, lambda at: at.net, INTERNAL, lambda at: at.lan),
    **{
        f"LAN, straight to {name}:{port}": (LAN, where, port, lambda at: at.lan)
        for name, where in (
            ("sys-firewall", lambda at: at.firewall),
            ("work", lambda at: at.work),
            ("sys-net's gateway", lambda at: at.net_gateway),
        )
        for port in (EXPOSED, INTERNAL)
        if (name, port) != ("sys-net's gateway", EXPOSED)
    },
    **{
        f"{qube}, to {name}:{port}": (qube, where, port, lambda at: "")
        for qube in (BESIDE_FIREWALL, BESIDE_WORK, NET, FIREWALL)
        for name, where in (
            ("sys-net", lambda at: at.net),
            ("sys-net's gateway", lambda at: at.net_gateway),
            ("sys-firewall", lambda at: at.firewall),
            ("work", lambda at: at.work),
        )
        for port in (EXPOSED, INTERNAL)
    },
}


@protos
@families
@pytest.mark.parametrize("case", REFUSED)
def test_nobody_else_reaches_it(opened: Wired, proto: str, at: Addresses, case: str) -> None:
    qube, where, port, source = REFUSED[case]
    assert opened.send(proto, qube, where(at), port, source(at)) != ANSWERED


@protos
@families
def test_a_packet_with_a_source_that_is_not_its_own_does_not_pass(
    opened: Wired, proto: str, at: Addresses
) -> None:
    """A qube that gives itself an address of the LAN, straight to the next hop or by the exposed address."""
    for qube in (BESIDE_FIREWALL, BESIDE_WORK):
        for where in (at.net, at.net_gateway, at.firewall, at.work):
            for port in (EXPOSED, INTERNAL):
                assert opened.send(proto, qube, where, port, at.lan).startswith("dropped in sys-")


@protos
@families
def test_a_service_of_a_hop_itself_is_untouched(opened: Wired, proto: str, at: Addresses) -> None:
    loopback = "127.0.0.1" if at is V4 else "::1"
    for qube in (NET, FIREWALL, WORK):
        assert opened.send(proto, qube, loopback, EXPOSED) == f"answered by {qube}"


@protos
@families
@pytest.mark.parametrize("qube", [NET, WORK])
def test_what_comes_by_a_wire_for_a_loopback_address_does_not_pass(
    wired: Wired, proto: str, at: Addresses, qube: str
) -> None:
    """Even where a qube takes such packets at all (route_localnet): the server may be for itself alone."""
    sender, via = {NET: (LAN, at.net), WORK: (FIREWALL, at.work)}[qube]
    loopback, port = "127.0.0.1" if at is V4 else "::1", EXPOSED if qube == NET else INTERNAL
    put(wired, path(proto))
    for name in (LAN, FIREWALL, WORK):
        wired.serve(proto, name, INTERNAL, loopback)
    wired.serve(proto, WORK, INTERNAL, at.work)
    wired.run(qube, "sysctl", "-w", "net.ipv4.conf.all.route_localnet=1")
    # The sender has no loopback addresses of its own.
    local = json.loads(wired.run(sender, "ip", "-j", "route", "show", "table", "local").stdout)
    for route in local if at is V4 else [{"dst": "::1"}]:
        if route["dst"].startswith(("127.", "::1")):
            wired.run(sender, "ip", "route", "del", "table", "local", "to", route["dst"], "dev", "lo")
    wired.run(sender, "ip", "route", "add", loopback, "via", via, "dev", device(wired, sender, via), "onlink")
    assert wired.send(proto, sender, loopback, port, at.lan) == f"dropped in {qube}"


def device(wired: Wired, qube: str, to: str) -> str:
    """By which a qube sends to an address."""
    (route,) = json.loads(wired.run(qube, "ip", "-j", "route", "get", to).stdout)
    return str(route["dev"])


def test_the_server_sees_the_clients_address(wired: Wired) -> None:
    put(wired, each())
    for at in FAMILIES:
        tcp, udp = (wired.serve(proto, WORK, INTERNAL, at.work) for proto in PROTOS)
        client = wired.connect(LAN, at.net, EXPOSED, at.lan)
        taken, peer = tcp.accept()
        assert peer == at.lan
        taken.sendall(b"hello")
        assert client.recv(5) == b"hello"
        assert wired.send("udp", LAN, at.net, EXPOSED, at.lan) == ANSWERED
        assert udp.peers == [at.lan]


def test_what_is_taken_away_is_closed_and_leaves_nothing(wired: Wired) -> None:
    before = [wired.ruleset(qube) for qube in (NET, FIREWALL, WORK)]
    serve(wired)
    put(wired, each())
    for proto, at in KINDS:
        assert wired.send(proto, LAN, at.net, EXPOSED, at.lan) == ANSWERED
    put(wired, {NET: [], FIREWALL: [], WORK: []})
    for proto, at in KINDS:
        assert wired.send(proto, LAN, at.net, EXPOSED, at.lan) == "dropped in sys-net"
    assert [wired.ruleset(qube) for qube in (NET, FIREWALL, WORK)] == before


def test_each_qube_alone_refuses_new_connections(wired: Wired) -> None:
    serve(wired)
    for closed in (NET, FIREWALL, WORK):
        put(wired, each() | {closed: []})
        for proto, at in KINDS:
            assert wired.send(proto, LAN, at.net, EXPOSED, at.lan) == f"dropped in {closed}"


@families
def test_a_protocol_or_family_that_is_not_forwarded_does_not_pass(wired: Wired, at: Addresses) -> None:
    serve(wired)
    to_firewall, to_work = ({f"to{at.version}": where} for where in (at.firewall, at.work))
    told = {"proto": "udp", "srchosts": at.lan_network}
    put(
        wired,
        {
            NET: [hop(FIREWALL, side="outer", **told, **to_firewall)],
            FIREWALL: [hop(WORK, side="uplink", dstports=INTERNAL, **told, **to_work)],
            WORK: [entry(role="target", side="uplink", srcports=INTERNAL, **told)],
        },
    )
    (other,) = [family for family in FAMILIES if family is not at]
    assert wired.send("udp", LAN, at.net, EXPOSED, at.lan) == ANSWERED
    assert wired.send("tcp", LAN, at.net, EXPOSED, at.lan) == "dropped in sys-net"
    assert wired.send("udp", LAN, other.net, EXPOSED, other.lan) == "dropped in sys-net"


@protos
def test_an_internal_forward_is_for_neighbours_alone(wired: Wired, proto: str) -> None:
    serve(wired)
    neighbours = {"srchosts": f"{V4.beside_work},{V6.beside_work}", "proto": proto}
    put(
        wired,
        {
            FIREWALL: [hop(WORK, side="vifs", dstports=INTERNAL, **neighbours)],
            WORK: [entry(role="target", side="uplink", srcports=INTERNAL, **neighbours)],
        },
    )
    for at in FAMILIES:
        assert wired.send(proto, BESIDE_WORK, at.firewall, EXPOSED) == ANSWERED
        assert wired.send(proto, BESIDE_WORK, at.work, INTERNAL) == "dropped in sys-firewall"
        for qube in (LAN, NET, BESIDE_FIREWALL):
            assert wired.send(proto, qube, at.firewall, EXPOSED) != ANSWERED
            assert wired.send(proto, qube, at.firewall, EXPOSED, at.beside_work) != ANSWERED


@protos
def test_a_range_is_shifted_port_by_port_and_ends_where_it_ends(wired: Wired, proto: str) -> None:
    serve(wired)
    servers = [wired.serve(proto, WORK, port) for port in (9000, 9001, 9002, 9003)]
    put(
        wired,
        {
            NET: [hop(FIREWALL, side="outer", proto=proto, srcports="7000-7002")],
            FIREWALL: [hop(WORK, side="uplink", proto=proto, srcports="7000-7002", dstports="9000-9002")],
            WORK: [entry(role="target", side="uplink", proto=proto, srcports="9000-9002")],
        },
    )
    for at in FAMILIES:
        for port in (7000, 7001, 7002):
            assert wired.send(proto, LAN, at.net, port, at.lan) == ANSWERED
        for port in (6999, 7003):
            assert wired.send(proto, LAN, at.net, port, at.lan) == "dropped in sys-net"
    if proto == "udp":
        assert [len(server.peers) for server in servers] == [2, 2, 2, 0]


@families
def test_a_forward_at_one_address_is_not_at_another(wired: Wired, at: Addresses) -> None:
    serve(wired)
    to = {"to4": at.firewall} if at is V4 else {"to6": at.firewall}
    made = path(srchosts="any") | {
        NET: [hop(FIREWALL, side="outer", srchosts="any", listen=at.net, **to)],
    }
    put(wired, made)
    assert wired.send("tcp", LAN, at.net, EXPOSED, at.lan) == ANSWERED
    assert wired.send("tcp", LAN, at.net_refused, EXPOSED, at.lan) == "dropped in sys-net"


def test_two_forwards_to_one_port_do_not_disturb_each_other(wired: Wired) -> None:
    serve(wired)
    put(wired, both(each("nft.work-a", expire=1), each("nft.work-b", first=OTHER)))
    for proto, at in KINDS:
        assert wired.send(proto, LAN, at.net, OTHER, at.lan) == ANSWERED
        assert wired.send(proto, LAN, at.net, EXPOSED, at.lan) == "dropped in sys-net"


def test_a_target_that_is_gone_leaks_nothing_and_one_that_is_back_is_reached(wired: Wired) -> None:
    serve(wired)
    put(wired, each())
    wired.halt(WORK)
    for proto, at in KINDS:
        assert wired.send(proto, LAN, at.net, EXPOSED, at.lan) == "dropped in sys-firewall"
    wired.start(WORK)
    put(wired, {WORK: each()[WORK]})
    for proto, at in KINDS:
        assert wired.send(proto, LAN, at.net, EXPOSED, at.lan) == ANSWERED


@pytest.mark.parametrize("has_vpn", [True])
@protos
def test_a_vpn_qube_is_entered_by_its_tunnel_and_not_by_the_network_around_it(
    wired: Wired, proto: str
) -> None:
    """A provider that forwards a port sends it into the tunnel; neither LAN nor netvm reaches inside."""
    for qube in (LAN, VPN, BEHIND_VPN):
        wired.serve(proto, qube, EXPOSED)
        wired.serve(proto, qube, INTERNAL)
    told = {"proto": proto, "srchosts": "any"}
    to = {"to4": V4.behind_vpn, "to6": V6.behind_vpn}
    put(
        wired,
        {
            VPN: [entry(role="hop", side="outer", srcports=EXPOSED, dstports=INTERNAL, **told, **to)],
            BEHIND_VPN: [entry(role="target", side="uplink", srcports=INTERNAL, **told)],
        },
    )
    inside = f"answered by {BEHIND_VPN}"
    for at in FAMILIES:
        assert wired.send(proto, PROVIDER, at.vpn_outside, EXPOSED, at.provider) == inside
        assert wired.send(proto, PROVIDER, at.vpn_outside, INTERNAL, at.provider) == f"dropped in {VPN}"
        straight = (f"-{at.version}", "route", "add", at.behind_vpn, "via", at.vpn_outside, "dev", "tun0")
        wired.run(PROVIDER, "ip", *straight, "onlink")
        for port in (EXPOSED, INTERNAL):
            assert wired.send(proto, PROVIDER, at.behind_vpn, port, at.provider) == f"dropped in {VPN}"
        for qube in (FIREWALL, BESIDE_WORK, NET, LAN):
            for where in (at.vpn, at.behind_vpn, *([] if qube == LAN else [at.vpn_outside])):
                for port in (EXPOSED, INTERNAL):
                    assert wired.send(proto, qube, where, port) != inside
