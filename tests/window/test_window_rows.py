# SPDX-License-Identifier: GPL-2.0-or-later
"""What the list says of each rule, and which it shows."""

import pytest
from looks import look, still_allowed
from worlds import NOW, nft_world, qube, rule, world

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.states import State
from qubes_fwd_qrexec.common.rules import NamedRule
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.window.model import entries, rows
from qubes_fwd_qrexec.window.model.look import Look, look_at
from qubes_fwd_qrexec.window.model.rows import ENDED, Filter, Row, Show, ends, groups

LAN = "srchosts=192.168.0.0/16"
HALTED = qube("sys-net", is_running=False, provides_network=True)
PERSONAL = qube("personal", "sys-firewall", ip="10.137.0.11")
MOVED = "path=sys-net"
BROKEN = ("work", "odd", "nonsense")


def only(shown: Look, wanted: Filter = rows.ALL) -> Row:
    ((row,),) = (group.rows for group in groups(shown, wanted))
    return row


ROWS = [
    ("", ("active", "OPEN", "anybody", "sys-net:80", "over qrexec", "work:80", "no end")),
    (LAN, ("active", "OPEN", "192.168.0.0/16", "sys-net:80", "over qrexec", "work:80", "no end")),
    (
        f"{LAN} srcports=8000-8010 dstports=80-90",
        ("active", "OPEN", "192.168.0.0/16", "sys-net:8000-8010", "over qrexec", "work:80-90", "no end"),
    ),
    (
        "srchosts=10.0.0.0/8 listen=10.1.2.3 proto=udp",
        ("active", "OPEN", "10.0.0.0/8", "sys-net:80 (10.1.2.3)", "over qrexec", "work:80 udp", "no end"),
    ),
    (
        "srchosts=personal forwardtype=internal proto=both",
        ("active", "OPEN", "personal", "sys-firewall:80", "over qrexec", "work:80 tcp+udp", "no end"),
    ),
    (
        f"{LAN} enabled=no",
        ("disabled", "CLOSED", "192.168.0.0/16", "sys-net:80", "over qrexec", "work:80", "no end"),
    ),
    (
        f"{LAN} expire={NOW + 7 * 3600}",
        ("active", "OPEN", "192.168.0.0/16", "sys-net:80", "over qrexec", "work:80", "ends in 7 h"),
    ),
    (
        f"{LAN} {MOVED}",
        ("suspended", "SUSPENDED", "192.168.0.0/16", "sys-net:80", "over qrexec", "work:80", "no end"),
    ),
    (
        f"{LAN} via=gone",
        ("refused", "REFUSED", "192.168.0.0/16", "gone:80", "over qrexec", "work:80", "no end"),
    ),
]


@pytest.mark.parametrize(("text", "cells"), ROWS)
def test_a_row_says_state_sources_place_way_and_end_in_words(text: str, cells: tuple[str, ...]) -> None:
    row = only(look(rule(text), inventory=world(PERSONAL)))
    assert (row.state, *row[2:8]) == (State(cells[0]), *cells[1:])
    assert (row.is_live, row.note) == (cells[0] == "active", "")
    assert row.is_anybody == (cells[2] == "anybody")


def test_a_forward_by_nft_says_so() -> None:
    row = only(look(rule(f"{LAN} mode=nft"), inventory=nft_world()))
    assert (row.mark, row.mode, row.at, row.to) == ("OPEN", "by nft", "sys-net:80", "work:80")


def test_a_row_says_what_it_waits_for_and_that_all_is_held() -> None:
    waits = only(look(rule(LAN), inventory=world(HALTED)))
    assert (waits.state, waits.mark, waits.is_live) == (State.WAITING, "WAITING", True)
    held = only(look(rule(LAN), is_held=True))
    assert (held.state, held.mark, held.is_live) == (State.HELD, "HELD", False)


def test_what_cannot_be_read_is_a_row_of_its_qube_with_why() -> None:
    (group,) = groups(look(BROKEN, rule(LAN), rule("srcports=81", name="zz")))
    assert [(row.key[1], row.mark) for row in group.rows] == [
        ("odd", "BROKEN"),
        ("web", "OPEN"),
        ("zz", "OPEN"),
    ]
    broken = group.rows[0]
    assert (broken.state, broken.is_live, broken.is_anybody) == (State.BROKEN, False, False)
    assert broken.comment == "'nonsense' at column 1: an option is written name=value"
    assert (broken.who, broken.at, broken.to, broken.ends) == ("", "", "", "")


def test_what_others_have_stored_acts_on_no_terminal_and_no_widget() -> None:
    (group,) = groups(look(("work", "a\x1bb", ""), ("work", "b", "\x1b]0;<b>=")))
    assert all(row.comment.isprintable() for row in group.rows)
    assert "option '\\x1b]0;<b>' at" in group.rows[1].comment


