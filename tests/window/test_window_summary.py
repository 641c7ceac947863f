# SPDX-License-Identifier: GPL-2.0-or-later
"""The sentence above the list: how much is open and to whom, and never less than may be."""

import pytest
from looks import look, still_allowed
from worlds import nft_world, qube, rule, world

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.common.rules import NamedRule
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.window.model.look import look_at
from qubes_fwd_qrexec.window.model.summary import Summary, Tone, summary

LAN = "srchosts=192.168.0.0/16"
HALTED = qube("sys-net", is_running=False, provides_network=True)
ASKS = rule(f"{LAN} srcports=99 path=sys-net", name="asks")

SUMMARIES: list[tuple[tuple[NamedRule, ...], Inventory, Summary]] = [
    ((), world(), Summary("Nothing is open.", Tone.CLOSED, 0)),
    ((rule(f"{LAN} enabled=no"),), world(), Summary("Nothing is open.", Tone.CLOSED, 0)),
    ((rule(LAN),), world(), Summary("1 port is open.", Tone.OPEN, 0)),
    ((rule(),), world(), Summary("1 port is open, to anybody.", Tone.ANYBODY, 0)),
    (
        (rule("srcports=8000-8002 proto=both"),),
        world(),
        Summary("6 ports are open, all to anybody.", Tone.ANYBODY, 0),
    ),
    (
        (rule(f"{LAN} srcports=8000-8001"), rule(name="x"), ASKS),
        world(),
        Summary("3 ports are open, 1 of them to anybody. 1 forward needs your decision.", Tone.ANYBODY, 1),
    ),
    (
        (ASKS, rule(f"{LAN} owner=office", name="clone")),
        world(),
        Summary("Nothing is open. 2 forwards need your decision.", Tone.CLOSED, 2),
    ),
    (
        (rule(f"{LAN} srcports=80-81"),),
        world(HALTED),
        Summary("Nothing is open. 2 ports open when halted qubes start.", Tone.CLOSED, 0),
    ),
    (
        (rule(LAN), rule(f"{LAN} via=sys-vpn", "hidden")),
        world(qube("sys-vpn", "sys-firewall", is_running=False, features={"service.vpn-handler-x": "1"})),
        Summary("1 port is open. 1 port opens when a halted qube starts.", Tone.OPEN, 0),
    ),
    ((rule(f"{LAN} mode=nft proto=both"),), nft_world(), Summary("2 ports are open.", Tone.OPEN, 0)),
]


@pytest.mark.parametrize(("rules", "inventory", "said"), SUMMARIES)
def test_it_counts_ports_to_whom_they_are_open_and_what_asks(
    rules: tuple[NamedRule, ...], inventory: Inventory, said: Summary
) -> None:
    assert summary(look(*rules, inventory=inventory)) == said


def test_that_a_target_is_halted_closes_no_port() -> None:
    halted = qube("work", "sys-firewall", is_running=False, template=QubeName("fedora-42"))
    assert summary(look(rule(LAN), inventory=world(halted))).text == "1 port is open."


def test_without_a_look_it_knows_nothing() -> None:
    assert summary(None) == Summary("What is open is unknown.", Tone.UNKNOWN, 0)


def test_that_all_is_held_is_said_and_nothing_is_open_then() -> None:
    assert summary(look(rule(LAN), ASKS, is_held=True)) == Summary(
        "Everything is held. 1 forward needs your decision.", Tone.HELD, 1
    )


OTHERWISE = "1 forward is in force as it was before, and may let in more."
IN_FORCE = [
    (
        (rule(f"{LAN} srcports=80-82"),),
        (),
        Summary("3 ports are open. 1 forward should be closed and is still in force.", Tone.UNKNOWN, 0),
    ),
    (
        (rule(), rule("srcports=81", name="b")),
        (rule("enabled=no"),),
        Summary(
            "2 ports are open, all to anybody. 2 forwards should be closed and are still in force.",
            Tone.ANYBODY,
            0,
        ),
    ),
    (
        (),
        (rule(LAN),),
        Summary("Nothing is open. 1 forward is not in force yet.", Tone.CLOSED, 0),
    ),
    (
        (rule("srcports=80-82"),),
        (rule(LAN),),
        Summary(f"3 ports are open, all to anybody. {OTHERWISE}", Tone.ANYBODY, 0),
    ),
    (
        (rule(LAN),),
        (rule("srcports=80-82"),),
        Summary(f"3 ports are open, all to anybody. {OTHERWISE}", Tone.ANYBODY, 0),
    ),
    (
        (rule(LAN),),
        (rule(f"{LAN} srcports=80-81"),),
        Summary(f"2 ports are open. {OTHERWISE}", Tone.UNKNOWN, 0),
    ),
    (
        (rule(f"{LAN} mode=nft srcports=80-81"),),
        (),
        Summary("2 ports are open. 1 forward should be closed and is still in force.", Tone.UNKNOWN, 0),
    ),
]


@pytest.mark.parametrize(("before", "asked", "said"), IN_FORCE)
def test_it_counts_what_is_in_force_and_not_what_should_be(
    before: tuple[NamedRule, ...], asked: tuple[NamedRule, ...], said: Summary
) -> None:
    inventory = nft_world() if any("mode=nft" in str(each.rule) for each in before) else None
    assert summary(look(*asked, before=before, inventory=inventory)) == said


def test_what_is_held_and_still_in_force_is_no_hold() -> None:
    found = summary(look(rule(LAN), before=(rule(LAN),), is_held=True))
    assert found == Summary(
        "Everything is held. 1 port is open. 1 forward should be closed and is still in force.",
        Tone.UNKNOWN,
        0,
    )


STILL = "1 forward should be closed and is still in force."


@pytest.mark.parametrize(
    ("asked", "is_held", "said"),
    [
        ((rule(f"{LAN} enabled=no"),), False, STILL),
        ((), False, STILL),
        ((rule(f"{LAN} srcports=443 enabled=no"),), False, STILL),
        ((rule(LAN),), True, f"Everything is held. {STILL}"),
    ],
)
def test_it_never_says_that_nothing_is_open_where_policy_alone_still_allows_calls(
    asked: tuple[NamedRule, ...], is_held: bool, said: str
) -> None:
    found = summary(still_allowed(*asked, before=(rule(LAN),), is_held=is_held))
    assert found == Summary(said, Tone.UNKNOWN, 0)


def test_it_never_says_that_nothing_is_open_where_the_last_look_failed() -> None:
    said = "What is open is unknown. Last known: Nothing is open."
    assert summary(look(), "qubesd is gone") == Summary(said, Tone.UNKNOWN, 0)


def test_it_never_says_that_nothing_is_open_where_something_could_not_be_read() -> None:
    unread = look(inventory=world(qube("work", problem="no answer")))
    said = "Not everything could be read, so more may be open."
    assert summary(unread) == Summary(said, Tone.UNKNOWN, 0)


def test_denied_calls_are_counted() -> None:
    found = summary(look(rule(LAN), denials={(QubeName("work"), "web"): "a line before ours"}))
    assert found == Summary("1 port is open. dom0 denies the calls of 1 forward.", Tone.OPEN, 0)


def test_it_is_about_the_system_that_is_looked_at(store: Backend, lab: LabDirectory) -> None:
    store.set_feature(QubeName("work"), "forward.web", str(rule(LAN).rule))
    assert summary(look_at(store, 0)).text == "Nothing is open. 1 forward is not in force yet."
    (lab.policy_dir / "30-forward.policy").write_bytes(b"\xff")
    assert summary(look_at(store, 0)).tone is Tone.UNKNOWN
