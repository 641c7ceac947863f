# SPDX-License-Identifier: GPL-2.0-or-later
"""The path of a forward by nft: what each of its qubes is told, and what keeps packets from going it."""

from typing import Any

import pytest
from worlds import nft_world, qube, rule

from qubes_fwd_qrexec.admin import nftpath
from qubes_fwd_qrexec.admin.inventory import Inventory, Qube
from qubes_fwd_qrexec.admin.states import Cause, Finding
from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.common.errors import ConfigError
from qubes_fwd_qrexec.common.rules import NamedRule
from qubes_fwd_qrexec.common.values import QubeName

PATH = (QubeName("work"), QubeName("sys-firewall"), QubeName("sys-net"))


def told(named: NamedRule, inventory: Inventory | None = None, side: Side = Side.OUTER) -> list[str]:
    sources = named.rule.sources.fixed
    assert sources is not None
    found = nftpath.configs(named, sources, PATH, side, inventory or nft_world())
    assert {config.key for _, config in found} == {"nft.work.web"}
    return [f"{qube}: {config}" for qube, config in found]


def obstacles(text: str, *extra: Qube, path: tuple[QubeName, ...] = PATH) -> list[Finding]:
    return [*nftpath.obstacles(rule(text).rule, path, nft_world(*extra))]


def test_each_qube_of_the_path_learns_the_next_one_s_address_and_the_last_hop_leads_to_the_other_port() -> (
    None
):
    hop = "srcports=80-80 dstports={} srchosts=192.168.0.0/16 to4={}"
    assert told(rule("srcports=80 dstports=8080 srchosts=192.168.0.0/16 mode=nft")) == [
        "work: version=1 role=target side=uplink proto=tcp srcports=8080-8080 dstports=8080-8080 "
        "srchosts=192.168.0.0/16",
        f"sys-firewall: version=1 role=hop side=uplink proto=tcp {hop.format('8080-8080', '10.137.0.10')}",
        f"sys-net: version=1 role=hop side=outer proto=tcp {hop.format('80-80', '10.137.0.6')}",
    ]


def test_time_and_end_are_for_all_and_limits_and_address_for_the_exposed_qube_alone() -> None:
    target, hop, exposed = told(
        rule(
            "srchosts=192.168.0.0/16 listen=192.168.1.2 limits=connections:9 expire=1900000000 "
            "on-expire=drain proto=udp mode=nft"
        )
    )
    assert exposed.endswith("on-expire=drain expire=1900000000 limits=connections:9")
    assert " listen=192.168.1.2 " in exposed
    for inner in (target, hop):
        assert inner.endswith("on-expire=drain expire=1900000000")
        assert "listen=" not in inner
        assert " proto=udp " in inner


def test_no_qube_learns_a_name_an_owner_or_a_comment() -> None:
    named = rule("owner=work path=sys-firewall,sys-net via=sys-net comment=private mode=nft")
    for line in told(named):
        assert not any(word in line.partition(" ")[2] for word in ("work", "sys-", "private", "owner"))


def test_a_family_that_is_not_asked_for_is_forwarded_nowhere() -> None:
    target, hop, exposed = told(rule("mode=nft"))
    assert "to4=10.137.0.10 to6=fd09:24ef:4179::a89:a" in hop
    assert "to4=10.137.0.6 to6=fd09:24ef:4179::a89:6" in exposed
    assert "family" not in target
    for named, inventory in (
        (rule("mode=nft listen=0.0.0.0"), nft_world()),
        (rule("mode=nft"), nft_world(ip6=False)),
    ):
        target, hop, exposed = told(named, inventory)
        assert target.endswith("srchosts=any family=4")
        assert hop.endswith("to4=10.137.0.10")
        assert exposed.endswith("to4=10.137.0.6")
    assert all("to4" not in line for line in told(rule("mode=nft srchosts=fd00::/8")))


def test_a_range_keeps_its_ports_up_to_the_last_hop() -> None:
    target, hop, exposed = told(rule("srcports=7000-7009 dstports=9000-9009 mode=nft"))
    assert "srcports=7000-7009 dstports=7000-7009" in exposed
    assert "srcports=7000-7009 dstports=9000-9009" in hop
    assert "srcports=9000-9009 dstports=9000-9009" in target


def test_what_does_not_fit_into_qubesdb_is_an_error() -> None:
    networks = ",".join(f"2001:db8:{number:x}::/48" for number in range(256))
    with pytest.raises(ConfigError, match=r"nft\.work\.web: the configuration has"):
        told(rule(f"mode=nft srchosts={networks}"))