def test_groups_are_targets_with_label_icon_and_netvms() -> None:
    inventory = world(
        qube("work", "sys-firewall", label="blue", icon="appvm-blue", template=QubeName("fedora-42"))
    )
    shown = look(rule(LAN), rule(LAN, "hidden"), rule(f"{LAN} srcports=81", name="a"), inventory=inventory)
    assert [(group[:4], [row.key[1] for row in group.rows]) for group in groups(shown)] == [
        (("hidden", "", "", "sys-vpn - sys-firewall - sys-net"), ["web"]),
        (("work", "blue", "appvm-blue", "sys-firewall - sys-net"), ["a", "web"]),
    ]


def test_rules_whose_time_is_over_are_one_group_at_the_end() -> None:
    over = f"{LAN} expire={NOW - 180}"
    shown = look(rule(over), rule(f"{LAN} srcports=81", name="z"), rule(over, "hidden"))
    work, ended = groups(shown)
    assert (work.qube, [row.key[1] for row in work.rows]) == ("work", ["z"])
    assert (ended.qube, [row.key[0] for row in ended.rows]) == (ENDED, ["hidden", "work"])
    assert {(row.mark, row.ends) for row in ended.rows} == {("ENDED", "ended 3 min ago")}


ENDS = [
    (None, "no end"),
    (NOW + 1, "ends in 1 s"),
    (NOW + 119, "ends in 119 s"),
    (NOW + 120, "ends in 2 min"),
    (NOW + 7199, "ends in 120 min"),
    (NOW + 7200, "ends in 2 h"),
    (NOW + 47 * 3600, "ends in 47 h"),
    (NOW + 48 * 3600, "ends in 2 days"),
    (NOW, "ended 0 min ago"),
    (NOW - 7199, "ended 120 min ago"),
    (NOW - 7200, "ended 2 h ago"),
    (NOW - 86400 * 3, "ended 3 days ago"),
]


@pytest.mark.parametrize(("expire", "words"), ENDS)
def test_the_end_is_told_from_now(expire: int | None, words: str) -> None:
    assert ends(expire, float(NOW)) == words


def test_what_has_ended_stays_ended_however_the_clock_is_set() -> None:
    assert ends(NOW + 60, float(NOW), has_ended=True) == "ended"


def test_the_clock_goes_on_between_looks() -> None:
    (group,) = groups(look(rule(f"{LAN} expire={NOW + 7200}")), now=NOW + 3600)
    assert group.rows[0].ends == "ends in 60 min"


ALL = (
    rule(f"{LAN} comment=Demo", name="open"),
    rule(f"{LAN} srcports=81 {MOVED}", name="asks"),
    rule(f"{LAN} srcports=82 enabled=no", name="off"),
    rule(f"{LAN} via=sys-vpn", "hidden", "vpn"),
    rule(f"{LAN} srcports=84 expire={NOW}", name="over"),
)


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (Filter(), ["vpn", "asks", "off", "open", "bad", "over"]),
        (Filter(Show.OPEN), ["vpn", "open"]),
        (Filter(Show.WAITING_FOR_YOU), ["asks"]),
        (Filter(Show.CLOSED), ["asks", "off", "bad", "over"]),
        (Filter(text="DEMO"), ["open"]),
        (Filter(text="hid"), ["vpn"]),
        (Filter(text="192.168 :81"), ["asks"]),
        (Filter(text="sys-net off"), ["off"]),
        (Filter(text="nothing like it"), []),
        (Filter(Show.OPEN, QubeName("work")), ["open"]),
        (Filter(qube=QubeName("sys-vpn")), ["vpn"]),
        (Filter(qube=QubeName("sys-firewall")), ["vpn", "asks", "off", "open", "over"]),
        (Filter(qube=QubeName("work")), ["asks", "off", "open", "bad", "over"]),
        (Filter(qube=QubeName("vault")), []),
    ],
)
def test_a_filter_shows_what_fits(wanted: Filter, names: list[str]) -> None:
    shown = groups(look(*ALL, ("work", "bad", "x")), wanted)
    found = [row.key[1] for group in shown for row in group.rows]
    assert sorted(found[:-1]) + found[-1:] == sorted(names[:-1]) + names[-1:]


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("work", {"open": "target", "bad": "target"}),
        ("sys-net", {"open": "exposed", "vpn": "netvm of the target"}),
        ("sys-vpn", {"vpn": "exposed"}),
    ],
)
def test_a_row_has_the_role_of_the_qube_that_was_asked_for(name: str, roles: dict[str, str]) -> None:
    shown = groups(look(ALL[0], ALL[3], ("work", "bad", "x")), Filter(qube=QubeName(name)))
    assert {row.key[1]: row.role for group in shown for row in group.rows} == roles


