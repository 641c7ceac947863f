# SPDX-License-Identifier: GPL-2.0-or-later
"""A rule's line form and JSON form both ways, and every mistake with its option, place and remedy."""

from contextlib import suppress
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rule_strategies import rules

from qubes_fwd_qrexec.common import exchange
from qubes_fwd_qrexec.common.errors import RuleError
from qubes_fwd_qrexec.common.options import split
from qubes_fwd_qrexec.common.rules import BrokenRule, ForwardRule, Limits, NamedRule
from qubes_fwd_qrexec.common.values import Proto, QubeName

MINIMAL = "action=forward srcports=80 srchosts=any"
FULL = (
    "action=forward mode=qrexec forwardtype=internal via=sys-vpn proto=tcp srcports=80-81 dstports=8080-8081 "
    "srchosts=10.0.0.0/8,192.168.0.0/16 listen=10.0.0.1 transport=mux proxy=v2 autostart=yes "
    "on-expire=drain enabled=no owner=work path=sys-firewall,sys-net follow-netvm=yes bypass-tunnel=yes "
    "limits=connections:10,per-source:2,rate:5 expire=1893456000 ended=yes comment=demo for the office"
)


@given(rules())
def test_the_line_form_prints_what_it_parses(rule: ForwardRule) -> None:
    assert ForwardRule.parse(str(rule)) == rule


@given(rules(), st.randoms(use_true_random=False))
def test_options_come_in_any_order_and_print_in_one(rule: ForwardRule, random: Random) -> None:
    options = [f"{name}={value}" for name, value in rule.options().items() if name != "comment"]
    random.shuffle(options)
    comment = f" comment={rule.comment}" if rule.comment else ""
    assert str(ForwardRule.parse(" ".join(options) + comment)) == str(rule)


@given(st.text(max_size=60))
def test_any_text_is_a_rule_or_a_rule_error(text: str) -> None:
    for line in (text, f"{MINIMAL} {text}"):
        with suppress(RuleError):
            assert ForwardRule.parse(str(rule := ForwardRule.parse(line))) == rule


def test_a_full_line_is_canonical_already_and_a_short_one_gets_its_defaults() -> None:
    assert str(ForwardRule.parse(FULL)) == FULL
    assert str(ForwardRule.parse(MINIMAL)) == (
        "action=forward mode=auto forwardtype=external proto=tcp srcports=80-80 dstports=80-80 srchosts=any"
    )
    assert list(ForwardRule.parse(FULL).options()) == list(ForwardRule.option_names())


@pytest.mark.parametrize(
    "options",
    [
        "mode=qrexec",
        "mode=nft",
        "mode=qrexec transport=mux proxy=v2 autostart=yes limits=connections:9,per-source:3,rate:5",
        "on-expire=drain expire=1893456000",
    ],
)
@pytest.mark.parametrize("proto", ["tcp", "udp", "both"])
def test_each_protocol_goes_with_every_mode(proto: str, options: str) -> None:
    rule = ForwardRule.parse(f"{MINIMAL} proto={proto} {options}")
    assert f" proto={proto} " in str(rule)
    assert ForwardRule.parse(str(rule)) == rule


def test_single_calls_of_a_rule_for_both_are_those_of_tcp() -> None:
    assert ForwardRule.parse(f"{MINIMAL} proto=both transport=call").proto is Proto.BOTH


@pytest.mark.parametrize(
    ("line", "srchosts"),
    [
        ("srchost=10.0.0.0/8", "10.0.0.0/8"),
        ("src4=10.0.0.0/8", "10.0.0.0/8"),
        ("src6=fd00::/8 src4=10.0.0.0/8", "10.0.0.0/8,fd00::/8"),
    ],
)
def test_the_spellings_of_2021_are_read_and_never_written(line: str, srchosts: str) -> None:
    assert ForwardRule.parse(f"action=forward srcports=80 {line}").options()["srchosts"] == srchosts


