# SPDX-License-Identifier: GPL-2.0-or-later
"""What is to be cut and what holds it, as values. `test_closing` tests what becomes of the packets."""

from collections.abc import Collection
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import pytest
from spaces import Spaces, needs_namespaces

from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.common.nftconfig import NftConfig
from qubes_fwd_qrexec.common.values import ListenPorts, PortRange, Proto, Sources, TargetPorts
from qubes_fwd_qrexec.firewall import tables
from qubes_fwd_qrexec.firewall.cutting import (
    HELD_FLOWS_S,
    TCP_HOLD_S,
    UDP_HOLD_S,
    Cut,
    Cutter,
    guards,
    has,
)
from qubes_fwd_qrexec.firewall.openings import Opening
from qubes_fwd_qrexec.firewall.rule import Family
from qubes_fwd_qrexec.system.conntrack import Connection

TCP, UDP = 6, 17
NOW_S = 1_800_000_010.5
KEY = "nft.work.web"
HOP = "version=1 role=hop side=outer proto=tcp srcports=80-80 dstports=8080-8080 srchosts=192.0.2.0/24"
NEXT_HOP = ip_address("10.137.0.5")


def hop(more: str = "to4=10.137.0.5", key: str = KEY) -> NftConfig:
    return NftConfig.parse(key, f"{HOP} {more}")


def target(proto: str = "tcp", sources: str = "192.0.2.0/24") -> NftConfig:
    what = f"proto={proto} srcports=8080-8081 dstports=8080-8081 srchosts={sources}"
    return NftConfig.parse(KEY, f"version=1 role=target side=uplink {what}")


BOTH = replace(
    hop(), sources=Sources.parse("192.0.2.0/24,198.51.100.7,fd77::/64"), to6=IPv6Address("fd09::5")
)
ANYONE = replace(hop(), sources=Sources.parse("any"), listen=IPv4Address("192.0.2.1"))
RANGE = replace(hop(), listen_ports=ListenPorts(7000, 7009), target_ports=TargetPorts(9000, 9009))
OPENING = Opening(
    "udp.work.dns",
    Proto.UDP,
    Side.UPLINK,
    ip_address("0.0.0.0"),
    PortRange(53, 54),
    Sources.parse("192.0.2.0/24"),
)
ALL = tuple(
    replace(config, proto=proto)
    for config in (BOTH, ANYONE, RANGE, target(), target(sources="any,".rstrip(",")))
    for proto in (hop().proto, target("udp").proto)
)


def texts(config: Cut, family: Family) -> list[tuple[str, str]]:
    return [(guard.chain, guard.text) for guard in guards(config, family, NOW_S)]


def test_a_hop_answers_both_ends_of_a_connection_it_no_longer_knows() -> None:
    astray = "ct state new tcp flags & (fin | syn | rst | ack) != syn"
    clients = 'iifgroup 0 iifname != "lo" ip saddr { 192.0.2.0/24, 198.51.100.7/32 }'
    assert texts(BOTH, Family.IP) == [
        ("guard-forward", f"iifgroup 2 ip saddr 10.137.0.5 tcp sport 8080 {astray} reject with tcp reset"),
        (
            "guard-forward",
            f"{clients} {astray} ct status dnat ct original proto-dst 80 reject with tcp reset",
        ),
        ("guard-input", f"{clients} tcp dport 80 {astray} reject with tcp reset"),
    ]
    assert texts(BOTH, Family.IP6)[0] == (
        "guard-forward",
        f"iifgroup 2 ip6 saddr fd09::5 tcp sport 8080 {astray} reject with tcp reset",
    )


def test_each_family_is_guarded_by_itself_and_only_if_it_was_forwarded() -> None:
    assert texts(hop(), Family.IP6) == []
    assert "fd77::/64" not in "".join(text for _, text in texts(BOTH, Family.IP))
    assert "192.0.2" not in "".join(text for _, text in texts(BOTH, Family.IP6))


def test_a_target_holds_back_what_its_server_sends_by_udp_and_nothing_of_tcp() -> None:
    assert texts(target(), Family.IP) == []
    chains, found = zip(*texts(target("udp"), Family.IP), strict=True)
    assert set(chains) == {"guard-output"}
    assert found[1] == "oifgroup 1 ip daddr { 192.0.2.0/24 } udp sport 8080-8081 ct state new drop"


def test_both_protocols_are_guarded_as_each_of_them() -> None:
    protos = Proto.BOTH.each
    for config in (BOTH, target()):
        each = [pair for proto in protos for pair in texts(replace(config, proto=proto), Family.IP)]
        assert texts(replace(config, proto=Proto.BOTH), Family.IP) == each


def test_what_the_listener_still_has_for_clients_begins_no_flow() -> None:
    what = "oifgroup 1 ip daddr { 192.0.2.0/24 } udp sport 53-54 ct state new drop"
    (guard,) = guards(OPENING, Family.IP, NOW_S)
    assert (guard.chain, guard.text) == ("guard-output", what)
    assert UDP_HOLD_S < guard.until - NOW_S <= UDP_HOLD_S + 60
    assert not list(guards(OPENING, Family.IP6, NOW_S))
    (at_one,) = guards(replace(OPENING, address=ip_address("192.0.2.1")), Family.IP, NOW_S)
    assert at_one.text == what.replace("ip daddr", "ip saddr 192.0.2.1 ip daddr")


