# SPDX-License-Identifier: GPL-2.0-or-later
"""The wires of a lab, with packets: qubes joined so are as stock Qubes has them, before anything of ours."""

from collections.abc import Iterator

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

from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.lab.stockrules import Shape

pytestmark = [
    pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM)),
    pytest.mark.parametrize("at", FAMILIES, ids=lambda at: at.nft),
    pytest.mark.parametrize("proto", ["tcp", "udp"]),
]
PORT = 8080
# What the user's guide of Qubes OS (qubes-doc, user/security-in-qubes/firewall.md) says by hand.
NAT_BY_HAND = """
    add chain {at.nft} qubes custom-dnat {{ type nat hook prerouting priority filter + 1; policy accept; }}
    add rule {at.nft} qubes custom-dnat {by} {at.nft} saddr {at.lan_network} {proto} dport {port} dnat to {to}
    add rule {at.nft} qubes custom-forward {by} {at.nft} saddr {at.lan_network} {at.nft} daddr {to} \
        {proto} dport {port} ct state new,established,related accept
"""
ACCEPT_BY_HAND = "add rule {at.nft} qubes custom-input {proto} dport {port} accept"


@pytest.fixture(scope="module", params=Shape)
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wired]:
    """For tests that change nothing; every qube has a server."""
    with open_wired(tmp_path_factory.mktemp("w") / "lab", request.param) as wired:
        serve_everywhere(wired)
        yield wired


def serve_everywhere(wired: Wired) -> None:
    for qube in (LAN, NET, FIREWALL, WORK, BESIDE_FIREWALL, BESIDE_WORK):
        for proto in ("tcp", "udp"):
            wired.serve(proto, qube, PORT)


def test_a_qube_reaches_the_lan(stock: Wired, proto: str, at: Addresses) -> None:
    for qube in (WORK, BESIDE_WORK, FIREWALL, BESIDE_FIREWALL, NET):
        assert stock.send(proto, qube, at.lan, PORT) == "answered by lan"


def test_the_lan_reaches_no_qube(stock: Wired, proto: str, at: Addresses) -> None:
    for source in (at.lan, at.lan_refused):
        for address in (at.net, at.net_gateway, at.firewall, at.beside_firewall):
            assert stock.send(proto, LAN, address, PORT, source) == "dropped in sys-net"
        # sys-net has no way to it and gives it back.
        for address in (at.work, at.beside_work):
            assert stock.send(proto, LAN, address, PORT, source) == "dropped in lan"


def test_no_qube_reaches_another(stock: Wired, proto: str, at: Addresses) -> None:
    assert stock.send(proto, WORK, at.firewall, PORT) == "refused by sys-firewall"
    assert stock.send(proto, WORK, at.beside_work, PORT) == "dropped in sys-firewall"
    assert stock.send(proto, FIREWALL, at.net, PORT) == "refused by sys-net"
    assert stock.send(proto, FIREWALL, at.beside_firewall, PORT) == "dropped in sys-net"
    assert stock.send(proto, WORK, at.beside_firewall, PORT) == "dropped in sys-net"
    assert stock.send(proto, BESIDE_FIREWALL, at.work, PORT) == "dropped in lan"
    # Nor one that it can send to: each drops what it has not asked for.
    assert stock.send(proto, NET, at.firewall, PORT) == "dropped in sys-firewall"
    assert stock.send(proto, FIREWALL, at.work, PORT) == "dropped in work"


def test_no_qube_takes_anothers_address(stock: Wired, proto: str, at: Addresses) -> None:
    for source in (at.beside_work, at.firewall, at.lan, at.net_gateway):
        assert as_attacker(stock, WORK).send(proto, WORK, at.lan, PORT, source) == "dropped in sys-firewall"
    for source in (at.work, at.beside_firewall, at.lan):
        sent = as_attacker(stock, FIREWALL).send(proto, FIREWALL, at.lan, PORT, source)
        assert sent == "dropped in sys-net"
    # Nor does the LAN.
    assert stock.send(proto, LAN, at.net, PORT, at.firewall) == "dropped in sys-net"


def as_attacker(wired: Wired, qube: str) -> Wired:
    """The qube does not masquerade what it sends itself, as it can at will."""
    wired.nft(qube, "flush chain ip qubes postrouting\nflush chain ip6 qubes postrouting")
    return wired


