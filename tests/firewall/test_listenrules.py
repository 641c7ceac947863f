# SPDX-License-Identifier: GPL-2.0-or-later
"""The rules for the listener as text. `test_firewall_namespaces` tests what nft makes of them."""

from collections.abc import Container
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from helpers import Everywhere, write_config

from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.values import Proto
from qubes_fwd_qrexec.firewall.listenrules import rules
from qubes_fwd_qrexec.firewall.openings import Socket, is_waiting
from qubes_fwd_qrexec.firewall.rule import Family

EVERYWHERE = Everywhere()
OUTER = 'iifgroup 0 iifname != "lo"'


@pytest.fixture
def texts(tmp_path: Path) -> Any:
    """The rules' texts for one forward with these options, by family."""

    def make(
        port: str = "80", listening: Container[Socket] = EVERYWHERE, **options: str
    ) -> dict[str, list[str]]:
        config = forward(tmp_path / "c", port, **options)
        return {family.value: [rule.text for rule in rules([config], family, listening)] for family in Family}

    return make


def forward(directory: Path, port: str = "80", **options: str) -> ListenerConfig:
    file = write_config(directory, 0, 0, srcports=port, dstports=port, **options)
    return ListenerConfig.parse(file.name, file.read_text())


def at(address: str, *ports: int, proto: Proto = Proto.TCP) -> frozenset[Socket]:
    return frozenset((proto, ip_address(address), port) for port in ports)


def test_a_rule_names_network_and_port(texts: Any) -> None:
    found = texts(listen="0.0.0.0", srchosts="192.168.0.0/16")
    assert found == {"ip": [f"{OUTER} ip saddr 192.168.0.0/16 tcp dport 80 accept"], "ip6": []}


def test_a_rule_names_the_address_that_is_listened_on(texts: Any) -> None:
    found = texts(listen="10.0.0.1,::,10.0.0.2", srchosts="10.0.0.0/8,fd00::/8", port="80-90")
    assert found == {
        "ip": [
            f"{OUTER} ip saddr 10.0.0.0/8 ip daddr 10.0.0.1 tcp dport 80-90 accept",
            f"{OUTER} ip saddr 10.0.0.0/8 ip daddr 10.0.0.2 tcp dport 80-90 accept",
        ],
        "ip6": [f"{OUTER} ip6 saddr fd00::/8 tcp dport 80-90 accept"],
    }


def test_overlapping_networks_are_one(texts: Any) -> None:
    found = texts(listen="0.0.0.0", srchosts="10.0.0.0/9,10.128.0.0/9,10.1.2.3/32,192.168.0.7/32")
    assert found["ip"] == [
        f"{OUTER} ip saddr 10.0.0.0/8 tcp dport 80 accept",
        f"{OUTER} ip saddr 192.168.0.7/32 tcp dport 80 accept",
    ]


def test_anybody_is_let_in_only_where_a_family_is_listened_on(texts: Any) -> None:
    assert texts(listen="0.0.0.0", srchosts="any") == {"ip": [f"{OUTER} tcp dport 80 accept"], "ip6": []}
    assert texts(listen="::", srchosts="any") == {"ip": [], "ip6": [f"{OUTER} tcp dport 80 accept"]}


def test_a_network_of_one_family_opens_nothing_in_the_other(texts: Any) -> None:
    assert texts(listen="0.0.0.0,::", srchosts="fd00::/8")["ip"] == []
    assert texts(listen="0.0.0.0,::", srchosts="10.0.0.0/8")["ip6"] == []


@pytest.mark.parametrize(
    "listening",
    [
        at("0.0.0.0", 81),
        at("192.0.2.1", 80),  # the port at one address, and the rule would let in to all
        at("::", 80),
        frozenset(),
    ],
)
def test_a_port_that_is_not_listened_on_as_the_rule_says_has_no_rule(
    texts: Any, listening: frozenset[Socket]
) -> None:
    options = {"listen": "0.0.0.0", "srchosts": "any"}
    assert texts(**options, listening=listening) == {"ip": [], "ip6": []}
    assert texts(**options, listening=listening | at("0.0.0.0", 80))["ip"] == [f"{OUTER} tcp dport 80 accept"]