AT = len(MINIMAL) + 2
BAD_PORTS = ["+8080", "08080", "8_080", "8080\n", "\u0668\u0660\u0668\u0660", "8\u00b2", "0", "65536", ""]
BAD = [
    ("", "option 'action': missing; a forwarding rule has action=forward"),
    (
        "action=forward srchosts=any",
        "option 'srcports': missing; it names the exposed port or range, such as srcports=80-80",
    ),
    (
        "action=forward srcports=80",
        "option 'srchosts': missing; it names the networks or qubes that may connect, or says any",
    ),
    (
        "action=accept",
        "option 'action' at column 1: 'accept' is not 'forward', the only action of a forwarding rule",
    ),
    (
        f"{MINIMAL} srcports=81",
        f"option 'srcports' at column {AT}: repeats option 'srcports' at column 16",
    ),
    (
        f"{MINIMAL} src4=10.0.0.0/8",
        f"option 'src4' at column {AT}: repeats option 'srchosts' at column 28",
    ),
    (f"{MINIMAL} mode=fast", f"option 'mode' at column {AT}: 'fast' is not one of auto, nft, qrexec"),
    (
        f"{MINIMAL} forwardtype=x",
        f"option 'forwardtype' at column {AT}: 'x' is not one of external, internal",
    ),
    (f"{MINIMAL} proto=icmp", f"option 'proto' at column {AT}: 'icmp' is not one of tcp, udp, both"),
    (f"{MINIMAL} transport=x", f"option 'transport' at column {AT}: 'x' is not one of auto, mux, call"),
    (f"{MINIMAL} proxy=on", f"option 'proxy' at column {AT}: 'on' is not one of off, v1, v2"),
    (f"{MINIMAL} on-expire=x", f"option 'on-expire' at column {AT}: 'x' is not one of cut, drain"),
    (f"{MINIMAL} autostart=maybe", f"option 'autostart' at column {AT}: 'maybe' is not yes or no"),
    (f"{MINIMAL} enabled=2", f"option 'enabled' at column {AT}: '2' is not yes or no"),
    (f"{MINIMAL} follow-netvm=y", f"option 'follow-netvm' at column {AT}: 'y' is not yes or no"),
    (f"{MINIMAL} bypass-tunnel=", f"option 'bypass-tunnel' at column {AT}: '' is not yes or no"),
    (
        f"{MINIMAL} via=1",
        f"option 'via' at column {AT}: '1' is not a qube's name: a letter, then at most 30 of [a-zA-Z0-9_.-]",
    ),
    (
        f"{MINIMAL} owner=a,b",
        f"option 'owner' at column {AT}: 'a,b' is not a qube's name: a letter, then at most "
        "30 of [a-zA-Z0-9_.-]",
    ),
    (
        f"{MINIMAL} path=a,,b",
        f"option 'path' at column {AT}: '' is not a qube's name: a letter, then at most 30 of [a-zA-Z0-9_.-]",
    ),
    (f"{MINIMAL} listen=lo", f"option 'listen' at column {AT}: 'lo' is not an IPv4 or IPv6 address"),
    (
        f"{MINIMAL} expire=9223372036854775808",
        f"option 'expire' at column {AT}: '9223372036854775808' is not a time in UNIX seconds, which are at "
        "most 253402300799",
    ),
    (f"{MINIMAL} expire=+8h", f"option 'expire' at column {AT}: '+8h' is not a whole number"),
    (
        f"{MINIMAL} limits=rate:0",
        f"option 'limits' at column {AT}: 'rate:0' is not a list of limits such as "
        "connections:1000,per-source:100,rate:50, each once and at least 1",
    ),
    (
        f"{MINIMAL} comment=\u00e9",
        f"option 'comment' at column {AT}: '\\xe9' is not printable ASCII on one line, "
        "which is all that a Qubes feature can hold",
    ),
    (
        "action=forward srcports=80 srchosts=10.0.0.1/8",
        "option 'srchosts' at column 28: '10.0.0.1/8' is not a "
        "network: bits of the host are set; 10.0.0.0/8 would be right",
    ),
    (
        "action=forward srcports=80 src4=fd00::/8",
        "option 'src4' at column 28: 'fd00::/8' is not IPv4 networks, comma-separated",
    ),
    (
        "action=forward srcports=80 src6=any",
        "option 'src6' at column 28: 'any' is not IPv6 networks, comma-separated",
    ),
    (
        f"{MINIMAL} dstports=80-81",
        "options 'srcports' and 'dstports': 80-80 is 1 port and 80-81 is 2 ports; both must have the same "
        "number",
    ),
    (
        f"{MINIMAL} proto=udp proxy=v1",
        "options 'proto' and 'proxy': version 1 of the PROXY protocol is for TCP alone; use proxy=v2",
    ),
    (
        f"{MINIMAL} proto=both mode=qrexec proxy=v1",
        "options 'proto' and 'proxy': version 1 of the PROXY protocol is for TCP alone; use proxy=v2",
    ),
    (
        f"{MINIMAL} proto=udp transport=call",
        "options 'proto' and 'transport': single calls carry connections of TCP; leave transport out",
    ),
    (
        f"{MINIMAL} proto=both transport=call proxy=v2",
        "options 'transport' and 'proxy': PROXY headers need mux calls; use transport=mux",
    ),
    (
        f"{MINIMAL} proto=udp mode=nft autostart=yes",
        "options 'mode' and 'autostart': packets cannot start a halted qube; use mode=qrexec",
    ),
    (
        f"{MINIMAL} mode=nft transport=call",
        "options 'mode' and 'transport': transport is about qrexec; leave it out with mode=nft",
    ),
    (
        f"{MINIMAL} mode=nft proxy=v1",
        "options 'mode' and 'proxy': nftables cannot add a PROXY header; use mode=qrexec",
    ),
    (
        f"{MINIMAL} transport=call proxy=v1",
        "options 'transport' and 'proxy': PROXY headers need mux calls; use transport=mux",
    ),
    (
        "action=forward srcports=80 srchosts=10.0.0.0/8,fd00::/8 listen=10.0.0.1",
        "options 'listen' and "
        "'srchosts': fd00::/8 can never reach 10.0.0.1: IPv4 and IPv6 do not mix; make "
        "a second rule for IPv6",
    ),
    (
        "action=forward srcports=80 srchosts=10.0.0.0/8,personal",
        "options 'srchosts' and 'forwardtype': an external forward lets in no qubes, such as "
        "personal; name networks, or use forwardtype=internal (--internal)",
    ),
    *(
        (
            f"action=forward srchosts=any {name}={port}",
            f"option {name!r} at column 29: {port!a} is not a port or "
            "range of ports: N or N-M, from 1 to 65535, the smaller first",
        )
        for name in ("srcports", "dstports")
        for port in BAD_PORTS
    ),
]


