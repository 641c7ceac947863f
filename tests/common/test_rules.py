# SPDX-License-Identifier: GPL-2.0-or-later
"""A rule's line form and JSON form both ways, and every mistake with its option, place and remedy."""

import json
from contextlib import suppress
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rule_strategies import named_rules, rules

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


@given(rules())
def test_the_json_form_prints_what_it_parses(rule: ForwardRule) -> None:
    assert exchange.rule_from_json(json.loads(json.dumps(rule.options())), "rule") == rule


@given(st.lists(named_rules, max_size=4, unique_by=lambda named: (named.target, named.name)))
def test_documents_print_what_they_parse(named: list[NamedRule]) -> None:
    marks = {QubeName("sys-vpn"): True, QubeName("sys-firewall"): False}
    for found in (
        exchange.parse_lines(exchange.print_lines(named, marks)),
        exchange.parse_json(json.dumps(exchange.as_json(named, marks))),
    ):
        assert [(read.target, read.name, read.rule) for read in found.rules] == named
        assert (found.tunnels, found.is_export, found.skipped) == (marks, True, 0)


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
        f"option 'srcports' at column {AT}: says again what option 'srcports' at column 16 has said",
    ),
    (
        f"{MINIMAL} src4=10.0.0.0/8",
        f"option 'src4' at column {AT}: says again what option 'srchosts' at column 28 has said",
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


JSON_RULE = '{"action": "forward", "srcports": "80", "srchosts": "any"}'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", 'document: an export of version 2 has "version": 2'),
        ('{"version": 3, "forwards": []}', 'document: an export of version 2 has "version": 2'),
        ('{"version": true, "forwards": []}', 'document: an export of version 2 has "version": 2'),
        ('{"version": 1}', 'document: besides "version" it has "forwards", a list, and nothing else'),
        (
            '{"version": 2, "forwards": []}',
            'document: it has "tunnels", an object of qubes and true or false',
        ),
        (
            '{"version": 2, "tunnels": {}, "x": 1, "forwards": []}',
            'document: besides "tunnels" and "version" it has "forwards", a list, and nothing else',
        ),
        (
            '{"version": 1, "tunnels": {}, "forwards": []}',
            'document: besides "version" it has "forwards", a list, and nothing else',
        ),
        ('{"version": 2, "tunnels": {"a": 1}, "forwards": []}', "tunnel 'a': is true or false"),
        ('{"version": 1, "version": 1}', "document: the key 'version' stands twice in one object"),
        (
            '{"version": 1, "forwards": [1]}',
            'forward 1: a forward has "qube", "name" and "rule", and nothing else',
        ),
        (
            '{"version": 1, "forwards": [{"qube": 1, "name": "a", "rule": {}}]}',
            'forward 1: "qube" and "name" are texts in quotes',
        ),
        (
            '{"version": 1, "forwards": [{"qube": "w", "name": "a", "rule": []}]}',
            "forward 1 (w a): a rule is an object of option names and their values",
        ),
        (
            '{"version": 1, "forwards": [{"qube": "w", "name": "a", "rule": {"srcports": 80}}]}',
            "forward 1 (w a), option 'srcports': 80 is not a text in quotes",
        ),
        (
            '{"version": 1, "forwards": [{"qube": "w", "name": "a", "rule": {"srcports": "0"}}]}',
            "forward 1 (w a), option 'srcports': '0' is not a port or range of ports: N or "
            "N-M, from 1 to 65535, "
            "the smaller first",
        ),
        (
            f'{{"version": 1, "forwards": [{{"qube": "w!", "name": "a", "rule": {JSON_RULE}}}]}}',
            "forward 1: 'w!' is not a qube's name: a letter, then at most 30 of [a-zA-Z0-9_.-]",
        ),
        ("[" * 100000, "document: not JSON that holds forwards: too deep"),
    ],
)
def test_a_json_document_names_forward_and_option(text: str, words: str) -> None:
    with pytest.raises(RuleError) as error:
        exchange.parse_json(text)
    assert str(error.value) == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version 3", "line 1: this program reads version 2 and not '3'"),
        ("a tunnel yes\nversion 2", "line 2: a line is the qube's name, the rule's name and the rule"),
        ("a tunnel", "line 1: a line is the qube's name, the rule's name and the rule"),
        (
            "a tunnel maybe",
            "line 1: 'maybe' is not yes or no; the name tunnel stands for the mark of a tunnel qube",
        ),
        ("a tunnel yes\na tunnel no", "line 2: says again whether a is marked as a tunnel"),
        ("action=forward srcports=0", "line 1, option 'srcports' at column 16: '0' is not a port or range"),
    ],
)
def test_lines_name_what_is_wrong_with_them(text: str, words: str) -> None:
    with pytest.raises(RuleError) as error:
        exchange.parse_lines(text)
    assert str(error.value).startswith(words)


def test_lines_of_2021_are_taken_among_others_and_those_of_one_forward_are_joined() -> None:
    text = (
        "action=accept dst4=10.0.0.0/8 comment=action=forward\n"
        "action=forward forwardtype=internal proto=tcp src4=10.0.0.0/8 srcports=80-80 comment=a b\n"
        "action=forward forwardtype=internal proto=tcp src6=fd00::/8 srcports=80-80 comment=c\n"
        "action=forward forwardtype=external proto=tcp src4=10.0.0.0/8 srcports=80-80\n"
        "action=drop"
    )
    found = exchange.parse_lines(text)
    assert (found.skipped, found.is_export, found.tunnels) == (2, False, {})
    assert [(str(r.rule.sources), r.rule.forward_type, r.rule.comment, r.place) for r in found.rules] == [
        ("10.0.0.0/8,fd00::/8", "internal", "a b; c", "line 2"),
        ("10.0.0.0/8", "external", "", "line 4"),
    ]


def test_anybody_joined_with_some_is_anybody() -> None:
    lines = ("action=forward srcports=80 srchosts=any", "action=forward srcports=80 src4=10.0.0.0/8")
    (read,) = exchange.parse_lines("\n".join(lines)).rules
    assert read.rule.sources.anyone