def test_a_hop_of_a_forward_by_nft_sends_its_packets_on() -> None:
    shown = look(rule(f"{LAN} mode=nft"), inventory=nft_world())
    assert only(shown, Filter(qube=QubeName("sys-firewall"))).role == "forwards packets"
    assert rows.qubes(shown) == ["sys-firewall", "sys-net", "work"]


def test_the_qubes_that_are_passed_are_those_of_all_rules_open_or_not() -> None:
    assert rows.qubes(look(*ALL)) == ["hidden", "sys-firewall", "sys-net", "sys-vpn", "work"]
    assert rows.qubes(look()) == []


IN_FORCE: list[tuple[str, str, tuple[str, State, bool, bool, str]]] = [
    ("", LAN, ("NOT IN FORCE", State.WAITING, True, False, "It is not in force yet.")),
    (
        f"{LAN} enabled=no",
        LAN,
        ("NOT IN FORCE", State.WAITING, True, False, "It is not in force yet."),
    ),
    (
        "srchosts=any",
        LAN,
        (
            "OPEN",
            State.ACTIVE,
            True,
            True,
            "Something else is still in force, and may let in more than this.",
        ),
    ),
    (
        LAN,
        f"{LAN} enabled=no",
        ("STILL OPEN", State.ACTIVE, True, False, "It should be closed but is still in force."),
    ),
    (
        "srchosts=any",
        f"{LAN} {MOVED}",
        ("STILL OPEN", State.ACTIVE, True, True, "It should be closed but is still in force."),
    ),
    (f"{LAN} enabled=no", f"{LAN} enabled=no comment=x", ("CLOSED", State.DISABLED, False, False, "")),
]


@pytest.mark.parametrize(("before", "asked", "shown"), IN_FORCE)
def test_what_is_in_force_counts_and_not_what_the_rule_asks_for(
    before: str, asked: str, shown: tuple[str, State, bool, bool, str]
) -> None:
    was = () if not before else (rule(before),)
    row = only(look(rule(asked), before=was))
    assert (row.mark, row.state, row.is_live, row.is_anybody, row.note) == shown


def test_what_policy_alone_still_allows_is_still_open() -> None:
    row = only(still_allowed(rule(f"{LAN} enabled=no"), before=(rule(LAN),)))
    assert (row.mark, row.state, row.is_live) == ("STILL OPEN", State.ACTIVE, True)
    other = rule(f"{LAN} srcports=443 enabled=no")
    assert only(still_allowed(other, before=(rule(LAN),))).mark == "CLOSED"
    live = rule(f"{LAN} srcports=81 dstports=80 transport=call", name="live")
    (group,) = groups(still_allowed(rule(f"{LAN} enabled=no"), live, before=(rule(LAN), live)))
    assert [row.mark for row in group.rows] == ["OPEN", "STILL OPEN"]


def test_a_forward_whose_old_exposed_qube_still_listens_is_in_force_otherwise() -> None:
    row = only(look(rule(f"{LAN} via=sys-vpn"), before=(rule(LAN),)))
    assert row.note == "Something else is still in force, and may let in more than this."


def test_what_cannot_be_read_may_be_in_force_still() -> None:
    row = only(look(("work", "web", "nonsense"), before=(rule(LAN),)))
    assert (row.mark, row.state, row.is_live) == ("STILL OPEN", State.ACTIVE, True)


def test_calls_that_dom0_denies_are_denied_in_a_word() -> None:
    row = only(look(rule(LAN), denials={(QubeName("work"), "web"): "because \x1b"}))
    assert (row.mark, row.state, row.is_live) == ("DENIED", State.WAITING, True)
    assert row.note == "dom0 denies its calls: because \\x1b"


def test_rows_are_those_of_the_system_that_is_looked_at(store: Backend, lab: LabDirectory) -> None:
    for target, name, text in (("work", "web", LAN), ("personal", "x", f"{LAN} srcports=81 enabled=no")):
        named: NamedRule = rule(text, target, name)
        store.set_feature(QubeName(target), f"forward.{name}", str(named.rule))
    shown = look_at(store, NOW)
    assert [group[:4] for group in groups(shown)] == [
        ("personal", "yellow", "appvm-yellow", "sys-firewall - sys-net"),
        ("work", "blue", "appvm-blue", "sys-firewall - sys-net"),
    ]
    assert [row.mark for group in groups(shown) for row in group.rows] == ["CLOSED", "NOT IN FORCE"]


def test_each_state_has_a_mark_of_its_own() -> None:
    assert len({entries.mark(state) for state in State}) == len(State)
    assert entries.mark(State.DISABLED) == "CLOSED"
