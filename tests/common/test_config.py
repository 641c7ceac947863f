# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration of an exposed qube: both ways, within QubesDB's bounds, and no more than it needs."""

from contextlib import suppress

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rule_strategies import named_rules

from qubes_fwd_qrexec.common import config
from qubes_fwd_qrexec.common.config import ForwardKey, ListenerConfig, Service, Side, parse_key
from qubes_fwd_qrexec.common.entries import KEY_MAX, VALUE_MAX
from qubes_fwd_qrexec.common.errors import ConfigError
from qubes_fwd_qrexec.common.rules import ForwardRule, NamedRule, Proxy, Transport
from qubes_fwd_qrexec.common.values import (
    ListenPorts,
    Proto,
    QubeName,
    RuleName,
    Sources,
    TargetPorts,
    parse_network,
)

LINE = (
    "version=1 service=qubes.ForwardTCP transport=call side=outer "
    "listen=0.0.0.0 srcports=80-80 dstports=8080-8080 "
    "srchosts=10.0.0.0/8"
)
UDP_LINE = LINE.replace("ForwardTCP", "ForwardUDP").replace("call", "mux")


@settings(deadline=None)
@given(
    named_rules,
    st.sampled_from(
        [
            (Service.FORWARD_TCP, Transport.CALL),
            (Service.FORWARD_TCP, Transport.MUX),
            (Service.FORWARD_UDP, Transport.MUX),
        ]
    ),
    st.sampled_from(Side),
)
def test_it_prints_what_it_parses_and_fits_into_qubesdb(
    named: NamedRule, carrier: tuple[Service, Transport], side: Side
) -> None:
    rule = named.rule
    assume(carrier[0].proto is Proto.TCP or rule.proxy is not Proxy.V1)
    hosts = {4: "10.137.0.9", 6: "fd09:24ef:4179::a89:9"}
    by_name = [parse_network(hosts[address.version]) for address in rule.listen_addresses]
    sources = Sources.of([*rule.sources.networks, *by_name]) if rule.sources.has_names else rule.sources.fixed
    assert sources is not None
    told = ListenerConfig.of_rule(*named, sources, *carrier, side)
    assert ListenerConfig.parse(told.key, str(told)) == told
    assert config.is_forward_key(told.key)
    assert len(told.key) <= KEY_MAX
    assert len(str(told)) <= VALUE_MAX
    assert str(told).isascii()
    assert str(told).isprintable()


def test_no_comment_owner_or_path_reaches_the_qube() -> None:
    rule = ForwardRule.parse(
        "action=forward srcports=80 srchosts=any owner=secret path=hidden via=other comment=private"
    )
    told = ListenerConfig.of_rule(
        QubeName("work"),
        RuleName("web"),
        rule,
        Sources.parse("any"),
        Service.FORWARD_TCP,
        Transport.CALL,
        Side.VIFS,
    )
    assert not any(word in f"{told.key} {told}" for word in ("secret", "hidden", "other", "private"))


def test_ports_of_a_range_keep_their_distance() -> None:
    told = ListenerConfig.parse(
        "fwd.a.b", LINE.replace(" srcports=80-80 dstports=8080-8080", " srcports=80-81 dstports=8080-8081")
    )
    assert told.target_port(81) == 8081


def test_the_groups_are_those_of_the_agents_scripts() -> None:
    """network/setup-ip and vif-route-qubes of qubes-core-agent-linux set 1 and 2."""
    assert {side.value: side.group for side in Side} == {"outer": 0, "uplink": 1, "vifs": 2}


@pytest.mark.parametrize("key", ["fwd.work.web", "fwd.a.b.c.web", "fwd.x-y_z.w"])
def test_keys_print_as_they_parse(key: str) -> None:
    assert ListenerConfig.parse(key, LINE).key == key


