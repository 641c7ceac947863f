# SPDX-License-Identifier: GPL-2.0-or-later
"""Documents in YAML: they print what they parse, and every value is the text that stands there."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rule_strategies import named_rules

from qubes_fwd_qrexec.common import ruleyaml
from qubes_fwd_qrexec.common.errors import RuleError, StoreError
from qubes_fwd_qrexec.common.rules import NamedRule
from qubes_fwd_qrexec.common.values import QubeName

BY_HAND = """\
# what a person writes
version: 2
tunnels: {sys-vpn: yes, sys-net: false}
forwards:
- qube: work
  name: web
  rule:
    action: forward
    srcports: 80
    srchosts: any
    enabled: no
    comment: for "the office" (10:30)
"""


@given(st.lists(named_rules, max_size=2, unique_by=lambda named: (named.target, named.name)))
def test_documents_print_what_they_parse(named: list[NamedRule]) -> None:
    marks = {QubeName("sys-vpn"): True, QubeName("no"): False}
    found = ruleyaml.parse_document(ruleyaml.print_document(named, marks))
    assert [(read.target, read.name, read.rule) for read in found.rules] == named
    assert (found.tunnels, found.is_export, found.skipped) == (marks, True, 0)


def test_values_need_no_quotes() -> None:
    found = ruleyaml.parse_document(BY_HAND)
    (read,) = found.rules
    assert str(read.rule) == (
        "action=forward mode=auto forwardtype=external proto=tcp srcports=80-80 dstports=80-80 srchosts=any "
        'enabled=no comment=for "the office" (10:30)'
    )
    assert (found.tunnels, found.is_export) == ({"sys-vpn": True, "sys-net": False}, True)
    older = ruleyaml.parse_document("version: 1\nforwards: []")
    assert (older.rules, older.is_export) == ([], False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version: 3\nforwards: []", 'document: an export of version 2 has "version": 2'),
        ("- version", 'document: an export of version 2 has "version": 2'),
        ("# nothing", 'document: an export of version 2 has "version": 2'),
        ("version: [2", "document: not YAML: while parsing a flow sequence"),
        ("a: 1\n---\nb: 2", "document: not YAML: expected a single document"),
        (
            "version: 2\nversion: 2\ntunnels: {}\nforwards: []",
            "document: the key 'version' stands twice in one object",
        ),
        ("? [a]\n: b", "document: a key is a text"),
        ("version: 2\ntunnels: &a {}\nforwards: *a", "document: an alias (*NAME) is not read"),
        ("version: 2\ntunnels: {}\nforwards: &a [*a]", "document: an alias (*NAME) is not read"),
        ("version: 2\ntunnels: {a: maybe}\nforwards: []", "tunnel 'a': 'maybe' is not yes or no"),
        ("version: 2\ntunnels: {a: [yes]}\nforwards: []", "tunnel 'a': is true or false"),
        ("version: 2\ntunnels:\nforwards: []", 'document: it has "tunnels", an object'),
        (
            BY_HAND.replace("srcports: 80", "srcports: [80]"),
            "forward 1 (work web), option 'srcports': ['80'] is not a text in quotes",
        ),
        ("[" * 100_000, "document: not YAML that holds forwards: too deep"),
    ],
)
def test_what_is_wrong_is_named(text: str, words: str) -> None:
    with pytest.raises(RuleError) as error:
        ruleyaml.parse_document(text)
    assert str(error.value).startswith(words)


def test_no_object_is_made_of_a_tag() -> None:
    text = BY_HAND.replace("srchosts: any", "srchosts: !!python/object/apply:os.getcwd any")
    assert ruleyaml.parse_document(text) == ruleyaml.parse_document(BY_HAND)


def test_without_pyyaml_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    for asked in (lambda: ruleyaml.parse_document(BY_HAND), lambda: ruleyaml.print_document([], {})):
        with pytest.raises(StoreError, match=r"install python3-pyyaml \(Debian: python3-yaml\)"):
            asked()
