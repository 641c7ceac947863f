# SPDX-License-Identifier: GPL-2.0-or-later
"""The firewall's rules as text. `test_firewall_namespaces` tests what nft makes of them."""

import re
from collections.abc import Container
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from helpers import Everywhere, write_config
from hypothesis import given
from hypothesis import strategies as st

from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.entries import KEY_MAX
from qubes_fwd_qrexec.common.values import Binding
from qubes_fwd_qrexec.firewall.chain import (
    JUMP,
    OURS,
    Family,
    Rule,
    Seen,
    is_right,
    is_waiting,
    rules,
    seen,
    transaction,
)
from qubes_fwd_qrexec.firewall.chain import usable_families as usable

RULES = (Rule("fwd.work.web", "tcp dport 80 accept"), Rule("fwd.work.ssh", "tcp dport 22 accept"))
COMMENTS = tuple(rule.comment for rule in RULES)
RIGHT = Seen(jumps=(7,), is_jump_right=True, comments=COMMENTS)
EVERYWHERE = Everywhere()
OUTER = 'iifgroup 0 iifname != "lo"'


@pytest.fixture
def texts(tmp_path: Path) -> Any:
    """The rules' texts for one forward with these options, by family."""

    def make(
        port: str = "80", listening: Container[Binding] = EVERYWHERE, **options: str
    ) -> dict[str, list[str]]:
        config = forward(tmp_path / "c", port, **options)
        return {family.value: [rule.text for rule in rules([config], family, listening)] for family in Family}

    return make


def forward(directory: Path, port: str = "80", **options: str) -> ListenerConfig:
    file = write_config(directory, 0, 0, srcports=port, dstports=port, **options)
    return ListenerConfig.parse(file.name, file.read_text())


def at(address: str, *ports: int) -> frozenset[Binding]:
    return frozenset((ip_address(address), port) for port in ports)


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
    texts: Any, listening: frozenset[Binding]
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
        for network in ("10.0.0.0/8", "192.168.0.0/16")
        for ports in ranges
    ]


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


@given(st.text(alphabet="abc.-_XYZ019", min_size=1, max_size=KEY_MAX), st.text(max_size=3))
def test_a_comment_fits_tells_rules_apart_and_needs_no_escape(label: str, text: str) -> None:
    comment = Rule(label, text).comment
    assert re.fullmatch(r"[a-zA-Z0-9._-]+ [0-9a-f]{12}", comment)
    assert len(comment) < 128
    assert comment != Rule(label, text + " ").comment


def test_what_is_right_is_not_touched() -> None:
    assert transaction(Family.IP, RULES, RIGHT) == ""
    assert transaction(Family.IP, (), Seen()) == ""


def test_everything_is_made_from_nothing() -> None:
    assert transaction(Family.IP6, RULES, Seen()).splitlines() == [
        f"add chain ip6 qubes {OURS}",
        f"flush chain ip6 qubes {OURS}",
        f'add rule ip6 qubes {OURS} tcp dport 80 accept comment "{COMMENTS[0]}"',
        f'add rule ip6 qubes {OURS} tcp dport 22 accept comment "{COMMENTS[1]}"',
        f'add rule ip6 qubes custom-input {JUMP.text} comment "{JUMP.comment}"',
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        Seen(jumps=(7,), is_jump_right=True, comments=COMMENTS[::-1]),
        Seen(jumps=(7,), is_jump_right=True, comments=(*COMMENTS, "")),
        Seen(jumps=(7,), is_jump_right=True, comments=COMMENTS[:1]),
        Seen(jumps=(7,), is_jump_right=False, comments=COMMENTS),
        Seen(jumps=(7, 9), is_jump_right=False, comments=COMMENTS),
        Seen(jumps=(), comments=COMMENTS),
        Seen(jumps=(), comments=()),
    ],
)
def test_what_differs_is_made_anew_and_its_jumps_replaced(wrong: Seen) -> None:
    lines = transaction(Family.IP, RULES, wrong).splitlines()
    assert lines[: len(wrong.jumps)] == [
        f"delete rule ip qubes custom-input handle {handle}" for handle in wrong.jumps
    ]
    assert lines[len(wrong.jumps) :] == transaction(Family.IP, RULES, Seen()).splitlines()


def test_everything_is_removed_when_no_forward_is_left() -> None:
    assert transaction(Family.IP, (), RIGHT).splitlines() == [
        "delete rule ip qubes custom-input handle 7",
        f"flush chain ip qubes {OURS}",
        f"delete chain ip qubes {OURS}",
    ]


def test_a_chain_that_somebody_else_jumps_to_is_left_there_empty() -> None:
    foreign = Seen(comments=COMMENTS, is_foreign=True)
    assert transaction(Family.IP, (), foreign).splitlines() == [f"flush chain ip qubes {OURS}"]
    assert is_right((), Seen(comments=(), is_foreign=True))
    assert not is_right((), Seen(comments=()))


def entry(chain: str, handle: int, comment: str | None = None, to: str | None = None) -> dict[str, Any]:
    expr: list[Any] = [{"accept": None} if to is None else {"jump": {"target": to}}]
    rule = {"family": "ip", "table": "qubes", "chain": chain, "handle": handle, "expr": expr}
    return {"rule": rule if comment is None else rule | {"comment": comment}}


OUR_CHAIN = {"chain": {"family": "ip", "table": "qubes", "name": OURS}}
OUR_JUMP = entry("custom-input", 7, JUMP.comment, OURS)


def test_what_is_ours_is_seen() -> None:
    table = [
        {"metainfo": {}},
        OUR_CHAIN,
        entry("custom-input", 3),
        OUR_JUMP,
        entry(OURS, 8, COMMENTS[0]),
        entry(OURS, 9),
    ]
    assert seen(table) == Seen(jumps=(7,), is_jump_right=True, comments=(COMMENTS[0], ""))
    assert seen([entry("custom-input", 3)]) == Seen()


@pytest.mark.parametrize(
    "table",
    [
        [OUR_JUMP, entry("custom-input", 9)],  # the user's rules come first
        [OUR_JUMP, entry("custom-input", 9, JUMP.comment, OURS)],
        [entry("custom-input", 7, f"{OURS} 0123456789ab", OURS)],  # of another version
    ],
)
def test_a_jump_that_is_not_as_it_should_be_is_seen(table: list[dict[str, Any]]) -> None:
    found = seen(table)
    assert found.jumps[0] == 7
    assert not found.is_jump_right


def test_other_rules_are_never_taken_for_ours() -> None:
    table = [
        entry("custom-input", 3, JUMP.comment),  # the user has our tag, and goes elsewhere
        entry("custom-input", 4, "mine", OURS),  # or goes to our chain
        entry("input", 5, JUMP.comment, OURS),
        entry("custom-forward", 6, None, OURS),
    ]
    assert seen(table) == Seen(is_foreign=True)


def test_a_family_is_usable_when_its_table_has_the_users_chain() -> None:
    def chain(family: str, table: str, name: str) -> dict[str, Any]:
        return {"chain": {"family": family, "table": table, "name": name}}

    there = chain("ip", "qubes", "custom-input")
    assert usable([{"metainfo": {}}, there]) == [Family.IP]
    assert usable([there, chain("ip6", "qubes", "custom-input")]) == [Family.IP, Family.IP6]
    elsewhere = [chain("inet", "qubes", "custom-input"), chain("ip", "qubes-firewall", "custom-input")]
    assert usable([*elsewhere, chain("ip6", "qubes", "antispoof")]) == []