def test_udp_has_a_key_and_a_service_of_its_own() -> None:
    told = ListenerConfig.parse("udp.work.dns", UDP_LINE)
    assert (told.key, told.proto, told.service) == ("udp.work.dns", Proto.UDP, Service.FORWARD_UDP)
    assert str(told) == UDP_LINE
    assert ListenerConfig.parse("fwd.work.dns", LINE).proto is Proto.TCP
    assert parse_key("udp.a.b.dns") == ForwardKey(QubeName("a.b"), RuleName("dns"), Proto.UDP)
    assert parse_key("fwd.udp.dns") == ForwardKey(QubeName("udp"), RuleName("dns"), Proto.TCP)
    assert str(parse_key("udp.fwd.dns")) == "udp.fwd.dns"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("fwd.work.dns", UDP_LINE, "qubes.ForwardUDP does not carry tcp"),
        ("udp.work.dns", LINE, "qubes.ForwardTCP does not carry udp"),
        ("udp.work.dns", LINE.replace("Forward", "Connect"), "qubes.ConnectTCP does not carry udp"),
        ("udp.work.dns", UDP_LINE.replace("mux", "call"), "carries many flows; transport=mux would be right"),
        ("udp.work.dns", f"{UDP_LINE} proxy=v1", "proxy=v1 is for TCP alone; proxy=v2 would be right"),
        ("udp.work.dns", f"{UDP_LINE} proto=udp", "unknown option"),
    ],
)
def test_a_protocol_that_does_not_fit_names_the_key(key: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        ListenerConfig.parse(key, value)
    assert str(error.value).startswith(f"{key}: ")
    assert words in str(error.value)


@pytest.mark.parametrize(
    "key",
    ["", "fwd.", "fwd.web", "fwd.work.", "fwd..web", "fwx.work.web", "fwd.wo/rk.web", "udp.", "udp.dns"],
)
def test_invalid_keys(key: str) -> None:
    with pytest.raises(ConfigError, match="entry '"):
        ListenerConfig.parse(key, LINE)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            LINE.replace("version=1", "version=2"),
            "written for another version; this qube reads version=1",
        ),
        (
            LINE.replace("version=1", "version=2 mark=7 \x00"),
            "'version=2', written for another version; this qube reads version=1",
        ),
        (LINE.replace("version=1", "version="), "'version=', written for another version"),
        (LINE.removeprefix("version=1 "), "option 'version' is missing; this qube reads version=1"),
        (f"{LINE} mark=7", "option 'mark' at column 131: unknown option; if dom0's package is newer"),
        (f"{LINE} mark=7", "update this qube's template"),
        (LINE.replace(" listen=0.0.0.0", ""), "option 'listen' is missing"),
        (LINE.replace("srchosts=10.0.0.0/8", "srchosts="), "option 'srchosts' at column"),
        (f"{LINE} comment=x", "option 'comment' at column 131: unknown option"),
        (LINE.replace("call", "auto"), "transport is undecided; mux or call would be right"),
        (LINE.replace("8080-8080", "1-2"), "srcports and dstports differ in length"),
        (
            LINE.replace("ForwardTCP", "ConnectTCP").replace("call", "mux"),
            "qubes.ConnectTCP carries one connection; transport=call would be right",
        ),
        (
            f"{LINE} expire=253402300800",
            "option 'expire' at column 131: '253402300800' is not a time in UNIX seconds, which are at most "
            "253402300799",
        ),
        ("\x00", "'\\x00' at column 1: an option is written name=value"),
    ],
)
def test_a_value_that_is_wrong_names_key_and_option(value: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        ListenerConfig.parse("fwd.work.web", value)
    assert str(error.value).startswith("fwd.work.web: ")
    assert words in str(error.value)


@given(st.text(max_size=60))
def test_any_text_is_a_configuration_or_a_config_error(text: str) -> None:
    for value in (text, f"{LINE} {text}"):
        with suppress(ConfigError):
            assert ListenerConfig.parse("fwd.work.web", value)


def test_a_value_too_large_for_qubesdb_is_refused() -> None:
    networks = ",".join(f"2001:db8:{number:x}::/48" for number in range(200))
    with pytest.raises(ConfigError, match=f"QubesDB takes {VALUE_MAX}; name fewer or larger networks"):
        ListenerConfig(
            target=QubeName("work"),
            name=RuleName("web"),
            side=Side.OUTER,
            listen=(),
            listen_ports=ListenPorts(80, 80),
            target_ports=TargetPorts(80, 80),
            sources=Sources.parse(networks),
            service=Service.FORWARD_TCP,
            transport=Transport.CALL,
        )


@pytest.mark.parametrize(
    ("change", "narrows"),
    [
        ("", False),
        ("srchosts=10.0.0.0/7", False),
        ("srchosts=10.0.0.0/9", True),
        ("srchosts=any listen=0.0.0.0,::", False),
        ("listen=10.0.0.1", True),
        ("srcports=79-80 dstports=8079-8080", False),
        ("srcports=79-80 dstports=8080-8081", True),
        ("srcports=81-81", True),
        ("dstports=81-81", True),
        ("side=vifs", True),
        ("on-expire=drain expire=1893456000 limits=connections:1 transport=mux", False),
    ],
)
def test_it_says_whether_it_allows_less_than_another(change: str, narrows: bool) -> None:
    options = dict(word.split("=", 1) for word in f"{LINE} {change}".split())
    changed = " ".join(f"{name}={value}" for name, value in options.items())
    old = ListenerConfig.parse("fwd.work.web", LINE)
    assert ListenerConfig.parse("fwd.work.web", changed).narrows(old) is narrows
    assert not old.narrows(old)