def test_the_path_goes_along_the_target_s_netvms() -> None:
    chain = PATH[1:]
    assert nftpath.path_to(PATH[0], PATH[2], chain) == PATH
    assert nftpath.path_to(PATH[0], PATH[1], chain) == PATH[:2]
    assert nftpath.path_to(PATH[0], QubeName("personal"), chain) is None


def test_a_path_without_obstacles() -> None:
    assert obstacles("mode=nft") == []


def test_every_qube_of_the_path_must_have_the_program_and_its_switch_on() -> None:
    bare = qube("sys-firewall", "sys-net", ip="10.137.0.6", ip6="fd00::6", template=QubeName("debian-12"))
    assert obstacles("mode=nft", bare, qube("debian-12", klass="TemplateVM")) == [
        Finding(Cause.NO_NFT_SERVICE, QubeName("sys-firewall"), detail="debian-12"),
        Finding(Cause.NFT_SWITCHED_OFF, QubeName("sys-firewall")),
    ]
    features = {"supported-rpc.qubes.ForwardNft": "1", "service.qubes-forward-nft": ""}
    off = qube("work", "sys-firewall", ip="10.137.0.10", ip6="fd00::a", features=features)
    assert obstacles("mode=nft", off) == [Finding(Cause.NFT_SWITCHED_OFF, QubeName("work"))]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("srchosts=10.0.0.0/8", []),
        ("listen=0.0.0.0", []),
        ("srchosts=any", [(Cause.IPV4_ALONE, 6)]),
        ("srchosts=10.0.0.0/8,fd00::/8", [(Cause.NO_ADDRESS, 6)]),
        ("listen=::", [(Cause.NO_ADDRESS, 6)]),
    ],
)
def test_a_family_without_addresses_is_said(text: str, found: list[tuple[Cause, int]]) -> None:
    features = {"supported-rpc.qubes.ForwardNft": "1", "service.qubes-forward-nft": "1"}
    lacking = qube("sys-firewall", "sys-net", ip="10.137.0.6", features=features)
    assert [(f.cause, f.number) for f in obstacles(f"mode=nft {text}", lacking)] == found
    assert all(finding.qube == "sys-firewall" for finding in obstacles(f"mode=nft {text}", lacking))


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        ("work", {"tags": frozenset({"anon-vm"})}),
        ("work", {"features": {"whonix-ws": "1"}}),
        ("sys-firewall", {"tags": frozenset({"anon-gateway"})}),
        ("sys-firewall", {"features": {"whonix-gw": "1"}}),
    ],
)
def test_whonix_has_a_firewall_of_its_own_that_refuses_packets(name: str, mark: dict[str, Any]) -> None:
    whonix = nft_world().qubes[QubeName(name)]
    features = {**whonix.features, **mark.get("features", {})}
    (found,) = obstacles("mode=nft", whonix._replace(tags=mark.get("tags", whonix.tags), features=features))
    assert (found.cause, found.qube) == (Cause.NFT_AT_WHONIX, name)
    assert obstacles("mode=nft", nft_world().qubes[QubeName("sys-vpn")]) == []


def test_without_ipv4_nothing_makes_up_for_it() -> None:
    features = {"supported-rpc.qubes.ForwardNft": "1", "service.qubes-forward-nft": "1"}
    lacking = qube("work", "sys-firewall", ip6="fd00::a", features=features)
    assert obstacles("mode=nft", lacking) == [Finding(Cause.NO_ADDRESS, QubeName("work"), number=4)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("srcports=1-1024 dstports=2-1025", []),
        ("srcports=1-2000", []),
        ("srcports=1-1025 dstports=2-1026", [Finding(Cause.TOO_LARGE, number=1025, case="shifted")]),
        ("srchosts=fe80::/10", [Finding(Cause.LINK_LOCAL, detail="fe80::/10")]),
        ("srchosts=fe00::/8", [Finding(Cause.LINK_LOCAL, detail="fe00::/8")]),
        ("srchosts=fe80::/9", [Finding(Cause.LINK_LOCAL, detail="fe80::/9")]),
        ("srchosts=fec0::/10", []),
        ("srchosts=f000::/4", []),
        ("srchosts=10.0.0.0/8,fe80::1", [Finding(Cause.LINK_LOCAL, detail="fe80::1/128")]),
        ("listen=127.0.0.1", [Finding(Cause.NFT_LOOPBACK)]),
    ],
)
def test_what_packets_cannot_do(text: str, found: list[Finding]) -> None:
    assert obstacles(f"mode=nft {text}") == found
