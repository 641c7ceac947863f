# SPDX-License-Identifier: GPL-2.0-or-later
"""The XML form both ways, the forms of 2021, and documents that are refused."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rule_strategies import named_rules, rules

from qubes_fwd_qrexec.common import rulexml
from qubes_fwd_qrexec.common.errors import RuleError
from qubes_fwd_qrexec.common.rules import ForwardRule, NamedRule
from qubes_fwd_qrexec.common.values import QubeName


@given(rules())
def test_the_xml_form_prints_what_it_parses(rule: ForwardRule) -> None:
    assert rulexml.parse_rule(rulexml.print_rule(rule)) == rule


@given(st.lists(named_rules, max_size=4, unique_by=lambda named: (named.target, named.name)))
def test_a_document_prints_what_it_parses(named: list[NamedRule]) -> None:
    marks = {QubeName("sys-vpn"): True, QubeName("sys-firewall"): False}
    found = rulexml.parse_document(rulexml.print_document(named, marks))
    read = [NamedRule(r.target, r.name, r.rule) for r in found.rules if r.target and r.name]
    assert sorted(read, key=lambda r: r[:2]) == sorted(named, key=lambda r: r[:2])
    assert (found.tunnels, found.is_export, found.skipped) == (marks, True, 0)


@given(st.text(max_size=60))
def test_any_text_is_a_document_or_a_rule_error(text: str) -> None:
    for whole in (text, f"<forwards version='1'>{text}</forwards>"):
        with suppress(RuleError):
            rulexml.parse_document(whole)


def test_one_rule_looks_as_in_a_firewall_file() -> None:
    rule = ForwardRule.parse("action=forward srcports=80 srchosts=any comment=a<b")
    assert rulexml.print_rule(rule) == (
        "<rule>\n  <properties>\n"
        '    <property name="action">forward</property>\n'
        '    <property name="mode">auto</property>\n'
        '    <property name="forwardtype">external</property>\n'
        '    <property name="proto">tcp</property>\n'
        '    <property name="srcports">80-80</property>\n'
        '    <property name="dstports">80-80</property>\n'
        '    <property name="srchosts">any</property>\n'
        '    <property name="comment">a&lt;b</property>\n'
        "  </properties>\n</rule>\n"
    )


def rule_xml(**properties: str) -> str:
    given = {"action": "forward", "srcports": "80", "srchosts": "any"} | properties
    inside = "".join(f'<property name="{n}">{v}</property>\n' for n, v in given.items() if v)
    return f"<rule><properties>\n{inside}</properties></rule>"


@pytest.mark.parametrize("more", [{"srchost": "10.0.0.0/8"}, {"src4": "10.0.0.0/8"}, {"src6": "fd00::/8"}])
def test_the_forms_of_2021_are_read(more: dict[str, str]) -> None:
    (value,) = more.values()
    assert str(rulexml.parse_rule(rule_xml(srchosts="", **more)).sources) == value


def test_a_firewall_file_gives_its_forwarding_rules_and_counts_the_others() -> None:
    accept = rule_xml(action="accept", srcports="", srchosts="", dsthost="10.0.0.0/8")
    text = f'<firewall version="2"><rules>{accept}{rule_xml()}{accept}</rules></firewall>'
    found = rulexml.parse_document(text)
    assert (len(found.rules), found.skipped) == (1, 2)
    assert (found.rules[0].target, found.rules[0].name) == (None, None)


def test_rules_of_2021_that_differ_only_in_their_network_are_joined() -> None:
    """It had one network a rule, so that one forward for two networks was two rules, of both families too."""
    rules = [
        rule_xml(srchosts="", srchost="192.168.0.0/16", comment="office"),
        rule_xml(action="drop", srcports="", srchosts=""),
        rule_xml(srchosts="", src6="fd00::/8", comment="office"),
        rule_xml(srchosts="", src4="10.0.0.0/8", src6="fd01::/16"),
        rule_xml(srchosts="", src4="10.0.0.0/8", expire="5"),
    ]
    found = rulexml.parse_document(f'<firewall version="2"><rules>{"".join(rules)}</rules></firewall>')
    assert (found.skipped, found.is_export) == (1, False)
    assert [(str(read.rule.sources), read.rule.comment, read.rule.expire) for read in found.rules] == [
        ("10.0.0.0/8,192.168.0.0/16,fd00::/8,fd01::/16", "office", None),
        ("10.0.0.0/8", "", 5),
    ]


def test_a_single_rule_is_a_document_too() -> None:
    assert len(rulexml.parse_document(rule_xml()).rules) == 1


DOC = "<forwards version='1'><qube name='work'>{}</qube></forwards>"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: not XML: no element found"),
        ("<a>", "line 1: not XML: no element found"),
        ("<a>\n</b>", "line 2: not XML: mismatched tag"),
        ("<!DOCTYPE a><a/>", "line 1: a document type or entity; take it out"),
        ("\n<!DOCTYPE a [<!ENTITY x 'y'>]><a>&x;</a>", "line 2: a document type or entity; take it out"),
        ("<a/>", 'a at line 1: expected <forwards version="2">, <rule>, or the <firewall> of a firewall.xml'),
        (
            "<forwards version='3'/>",
            'forwards at line 1: expected <forwards version="2">, <rule>, or the '
            "<firewall> of a firewall.xml",
        ),
        (
            "<forwards version='1'>\n<rule/></forwards>",
            "rule at line 2: <forwards> holds <qube> elements and nothing else",
        ),
        ("<forwards version='1'>\n<qube/></forwards>", "qube at line 2: a <qube> has a name here"),
        (
            "<forwards version='1'><qube name='1'/></forwards>",
            "qube '1' at line 1: '1' is not a qube's name: a letter, then at most 30 of [a-zA-Z0-9_.-]",
        ),
        (
            "<forwards version='1'><tunnel qube='a'>yes</tunnel></forwards>",
            "tunnel at line 1: <forwards> holds <qube> elements and nothing else",
        ),
        (
            "<forwards version='2'>\n<rule/></forwards>",
            "rule at line 2: <forwards> holds <qube> or <tunnel> elements and nothing else",
        ),
        (
            "<forwards version='2'><tunnel qube='a'>2</tunnel></forwards>",
            "tunnel at line 1: '2' is not yes or no; the name tunnel stands for the mark of a tunnel qube",
        ),
        (
            "<forwards version='2'><tunnel qube='a'><b/></tunnel></forwards>",
            "b at line 1: <tunnel> holds text and nothing else",
        ),
        (
            "<forwards version='2'><tunnel>yes</tunnel></forwards>",
            "tunnel at line 1: '' is not a qube's name: a letter, then at most 30 of [a-zA-Z0-9_.-]; "
            "the name tunnel stands for the mark of a tunnel qube",
        ),
        (DOC.format("x"), "qube 'work' at line 1: text between the <rule> elements"),
        (DOC.format("<rule/>"), "rule at line 1: a <rule> has a name here"),
        (DOC.format("\n<rule name='a'/>"), "rule 'a' at line 2: a rule has one <properties> element"),
        (
            DOC.format("<rule name='a'><properties>\n<property/></properties></rule>"),
            "rule 'a' at line 1, property at line 2: a property has a name",
        ),
        (
            "<rule><properties><property name='a'><b/></property></properties></rule>",
            "rule at line 1, property 'a' at line 1: a property holds text and nothing else",
        ),
        (
            rule_xml(srcports="0"),
            "rule at line 1, property 'srcports' at line 3: '0' is not a port or range of "
            "ports: N or N-M, from 1 to 65535, the smaller first",
        ),
        (
            rule_xml(bogus="1").replace("bogus", "srcports"),
            "rule at line 1, property 'srcports' at line 5: repeats property 'srcports' at line 3",
        ),
        (
            rule_xml(srcports=""),
            "rule at line 1, option 'srcports': missing; it names the exposed port or range, "
            "such as srcports=80-80",
        ),
        ("<a>" * 9 + "</a>" * 9, "a at line 1: elements stand too deep in each other for rules"),
    ],
)
def test_every_mistake_names_line_rule_and_property(text: str, words: str) -> None:
    with pytest.raises(RuleError) as error:
        rulexml.parse_document(text)
    assert str(error.value) == words


def test_one_rule_is_a_rule_element() -> None:
    with pytest.raises(RuleError, match="one rule is a <rule> element"):
        rulexml.parse_rule("<rules/>")