def test_an_address_that_is_not_listened_on_has_no_rule_beside_one_that_is(texts: Any) -> None:
    options = {"listen": "10.0.0.1,10.0.0.2,::", "srchosts": "any"}
    assert texts(**options, listening=at("10.0.0.2", 80) | at("0.0.0.0", 80)) == {
        "ip": [f"{OUTER} ip daddr 10.0.0.2 tcp dport 80 accept"],
        "ip6": [],
    }


@pytest.mark.parametrize(
    ("open_ports", "ranges"),
    [
        (range(80, 91), ["80-90"]),
        (range(81, 100), ["81-90"]),
        (range(1, 90), ["80-89"]),
        ([80, 82, 83, 90], ["80", "82-83", "90"]),
        ([79, 91], []),
    ],
)
def test_ports_of_a_range_that_are_listened_on_have_rules(
    texts: Any, open_ports: list[int], ranges: list[str]
) -> None:
    found = texts("80-90", at("0.0.0.0", *open_ports), listen="0.0.0.0", srchosts="10.0.0.0/8,192.168.0.0/16")
    assert found["ip"] == [
        f"{OUTER} ip saddr {network} tcp dport {ports} accept"
        for ports in ranges
        for network in ("10.0.0.0/8", "192.168.0.0/16")
    ]


UDP = {"service": "qubes.ForwardUDP", "transport": "mux", "key": "udp.work.web"}


def test_each_protocol_has_rules_only_where_the_listener_listens_for_it(texts: Any) -> None:
    """What is sent to everybody is not let in; an address of one's own is nobody else's."""
    options = {"listen": "0.0.0.0,10.0.0.1", "srchosts": "10.0.0.0/8"}
    tcp, udp = (at("0.0.0.0", 80, proto=proto) | at("10.0.0.1", 80, proto=proto) for proto in Proto.BOTH.each)
    of = f"{OUTER} ip saddr 10.0.0.0/8"
    assert texts(**options, listening=tcp)["ip"] == [
        f"{of} tcp dport 80 accept",
        f"{of} ip daddr 10.0.0.1 tcp dport 80 accept",
    ]
    assert texts(**options, **UDP, listening=udp)["ip"] == [
        f"{of} fib daddr type local udp dport 80 accept",
        f"{of} ip daddr 10.0.0.1 udp dport 80 accept",
    ]
    assert texts(**options, listening=udp)["ip"] == texts(**options, **UDP, listening=tcp)["ip"] == []


@pytest.mark.parametrize(("listen", "to"), [("::", "fib daddr type local"), ("fd00::1", "ip6 daddr fd00::1")])
def test_no_datagram_is_let_in_that_claims_to_come_from_this_qube(texts: Any, listen: str, to: str) -> None:
    found = texts(listening=at(listen, 80, proto=Proto.UDP), listen=listen, srchosts="fd00::/64", **UDP)
    assert found["ip6"] == [f"{OUTER} ip6 saddr fd00::/64 fib saddr type != local {to} udp dport 80 accept"]


def test_the_kernel_ends_a_rule_with_its_forward(texts: Any) -> None:
    found = texts(listen="::", srchosts="any", expire="1800000000")
    assert found["ip6"] == [f"{OUTER} tcp dport 80 meta time < 1800000000 accept"]


def test_a_forward_waits_while_anything_of_it_is_not_listened_on(tmp_path: Path) -> None:
    config = forward(tmp_path / "c", "80-81", listen="0.0.0.0,::", srchosts="any")
    whole = at("0.0.0.0", 80, 81) | at("::", 80, 81)
    assert not is_waiting(config, whole)
    assert all(is_waiting(config, whole - {binding}) for binding in whole)


def test_the_order_of_the_configuration_does_not_matter(tmp_path: Path) -> None:
    configs = []
    for key in ("fwd.work.web", "fwd.a.ssh", "fwd.work.ssh"):
        file = write_config(tmp_path / "c", 80, 80, key=key)
        configs.append(ListenerConfig.parse(key, file.read_text()))
    assert rules(configs, Family.IP, EVERYWHERE) == rules(reversed(configs), Family.IP, EVERYWHERE)
