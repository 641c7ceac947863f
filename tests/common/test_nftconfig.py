# SPDX-License-Identifier: GPL-2.0-or-later
"""What a qube on the path of a forward by nft is told: both ways, and within QubesDB's bounds."""

from contextlib import suppress
from hashlib import sha256
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_strategies import counts, qube_names, rule_names, sources

from qubes_fwd_qrexec.common.config import Side, is_forward_key
from qubes_fwd_qrexec.common.entries import KEY_MAX, VALUE_MAX
from qubes_fwd_qrexec.common.errors import ConfigError
from qubes_fwd_qrexec.common.nftconfig import NftConfig, Role, is_nft_key, parse_nft_key
from qubes_fwd_qrexec.common.rules import Limits, OnExpire
from qubes_fwd_qrexec.common.values import ListenPorts, Proto, Sources, TargetPorts

HOP = (
    "version=1 role=hop side=outer proto=tcp srcports=80-80 dstports=80-80 srchosts=192.168.0.0/16 "
    "to4=10.137.0.5"
)
BOTH = HOP.replace("192.168.0.0/16", "192.168.0.0/16,fd00::/8") + " to6=fd09:24ef:4179::a89:5"
TARGET = (
    "version=1 role=target side=uplink proto=udp srcports=8080-8080 dstports=8080-8080 srchosts=any "
    "expire=1893456000"
)


@st.composite
def configs(draw: st.DrawFn) -> NftConfig:
    first, other, length = (
        draw(st.integers(1, 60000)),
        draw(st.integers(1, 60000)),
        draw(st.integers(0, 5000)),
    )
    ports = ListenPorts(first, first + length)
    given: dict[str, Any] = draw(
        st.fixed_dictionaries(
            {
                "target": qube_names,
                "name": rule_names,
                "role": st.sampled_from(Role),
                "side": st.sampled_from(Side),
                "proto": st.sampled_from(Proto),
                "sources": sources,
            },
            optional={
                "on_expire": st.sampled_from(OnExpire),
                "expire": st.integers(0, 10**10),
                "limits": st.builds(Limits, counts, counts, counts),
            },
        )
    )
    versions = sorted(given["sources"].versions)
    if given["role"] is Role.TARGET:
        family = draw(st.sampled_from([None, *versions]))
        return NftConfig(listen_ports=ports, target_ports=TargetPorts(*_ends(ports)), family=family, **given)
    if length < 1024 and draw(st.booleans()):
        target_ports = TargetPorts(other, other + length)
    else:
        target_ports = TargetPorts(*_ends(ports))
    used = draw(st.sampled_from([versions, *([v] for v in versions)]))
    hops: dict[str, Any] = {}
    if 4 in used:
        hops["to4"] = IPv4Address("10.137.0.5")
    if 6 in used:
        hops["to6"] = IPv6Address("fd09:24ef:4179::a89:5")
    if len(used) == 1:
        hops["listen"] = draw(
            st.sampled_from([None, IPv4Address("192.0.2.1") if 4 in used else IPv6Address("fd00::1")])
        )
    return NftConfig(listen_ports=ports, target_ports=target_ports, **given, **hops)


def _ends(ports: ListenPorts) -> tuple[int, int]:
    return ports.first, ports.last


@settings(deadline=None)
@given(configs())
def test_it_prints_what_it_parses_and_fits_into_qubesdb(config: NftConfig) -> None:
    assert NftConfig.parse(config.key, str(config)) == config
    assert is_nft_key(config.key)
    assert not is_forward_key(config.key)
    assert len(config.key) <= KEY_MAX
    assert len(str(config)) <= VALUE_MAX
    assert str(config).isascii()
    assert str(config).isprintable()


def test_the_key_names_target_and_rule() -> None:
    assert parse_nft_key("nft.a.b.web") == ("a.b", "web")
    assert NftConfig.parse("nft.a.b.web", HOP).key == "nft.a.b.web"
    for key in ("fwd.work.web", "nft.web", "nft.", "", "nft.wo/rk.web"):
        with pytest.raises(ConfigError, match="entry '"):
            NftConfig.parse(key, HOP)


def test_the_digest_is_that_of_key_and_value() -> None:
    digest = NftConfig.parse("nft.work.web", HOP).digest
    assert digest == sha256(f"nft.work.web {HOP}".encode()).hexdigest()[:16]
    assert digest != NftConfig.parse("nft.work.other", HOP).digest