@pytest.mark.parametrize("shape", Shape)
def test_the_way_by_hand_leads_to_the_target_and_lets_in_whoever_addresses_it(
    fresh: Wired, proto: str, at: Addresses
) -> None:
    """By the same rules: the LAN's host need not send to sys-net's own address."""
    serve_everywhere(fresh)
    by_hand(fresh, NET, 'iifname "eth0"', at.firewall, proto, at)
    by_hand(fresh, FIREWALL, "iifgroup 1", at.work, proto, at)
    fresh.nft(WORK, ACCEPT_BY_HAND.format(at=at, proto=proto, port=PORT))
    assert fresh.send(proto, LAN, at.net, PORT) == "answered by work"
    assert fresh.send(proto, LAN, at.firewall, PORT) == "answered by work"
    assert fresh.send(proto, LAN, at.net, PORT, at.lan_refused) == "dropped in sys-net"
    assert fresh.send(proto, LAN, at.net, PORT + 1) == "dropped in sys-net"


def by_hand(wired: Wired, qube: str, by: str, to: str, proto: str, at: Addresses) -> None:
    wired.nft(qube, NAT_BY_HAND.format(by=by, to=to, proto=proto, port=PORT, at=at))


@pytest.mark.parametrize("shape", Shape)
def test_the_clients_address_reaches_the_target(fresh: Wired, proto: str, at: Addresses) -> None:
    by_hand(fresh, NET, "iifgroup 0", at.firewall, proto, at)
    by_hand(fresh, FIREWALL, "iifgroup 1", at.work, proto, at)
    fresh.nft(WORK, ACCEPT_BY_HAND.format(at=at, proto=proto, port=PORT))
    server = fresh.serve(proto, WORK, PORT, at.work)
    if proto == "udp":
        assert fresh.send(proto, LAN, at.net, PORT) == "answered by work"
        assert server.peers == [at.lan]
    else:
        client = fresh.connect(LAN, at.net, PORT)
        taken, peer = server.accept()
        assert peer == at.lan
        client.sendall(b"question")
        assert taken.recv(99) == b"question"


def test_a_qube_that_moves_halts_and_starts_takes_its_wires_along(
    fresh: Wired, proto: str, at: Addresses
) -> None:
    fresh.serve(proto, LAN, PORT)
    before = fresh.wires.vif(WORK)
    fresh.change(WORK, netvm=NET)
    assert fresh.send(proto, WORK, at.lan, PORT) == "answered by lan"
    assert fresh.wires.vif(WORK) == before
    assert at.work not in fresh.ruleset(FIREWALL)
    fresh.nft(WORK, "add table inet mine")
    fresh.halt(WORK)
    assert at.work not in fresh.ruleset(NET)
    fresh.start(WORK)
    assert fresh.send(proto, WORK, at.lan, PORT) == "answered by lan"
    assert fresh.wires.vif(WORK) != before
    assert "mine" not in fresh.ruleset(WORK)
    fresh.change(WORK, netvm=None)
    assert fresh.run(WORK, "ip", "-brief", "link").stdout.split()[0] == "lo"
    assert len(fresh.run(WORK, "ip", "-brief", "link").stdout.splitlines()) == 1


def test_a_netvm_that_starts_again_joins_the_qubes_behind_it(fresh: Wired, proto: str, at: Addresses) -> None:
    fresh.serve(proto, LAN, PORT)
    fresh.halt(FIREWALL)
    assert len(fresh.run(WORK, "ip", "-brief", "link").stdout.splitlines()) == 1
    fresh.start(FIREWALL)
    assert fresh.send(proto, WORK, at.lan, PORT) == "answered by lan"
    fresh.halt(NET)
    fresh.start(NET)
    assert fresh.send(proto, WORK, at.lan, PORT) == "answered by lan"


