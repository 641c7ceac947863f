# SPDX-License-Identifier: GPL-2.0-or-later
"""Whom a rule may let in, and that a text is a network or a name and never both."""

import pytest
from hypothesis import given
from rule_strategies import clients, qube_names

from qubes_fwd_qrexec.common.clients import Clients
from qubes_fwd_qrexec.common.errors import TextError
from qubes_fwd_qrexec.common.values import Sources, parse_network


@given(clients)
def test_it_prints_what_it_parses_and_is_its_own_union(some: Clients) -> None:
    assert Clients.parse(str(some)) == some
    assert Clients.union([some, some]) == some


@given(clients, clients)
def test_a_union_is_the_list_of_both(some: Clients, others: Clients) -> None:
    both = Clients.union([some, others])
    assert both == (
        Clients.parse("any") if some.anyone or others.anyone else Clients.parse(f"{some},{others}")
    )
    assert both.versions >= some.versions


@given(qube_names)
def test_no_name_is_a_network(name: str) -> None:
    with pytest.raises(TextError):
        parse_network(name)
    is_reserved = name == "any"
    assert Clients.parse(name) == (Clients(Sources.parse("any")) if is_reserved else Clients(qubes=(name,)))


def test_networks_come_first_then_qubes_then_tags_each_once() -> None:
    some = Clients.parse("@tag:games,personal,fd00::/8,fd00,10.0.0.0/8,@tag:games,personal")
    assert str(some) == "10.0.0.0/8,fd00::/8,fd00,personal,@tag:games"
    assert [str(network) for network in some.networks] == ["10.0.0.0/8", "fd00::/8"]
    assert some.has_names
    assert not some.anyone


@pytest.mark.parametrize(
    ("text", "versions"),
    [
        ("any", {4, 6}),
        ("10.0.0.0/8", {4}),
        ("fd00::/8", {6}),
        ("personal", {4, 6}),
        ("10.0.0.0/8,@tag:x", {4, 6}),
    ],
)
def test_a_qube_may_come_by_both_ip_versions(text: str, versions: set[int]) -> None:
    assert Clients.parse(text).versions == versions


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("any,personal", "any lets in everybody, and stands alone"),
        ("any,10.0.0.0/8", "any lets in everybody, and stands alone"),
        ("any,@tag:x", "any lets in everybody, and stands alone"),
        ("personal,", "a network such as"),
        ("", "a network such as"),
        ("my qube", "a qube's name"),
        ("x" * 32, "a qube's name"),
        ("@tag:", "a tag of"),
        ("@tag:a.b", "a tag of"),
        ("@tag:a/8", "a tag of"),
        ("@anyvm", "a tag of"),
        ("fd00/8", "a network such as"),
        ("personal:80", "a network such as"),
        ("-x", "a network such as"),
        ("0.0.0.0/1,128.0.0.0/1,personal", "which is said by the word any"),
    ],
)
def test_what_is_neither_network_nor_name_is_refused(text: str, words: str) -> None:
    with pytest.raises(TextError) as caught:
        Clients.parse(text)
    assert words in str(caught.value)


def test_there_is_no_value_for_nobody() -> None:
    with pytest.raises(TextError, match="networks, names of qubes or @tag:NAME; or the word any"):
        Clients()