@pytest.mark.parametrize(("line", "words"), BAD)
def test_every_mistake_names_option_place_and_what_would_be_right(line: str, words: str) -> None:
    with pytest.raises(RuleError) as error:
        ForwardRule.parse(line)
    assert str(error.value) == words


FAULTS = [
    (MINIMAL, []),
    (f"{MINIMAL} proxy=v2 transport=auto", []),
    ("action=forward srcports=0 srchosts=nobody:1 via=!", [("srcports",), ("srchosts",), ("via",)]),
    ("action=forward dstports=x", [("dstports",), ("srcports",), ("srchosts",)]),
    ("action=forward src4=10.0.0.0/8 srcports=80", []),
    (f"{MINIMAL} mode=nft proxy=v2", [("mode", "proxy")]),
    (f"{MINIMAL} mode=nft proxy=v2 listen=1", [("listen",)]),
    (f"{MINIMAL} bogus=1 limits=rate:0", [("bogus",), ("limits",)]),
    (f"{MINIMAL} via=a via=b", [("via",)]),
]


@pytest.mark.parametrize(("line", "names"), FAULTS)
def test_all_that_is_wrong_with_options_is_found_at_once(line: str, names: list[tuple[str, ...]]) -> None:
    assert [fault.options for fault in ForwardRule.faults(split(line))] == names


@pytest.mark.parametrize("text", ["", "rate", "rate:1,rate:2", "speed:1", "rate:1,", "rate:x", "rate=1"])
def test_invalid_limits(text: str) -> None:
    with pytest.raises(RuleError, match="each once and at least 1"):
        ForwardRule.parse(f"{MINIMAL} limits={text}")


def test_limits_print_what_is_set() -> None:
    assert str(Limits(rate=5)) == "rate:5"
    assert Limits.parse("per-source:2,connections:9") == Limits(connections=9, per_source=2)


@pytest.mark.parametrize(
    ("options", "addresses"),
    [
        ("srchosts=any", ["0.0.0.0", "::"]),
        ("srchosts=10.0.0.0/8", ["0.0.0.0"]),
        ("srchosts=fd00::/8", ["::"]),
        ("srchosts=any listen=fd00::1", ["fd00::1"]),
        ("srchosts=personal forwardtype=internal", ["0.0.0.0", "::"]),
        ("srchosts=10.0.0.0/8,@tag:x forwardtype=internal", ["0.0.0.0", "::"]),
    ],
)
def test_a_rule_listens_on_the_families_of_its_sources(options: str, addresses: list[str]) -> None:
    rule = ForwardRule.parse(f"action=forward srcports=80 {options}")
    assert list(map(str, rule.listen_addresses)) == addresses


def test_ports_of_a_range_keep_their_distance() -> None:
    rule = ForwardRule.parse("action=forward srcports=80-82 dstports=8080-8082 srchosts=any")
    assert [rule.target_port(port) for port in (80, 82)] == [8080, 8082]


def test_rules_are_called_by_target_and_name() -> None:
    assert (
        str(NamedRule(QubeName("work"), exchange.RuleName("web"), ForwardRule.parse(MINIMAL))) == "work web"
    )
    assert str(BrokenRule(QubeName("work"), "x!", "", "")) == "work x!"


def test_columns_count_from_the_line_that_holds_the_rule() -> None:
    with pytest.raises(RuleError, match="at column 10"):
        ForwardRule.from_options(split("work web action=x", 9))