def test_guards_hold_for_a_while_whose_end_is_the_same_for_cuts_of_one_hour() -> None:
    tcp, udp = list(guards(BOTH, Family.IP, NOW_S)), list(guards(target("udp"), Family.IP, NOW_S))
    assert all(TCP_HOLD_S < guard.until - NOW_S <= TCP_HOLD_S + 3600 for guard in tcp)
    assert all(UDP_HOLD_S < guard.until - NOW_S <= UDP_HOLD_S + 60 for guard in udp[:2])
    assert HELD_FLOWS_S < udp[2].until - NOW_S <= HELD_FLOWS_S + 3600
    assert list(guards(BOTH, Family.IP, NOW_S + 3500)) == tcp
    assert not set(guards(BOTH, Family.IP, NOW_S + 3600)) & set(tcp)


@needs_namespaces
@pytest.mark.parametrize("family", list(Family))
def test_nft_takes_every_guard(family: Family) -> None:
    at_one = ip_address("192.0.2.1" if family is Family.IP else "fd77::1")
    opened = [replace(OPENING, address=at_one, sources=BOTH.sources)]
    found = tuple(guard for cut in (*ALL, *opened) for guard in guards(cut, family, 4e9))
    assert found
    content = tables.Content(guards=tuple(dict.fromkeys(found)))
    with Spaces("one") as spaces:
        spaces.run("one", "nft", "-f", "-", text=tables.transaction(family, content, tables.Seen(), NOW_S))
        listed = spaces.run("one", "nft", "-s", "list", "ruleset")
        assert listed.count("until ") == len(content.guards)


def connection(**changes: Any) -> Connection:
    values = {
        "protocol": TCP,
        "source": ip_address("192.0.2.9"),
        "source_port": 40000,
        "destination": ip_address("192.0.2.1"),
        "destination_port": 80,
        "answerer": NEXT_HOP,
        "answerer_port": 8080,
        "is_sent_on": True,
        "request": b"",
    }
    return Connection(**{**values, **changes})


IPV6 = {
    "source": ip_address("fd77::9"),
    "destination": ip_address("fd77::1"),
    "answerer": ip_address("fd09::5"),
}
NEITHER: list[dict[str, Any]] = [
    {"protocol": UDP},
    {"source": ip_address("198.51.100.8")},
    {"destination_port": 81},
    {"answerer": ip_address("10.137.0.6")},
    {"answerer_port": 8081},
    {"is_sent_on": False},
]


@pytest.mark.parametrize("changes", NEITHER)
def test_a_connection_is_a_forwards_only_if_all_of_it_agrees(changes: dict[str, Any]) -> None:
    assert has(BOTH, connection())
    assert has(BOTH, connection(**IPV6))
    assert not has(hop(), connection(**IPV6))
    assert not has(BOTH, connection(**changes))


def test_of_both_protocols_a_forward_has_the_connections_of_each() -> None:
    of_both = replace(BOTH, proto=Proto.BOTH)
    assert [has(of_both, connection(protocol=number)) for number in (TCP, UDP, 132)] == [True, True, False]


def test_the_ports_of_a_range_belong_together_one_by_one() -> None:
    assert has(RANGE, connection(destination_port=7004, answerer_port=9004))
    assert not has(RANGE, connection(destination_port=7004, answerer_port=9005))
    assert not has(RANGE, connection(destination_port=7010, answerer_port=9010))


def test_an_address_to_listen_on_is_the_one_that_the_client_has_called() -> None:
    assert has(ANYONE, connection(source=ip_address("8.8.8.8")))
    assert not has(ANYONE, connection(destination=ip_address("192.0.2.2")))


def test_what_a_target_has_is_not_sent_on_and_has_whatever_address() -> None:
    """Its own address may not be the one that its netvm has for it."""
    mine = {"protocol": UDP, "destination_port": 8080, "is_sent_on": False}
    assert has(target("udp"), connection(**mine))
    assert not has(target("udp"), connection(**{**mine, "is_sent_on": True}))
    assert not has(target("udp"), connection(**{**mine, "source": ip_address("198.51.100.8")}))
    assert not has(target("udp"), connection(**{**mine, "answerer_port": 8081}))


class End:
    """Notes what is to be ended."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[Cut, ...], tuple[Cut, ...]]] = []

    def __call__(self, gone: Collection[Cut], living: Collection[Cut]) -> int:
        self.asked.append((tuple(gone), tuple(living)))
        return len(gone)


class Clock:
    def __init__(self) -> None:
        self.now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


def test_guards_are_there_before_anything_is_ended_and_go_when_they_are_over() -> None:
    end, clock = End(), Clock()
    cutter = Cutter(end, clock)
    assert cutter.guards(()) == dict.fromkeys(Family, ())
    held = cutter.guards((BOTH,))
    assert held == {family: tuple(guards(BOTH, family, NOW_S)) for family in Family}
    assert end.asked == []
    cutter.finish((BOTH,), (RANGE,))
    assert end.asked == [((BOTH,), (RANGE,))]
    clock.now_s = held[Family.IP][0].until - 1
    assert cutter.guards(()) == held
    assert set(cutter.guards((RANGE,))[Family.IP]) > set(held[Family.IP])
    assert not cutter.is_over
    clock.now_s += 1
    assert cutter.is_over
    assert cutter.guards(()) == {family: tuple(guards(RANGE, family, clock.now_s - 1)) for family in Family}


def test_nothing_is_ended_if_nothing_goes() -> None:
    end = End()
    Cutter(end).finish((), (BOTH,))
    assert end.asked == []