def test_the_firewalls_rules_come_back_and_nothing_else(fresh: Wired, proto: str, at: Addresses) -> None:
    fresh.serve(proto, LAN, PORT)
    before = fresh.ruleset(FIREWALL)
    fresh.nft(FIREWALL, "add rule ip qubes-firewall forward drop\nadd rule ip6 qubes-firewall forward drop")
    fresh.nft(FIREWALL, "add table ip mine")
    fresh.wires.restart_firewall_service(FIREWALL)
    assert fresh.ruleset(FIREWALL) != before
    fresh.wires.reload_firewall(FIREWALL)
    assert fresh.ruleset(FIREWALL) == before
    assert fresh.send(proto, WORK, at.lan, PORT) == "answered by lan"


def test_what_becomes_of_a_packet_is_told_by_where_it_ends(fresh: Wired, proto: str, at: Addresses) -> None:
    def drop(qube: str, hook: str, of: str) -> None:
        rules = f"type filter hook {hook} priority -350; {at.nft} {of} {at.lan} drop"
        fresh.nft(qube, f"table inet mine {{\nchain {hook} {{\n{rules}\n}}\n}}")

    assert fresh.send(proto, WORK, at.lan, PORT) == "refused by lan"
    fresh.serve(proto, LAN, PORT)
    assert fresh.send(proto, WORK, at.lan, PORT) == "answered by lan"
    drop(NET, "prerouting", "saddr")
    assert fresh.send(proto, WORK, at.lan, PORT) == "answer dropped in sys-net"
    drop(FIREWALL, "postrouting", "daddr")
    assert fresh.send(proto, WORK, at.lan, PORT) == "dropped in sys-firewall"
    drop(WORK, "output", "daddr")
    assert fresh.send(proto, WORK, at.lan, PORT) == "dropped in work"


def test_an_address_of_the_wrong_family_is_named_and_changes_nothing(
    fresh: Wired, proto: str, at: Addresses
) -> None:
    fresh.serve(proto, LAN, PORT)
    with pytest.raises(StoreError, match=f"{V6.work} is no IPv4 address; edit its qube.json"):
        fresh.change(WORK, ip=V6.work)
    assert fresh.send(proto, WORK, at.lan, PORT) == "answered by lan"


@pytest.mark.parametrize("has_ipv6", [False])
def test_without_ipv6_there_is_none(fresh: Wired, proto: str, at: Addresses) -> None:
    fresh.serve(proto, LAN, PORT)
    assert fresh.send(proto, WORK, V4.lan, PORT) == "answered by lan"
    assert fresh.run(FIREWALL, "ip", "-6", "route", "show", "default").stdout == ""
    assert "qbs-filter" in fresh.ruleset(FIREWALL)
    assert fresh.send(proto, LAN, V6.net, PORT) == "dropped in sys-net"


@pytest.mark.parametrize("has_vpn", [True])
def test_a_qube_behind_a_vpn_reaches_others_by_the_tunnel_alone(
    fresh: Wired, proto: str, at: Addresses
) -> None:
    for qube in (LAN, PROVIDER, BEHIND_VPN):
        fresh.serve(proto, qube, PORT)
    assert fresh.send(proto, BEHIND_VPN, at.provider, PORT) == "answered by provider"
    assert fresh.send(proto, PROVIDER, at.vpn_outside, PORT, at.provider) == "dropped in sys-vpn"
    # A route beside the tunnel leads nowhere, in neither direction.
    route = ("ip", f"-{at.version}", "route", "add", at.lan, "via", at.firewall, "dev", "eth0")
    fresh.run(VPN, *route, "onlink")
    assert fresh.send(proto, VPN, at.lan, PORT) == "answered by lan"
    assert fresh.send(proto, BEHIND_VPN, at.lan, PORT) == "dropped in sys-vpn"
    assert fresh.send(proto, FIREWALL, at.behind_vpn, PORT) == "dropped in lan"


def test_netvms_use_the_flow_tables_of_the_kernel(fresh: Wired, proto: str, at: Addresses) -> None:
    if "qubes-nat-accel" not in fresh.ruleset(FIREWALL):
        pytest.skip("this kernel has no NF_FLOW_TABLE")
    server = fresh.serve(proto, LAN, PORT)
    if proto == "udp":
        for _ in range(5):
            assert fresh.send(proto, WORK, at.lan, PORT) == "answered by lan"
    else:
        client, (taken, _) = fresh.connect(WORK, at.lan, PORT), server.accept()
        for _ in range(5):
            client.sendall(b"question")
            assert taken.recv(99) == b"question"
