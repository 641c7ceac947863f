# SPDX-License-Identifier: GPL-2.0-or-later
"""Documents of rules, as lines and as JSON: what parses prints, and what is wrong is named."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rule_strategies import named_rules, rules

from qubes_fwd_qrexec.common import exchange
from qubes_fwd_qrexec.common.errors import RuleError
from qubes_fwd_qrexec.common.rules import ForwardRule, NamedRule
from qubes_fwd_qrexec.common.values import QubeName


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