def test_it_says_which_families_it_forwards() -> None:
    assert NftConfig.parse("nft.work.web", HOP).versions == {4}
    assert NftConfig.parse("nft.work.web", BOTH).versions == {4, 6}
    assert NftConfig.parse("nft.work.web", TARGET).versions == {4, 6}
    assert NftConfig.parse("nft.work.web", f"{TARGET} family=4").versions == {4}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (HOP.replace("version=1", "version=2"), "written for another version; this qube reads version=1"),
        (HOP.replace(" proto=tcp", ""), "option 'proto' is missing"),
        (f"{HOP} service=qubes.ForwardTCP", "option 'service' at column 110: unknown option"),
        (HOP.replace("role=hop", "role=exit"), "'exit' is not one of hop, target"),
        (HOP.replace("dstports=80-80", "dstports=80-81"), "srcports and dstports differ in length"),
        (HOP.replace(" to4=10.137.0.5", ""), "a hop has to4 or to6"),
        (HOP.replace("to4=10.137.0.5", "to6=fd00::1"), "to4 needs an IPv4 network in srchosts, and to6 an"),
        (HOP.replace("to4=10.137.0.5", "to4=fd00::1"), "'fd00::1' is not an IPv4 address"),
        (BOTH.replace("to6=fd09:24ef:4179::a89:5", "to6=10.0.0.1"), "'10.0.0.1' is not an IPv6 address"),
        (f"{HOP} family=4", "family is for a target; a hop has to4 or to6"),
        (f"{HOP} listen=fd00::1", "listen is one address, of the only family that has to4 or to6"),
        (f"{HOP} listen=0.0.0.0", "listen is one address"),
        (f"{BOTH} listen=192.168.0.1", "listen is one address"),
        (
            HOP.replace("srcports=80-80 dstports=80-80", "srcports=1-1025 dstports=2-1026"),
            "srcports and dstports differ; that is possible for 1024 ports at most",
        ),
        (TARGET.replace("dstports=8080-8080", "dstports=80-80"), "a target has the same srcports and"),
        (f"{TARGET} to4=10.137.0.5", "and neither listen, to4 nor to6"),
        (f"{TARGET} to6=fd00::1", "and neither listen, to4 nor to6"),
        (f"{TARGET} listen=10.137.0.5", "and neither listen, to4 nor to6"),
        (f"{TARGET} family=5", "'5' is not an IP version: 4 or 6"),
        (TARGET.replace("any", "10.0.0.0/8") + " family=6", "family=6: srchosts names no network of it"),
    ],
)
def test_a_value_that_is_wrong_names_key_and_option(value: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        NftConfig.parse("nft.work.web", value)
    assert str(error.value).startswith("nft.work.web: ")
    assert words in str(error.value)


def test_a_thousand_ports_may_be_shifted_and_any_number_kept() -> None:
    shifted = HOP.replace("srcports=80-80 dstports=80-80", "srcports=1-1024 dstports=2-1025")
    assert NftConfig.parse("nft.work.web", shifted).is_shifted
    kept = HOP.replace("srcports=80-80 dstports=80-80", "srcports=1-65535 dstports=1-65535")
    assert not NftConfig.parse("nft.work.web", kept).is_shifted


def test_a_value_too_large_for_qubesdb_is_refused() -> None:
    networks = ",".join(f"192.0.2.{number}/32" for number in range(1, 255))
    config = NftConfig.parse("nft.work.web", TARGET)
    with pytest.raises(ConfigError, match=f"QubesDB takes {VALUE_MAX}; name fewer or larger networks"):
        NftConfig(
            target=config.target,
            name=config.name,
            role=Role.TARGET,
            side=Side.UPLINK,
            proto=Proto.UDP,
            listen_ports=config.listen_ports,
            target_ports=config.target_ports,
            sources=Sources.parse(networks),
        )


@given(st.text(max_size=60))
def test_any_text_is_a_configuration_or_a_config_error(text: str) -> None:
    for value in (text, f"{HOP} {text}"):
        with suppress(ConfigError):
            assert NftConfig.parse("nft.work.web", value)


@pytest.mark.parametrize(
    ("change", "narrows"),
    [
        ("", False),
        ("srchosts=192.0.0.0/8,fd00::/8", False),
        ("srchosts=192.168.0.0/17,fd00::/8", True),
        ("srcports=79-80 dstports=79-80", False),
        ("srcports=79-80 dstports=80-81", True),
        ("srcports=81-81 dstports=81-81", True),
        ("dstports=81-81", True),
        ("side=vifs", True),
        ("proto=udp", True),
        ("proto=both", False),
        ("to4=10.137.0.6", True),
        ("to6=fd00::1", True),
        ("srchosts=any", False),
        ("on-expire=drain expire=1893456000 limits=connections:1", False),
    ],
)
def test_it_says_whether_it_allows_less_than_another(change: str, narrows: bool) -> None:
    assert _changed(BOTH, change).narrows(NftConfig.parse("nft.work.web", BOTH)) is narrows


def _changed(line: str, change: str) -> NftConfig:
    options = dict(word.split("=", 1) for word in f"{line} {change}".split())
    return NftConfig.parse("nft.work.web", " ".join(f"{name}={text}" for name, text in options.items()))


def test_one_protocol_is_less_than_both() -> None:
    both = _changed(TARGET, "proto=both")
    assert NftConfig.parse("nft.work.web", TARGET).narrows(both)
    assert not both.narrows(both)
    assert str(both) == TARGET.replace("proto=udp", "proto=both")


def test_one_family_or_one_address_is_less_than_all() -> None:
    both, four = NftConfig.parse("nft.work.web", BOTH), NftConfig.parse("nft.work.web", HOP)
    assert four.narrows(both)
    assert not both.narrows(four)
    at_one = _changed(HOP, "listen=192.168.0.1")
    assert at_one.narrows(four)
    assert not four.narrows(at_one)
    assert not at_one.narrows(at_one)
    assert _changed(HOP, "listen=192.168.0.2").narrows(at_one)
    target = NftConfig.parse("nft.work.web", TARGET)
    assert _changed(TARGET, "family=4").narrows(target)
    assert not target.narrows(_changed(TARGET, "family=4"))
