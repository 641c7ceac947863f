# SPDX-License-Identifier: GPL-2.0-or-later
"""What there should be of ours in the firewall, what there is, and the way there, as text and values."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from qubes_fwd_qrexec.firewall.rule import Family, Rule
from qubes_fwd_qrexec.firewall.tables import (
    ADMITTED,
    CUSTOM_FORWARD,
    CUSTOM_INPUT,
    FORWARD,
    FORWARDED,
    GUARD_FORWARD,
    GUARD_INPUT,
    HELD,
    HOOKS,
    INPUT,
    LISTENER,
    OWN,
    PLACES,
    PREROUTING,
    Content,
    Guard,
    Place,
    Seen,
    SeenRule,
    SeenTable,
    seen,
    transaction,
)

WEB, SSH = Rule("fwd.work.web", "tcp dport 80 accept"), Rule("fwd.work.ssh", "tcp dport 22 accept")
NOW_S = 1000.0
USERS = {CUSTOM_INPUT: (), CUSTOM_FORWARD: ()}


def there(*rules: Rule, first: int = 100) -> tuple[SeenRule, ...]:
    """Rules as they are found."""
    return tuple(SeenRule(first + n, rule.comment) for n, rule in enumerate(rules))


def jump(handle: int, place: Place = LISTENER, comment: str | None = None) -> SeenRule:
    return SeenRule(handle, place.jump.comment if comment is None else comment, (place.chain,))


def qubes(
    *jumps: SeenRule, rules: Iterable[Rule] | None = None, place: Place = LISTENER, **others: Any
) -> Seen:
    """Qubes' table with these rules in the user's chain, and these in ours, if that is there."""
    chains = {**USERS, place.users_chain: jumps}
    if rules is not None:
        chains[place.chain] = there(*rules)
    return Seen(SeenTable(chains | others))


def lines(wanted: Content, found: Seen, family: Family = Family.IP, now_s: float = NOW_S) -> list[str]:
    return transaction(family, wanted, found, now_s).splitlines()


def at(place: Place, *rules: Rule) -> Content:
    return Content(placed={place: rules})


def test_what_is_right_is_not_touched() -> None:
    assert lines(at(LISTENER, WEB, SSH), qubes(jump(7), rules=[WEB, SSH])) == []
    assert lines(Content(), Seen()) == []
    assert lines(Content(), qubes(SeenRule(3, "mine"))) == []


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.chain)
def test_everything_is_made_from_nothing(place: Place) -> None:
    assert lines(at(place, WEB, SSH), qubes(), Family.IP6) == [
        f"add chain ip6 qubes {place.chain}",
        f"flush chain ip6 qubes {place.chain}",
        f'add rule ip6 qubes {place.chain} tcp dport 80 accept comment "{WEB.comment}"',
        f'add rule ip6 qubes {place.chain} tcp dport 22 accept comment "{SSH.comment}"',
        f'add rule ip6 qubes {place.users_chain} {place.jump.text} comment "{place.jump.comment}"',
    ]


def test_the_jumps_are_those_that_let_through_no_more_than_they_should() -> None:
    assert {place.jump.text for place in PLACES} == {
        "meta l4proto { tcp, udp } ct state new jump qubes-fwd-qrexec",
        "ct state new ct status dnat jump qubes-fwd-nft-forward",
        "ct direction original jump qubes-fwd-nft-input",
    }


@pytest.mark.parametrize("rules", [[SSH, WEB], [WEB, SSH, SSH], [WEB], []])
def test_a_chain_that_differs_is_filled_anew(rules: list[Rule]) -> None:
    wanted = at(LISTENER, WEB, SSH)
    assert lines(wanted, qubes(jump(7), rules=rules)) == lines(wanted, qubes())[:-1]


@pytest.mark.parametrize(
    "jumps",
    [
        (),
        (jump(7), SeenRule(9, "")),  # the user's rules come first
        (jump(7), jump(9)),
        (jump(7, comment=f"{LISTENER.tag} 0123456789ab"),),  # of another version
    ],
)
def test_jumps_that_are_not_as_they_should_be_are_replaced(jumps: tuple[SeenRule, ...]) -> None:
    wanted = at(LISTENER, WEB)
    assert lines(wanted, qubes(*jumps, rules=[WEB])) == [
        *(f"delete rule ip qubes {CUSTOM_INPUT} handle {rule.handle}" for rule in jumps if rule.comment),
        f"add rule ip qubes {CUSTOM_INPUT} {LISTENER.jump}",
    ]


def test_two_places_of_one_chain_have_their_jumps_last_and_in_one_order() -> None:
    wanted = Content(placed={LISTENER: (WEB,), INPUT: (SSH,)})
    chains = {LISTENER.chain: there(WEB), INPUT.chain: there(SSH)}
    right = Seen(SeenTable({CUSTOM_INPUT: (SeenRule(3, ""), jump(7), jump(9, INPUT)), **chains}))
    assert lines(wanted, right) == []
    wrong = Seen(SeenTable({CUSTOM_INPUT: (jump(9, INPUT), jump(7)), **chains}))
    assert lines(wanted, wrong) == [
        f"delete rule ip qubes {CUSTOM_INPUT} handle 9",
        f"delete rule ip qubes {CUSTOM_INPUT} handle 7",
        f"add rule ip qubes {CUSTOM_INPUT} {LISTENER.jump}",
        f"add rule ip qubes {CUSTOM_INPUT} {INPUT.jump}",
    ]


def test_everything_is_removed_when_no_forward_is_left() -> None:
    assert lines(Content(), qubes(jump(7), rules=[WEB])) == [
        f"delete rule ip qubes {CUSTOM_INPUT} handle 7",
        f"flush chain ip qubes {LISTENER.chain}",
        f"delete chain ip qubes {LISTENER.chain}",
    ]


def test_a_chain_that_somebody_else_jumps_to_is_left_there_empty() -> None:
    foreign = jump(3, comment="mine")
    assert lines(Content(), qubes(foreign, rules=[WEB])) == [f"flush chain ip qubes {LISTENER.chain}"]
    assert lines(Content(), qubes(foreign, rules=[])) == []
    elsewhere = qubes(rules=[], input=(jump(3),))
    assert lines(Content(), elsewhere) == []


def test_other_rules_are_never_taken_for_ours() -> None:
    users = (
        SeenRule(3, LISTENER.jump.comment),  # the user has our tag, and goes elsewhere
        jump(4, comment="mine"),  # or goes to our chain
        SeenRule(5, FORWARD.jump.comment, (LISTENER.chain,)),
    )
    assert not [line for line in lines(Content(), qubes(*users)) if "handle" in line]


ACCEPT = Rule("nft.work.web", "tcp dport 80 accept")
COUNTER = ("counter", "nft.work.web/new")
NFT = Content(chains={PREROUTING: (WEB,), ADMITTED: (ACCEPT,)}, objects={COUNTER: ""})
GUARD = Guard(GUARD_INPUT, "tcp dport 80 drop", 1900)


def own(content: Content, guards: tuple[Guard, ...] = (), objects: Iterable[tuple[str, str]] = ()) -> Seen:
    """Our table with exactly this content."""
    found = content.own({guard.chain for guard in guards})
    chains = {chain: there(*rules) for chain, rules in found.items()}
    for guard in guards:
        chains[guard.chain] = (*chains[guard.chain], SeenRule(50 + guard.until, guard.rule.comment))
    seen_objects = frozenset({*content.objects, ("set", HELD), *objects})
    return Seen(SeenTable(USERS), SeenTable(chains, {chain: HOOKS[chain] for chain in chains}, seen_objects))


def test_a_table_of_our_own_is_made_whole_and_removed_whole() -> None:
    made = lines(NFT, qubes())
    assert made[0] == f"add table ip {OWN}"
    # No packet meets a hook that has nothing to say.
    assert [line for line in made if line.startswith("add chain")] == [
        f"add chain ip {OWN} {PREROUTING} {{ type nat hook prerouting priority -90; policy accept; }}",
        f"add chain ip {OWN} {FORWARDED} {{ type filter hook forward priority -10; policy accept; }}",
        f"add chain ip {OWN} {ADMITTED}",
    ]
    assert f"add counter ip {OWN} nft.work.web/new" in made
    assert f"add set ip {OWN} {HELD}" in {line.partition(" {")[0] for line in made}
    assert made[-1] == f"add rule ip {OWN} {ADMITTED} {ACCEPT}"
    assert lines(NFT, own(NFT)) == []
    assert lines(Content(), own(NFT)) == [f"delete table ip {OWN}"]


def test_counters_outlive_a_change_of_rules_and_no_forward() -> None:
    changed = Content(chains={**NFT.chains, ADMITTED: (WEB,)}, objects=NFT.objects)
    assert lines(changed, own(NFT)) == [
        f"flush chain ip {OWN} {ADMITTED}",
        f"add rule ip {OWN} {ADMITTED} {WEB}",
    ]
    left = ("set", "nft.work.web/all.5")
    assert lines(NFT, own(NFT, objects=[left])) == [f"delete set ip {OWN} nft.work.web/all.5"]


@pytest.mark.parametrize(
    "hooks",
    [
        {PREROUTING: ("nat", "prerouting", -100)},
        {PREROUTING: None},
        {"another": None},
    ],
)
def test_a_table_with_other_chains_than_ours_is_made_anew(hooks: Any) -> None:
    found = own(NFT).own
    assert found is not None
    wrong = Seen(SeenTable(USERS), replace(found, hooks={**found.hooks, **hooks}))
    assert lines(NFT, wrong) == [f"delete table ip {OWN}", *lines(NFT, qubes())]
    mapped = Seen(SeenTable(USERS), replace(found, has_verdict_maps=True))
    assert lines(NFT, mapped) == [f"delete table ip {OWN}", *lines(NFT, qubes())]


def test_chains_come_and_go_with_what_is_in_them() -> None:
    hooks = f"add chain ip {OWN} input {{ type filter hook input priority -10; policy accept; }}"
    guarded = replace(NFT, guards=(GUARD,))
    (leading,) = guarded.own({GUARD_INPUT})["input"]
    assert lines(guarded, own(NFT)) == [
        hooks,
        f"add chain ip {OWN} {GUARD_INPUT}",
        f"flush chain ip {OWN} input",
        f"add rule ip {OWN} input {leading}",
        f"add rule ip {OWN} {GUARD_INPUT} {GUARD.rule}",
    ]
    gone = ["forward", GUARD_INPUT, "input"]
    assert lines(Content(chains={PREROUTING: (WEB,)}), own(guarded, guards=(GUARD,)), now_s=1900.0) == [
        f"delete rule ip {OWN} {GUARD_INPUT} handle 1950",
        *(f"flush chain ip {OWN} {chain}" for chain in (ADMITTED, *gone)),
        *(f"delete chain ip {OWN} {chain}" for chain in (ADMITTED, *gone)),
        f"delete counter ip {OWN} nft.work.web/new",
    ]


def test_a_table_that_may_be_asleep_is_made_anew() -> None:
    awake, asleep = (
        seen([{"table": {"name": OWN, **flags}}, *({"chain": {"name": chain}} for chain in HOOKS)])
        for flags in ({}, {"flags": "x"})
    )
    assert not awake.has_flags
    found = own(NFT).own
    assert found is not None
    wrong = Seen(SeenTable(USERS), replace(found, has_flags=asleep.has_flags))
    assert lines(NFT, wrong) == [f"delete table ip {OWN}", *lines(NFT, qubes())]


def test_a_guard_is_added_once_stays_without_being_asked_for_and_goes_when_it_is_over() -> None:
    wanted = Content(guards=(GUARD,))
    rule = f'meta time < 1900 tcp dport 80 drop comment "{GUARD.rule.comment}"'
    assert lines(wanted, qubes())[-1] == f"add rule ip {OWN} {GUARD_INPUT} {rule}"
    assert lines(wanted, own(Content(), guards=(GUARD,))) == []
    assert lines(Content(), own(Content(), guards=(GUARD,)), now_s=1899.0) == []
    assert lines(Content(), own(Content(), guards=(GUARD,)), now_s=1900.0) == [f"delete table ip {OWN}"]
    assert lines(NFT, own(NFT, guards=(GUARD,)), now_s=1900.0) == [
        f"delete rule ip {OWN} {GUARD_INPUT} handle 1950",
        *(f"{do} chain ip {OWN} {chain}" for do in ("flush", "delete") for chain in (GUARD_INPUT, "input")),
    ]


def test_what_is_no_guard_goes_from_the_guards_chain() -> None:
    found = own(NFT).own
    assert found is not None
    chains = {**found.chains, GUARD_FORWARD: (SeenRule(3, ""), SeenRule(4, "until it rains"))}
    wrong = Seen(SeenTable(USERS), SeenTable(chains, HOOKS, found.objects))
    assert lines(NFT, wrong) == [
        *(f"delete rule ip {OWN} {GUARD_FORWARD} handle {n}" for n in (3, 4)),
        *(f"{do} chain ip {OWN} {GUARD_FORWARD}" for do in ("flush", "delete")),
    ]


def entry(chain: str, handle: int, comment: str | None = None, to: str | None = None) -> dict[str, Any]:
    expr: list[Any] = [{"accept": None} if to is None else {"jump": {"target": to}}]
    rule = {"family": "ip", "table": "qubes", "chain": chain, "handle": handle, "expr": expr}
    return {"rule": rule if comment is None else rule | {"comment": comment}}


def test_a_table_is_seen_as_nft_lists_it() -> None:
    found = seen(
        [
            {"metainfo": {}},
            {"table": {"family": "ip", "name": "qubes"}},
            {"counter": {"name": "c", "packets": 3}},
            {"set": {"name": "s"}},
            {"chain": {"name": "input", "type": "filter", "hook": "input", "prio": 0, "policy": "drop"}},
            {"chain": {"name": CUSTOM_INPUT}},
            entry("input", 3),
            entry(CUSTOM_INPUT, 7, LISTENER.jump.comment, LISTENER.chain),
        ]
    )
    assert found == SeenTable(
        {"input": (SeenRule(3, ""),), CUSTOM_INPUT: (jump(7),)},
        {"input": ("filter", "input", 0), CUSTOM_INPUT: None},
        frozenset({("counter", "c"), ("set", "s")}),
    )


def test_a_family_has_a_place_if_its_table_has_the_users_chain() -> None:
    found = Seen(SeenTable({CUSTOM_INPUT: ()}))
    assert [place for place in PLACES if found.has(place)] == [LISTENER, INPUT]
    assert not Seen().has(FORWARD)
