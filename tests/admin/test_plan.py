# SPDX-License-Identifier: GPL-2.0-or-later
"""A plan of many rules, found by name."""

import pytest
from worlds import NOW, rule, world

from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.admin.states import State
from qubes_fwd_qrexec.common.rules import BrokenRule
from qubes_fwd_qrexec.common.values import QubeName, RuleName


def test_the_plan_keeps_broken_rules_and_finds_by_name() -> None:
    broken = BrokenRule(QubeName("work"), "x", "y", "z")
    found = plan([rule(), broken], world(), NOW)
    assert found.broken == (broken,)
    assert found.find("work", "web") == found.forwards[0]
    assert found.find("work", RuleName("nope")) is None
    assert found.live == found.forwards


RULES = [
    rule("srchosts=10.0.0.0/8"),
    rule(f"srcports=81 expire={NOW + 10}", name="soon"),
    rule(f"srcports=82 expire={NOW + 10} ended=yes", name="over"),
    rule("via=sys-vpn", "hidden"),
    rule("srcports=80", "personal"),
]


@pytest.mark.parametrize("later_s", [0, 9, 10, 100])
@pytest.mark.parametrize("text", ["", "srcports=90", "enabled=no", "srchosts=10.0.0.0/8"])
def test_a_plan_that_knows_another_one_is_the_same(text: str, later_s: int) -> None:
    known = plan(RULES, world(), NOW)
    assert known.alone.keys() == {named[:2] for named in RULES}
    changed = [*RULES[1:], rule(text), rule("srcports=99", name="new")]
    newcomers = [(QubeName("work"), "new")]
    expected = plan(changed, world(), NOW + later_s, newcomers=newcomers)
    found = plan(changed, world(), NOW + later_s, newcomers=newcomers, known=known.held())
    assert found == expected
    kept = {key for key in found.alone if found.alone[key] is known.alone.get(key)}
    changed_or_new = {("work", "new")} | (set() if text == "srchosts=10.0.0.0/8" else {("work", "web")})
    assert found.alone.keys() - kept == changed_or_new | ({("work", "soon")} if later_s >= 10 else set())


WORK, PERSONAL = (world().qubes[QubeName(name)] for name in ("work", "personal"))


@pytest.mark.parametrize(
    "inventory",
    [
        world(WORK._replace(netvm=QubeName("sys-net"))),
        world(WORK._replace(is_running=not WORK.is_running)),
        world(WORK._replace(features=WORK.features | {"forward.tunnel": "1"})),
        world(WORK._replace(features={})),
        world(WORK._replace(problem="cannot be read")),
        world(without=("personal",)),
    ],
)
def test_a_plan_that_knows_one_of_other_qubes_is_as_one_that_knows_none(inventory: Inventory) -> None:
    known = plan(RULES, world(), NOW)
    assert plan(RULES, inventory, NOW, known=known) == plan(RULES, inventory, NOW)


def test_a_plan_that_knows_one_of_other_stock_targets_is_as_one_that_knows_none() -> None:
    known = plan(RULES, world(), NOW)
    found = plan(RULES, world(), NOW, stock=[QubeName("work")], known=known)
    assert found == plan(RULES, world(), NOW, stock=[QubeName("work")]) != known


@pytest.mark.parametrize("key", ["forward.other", "vm-config.fwd.work.web", "vm-config.nft.work.web"])
def test_rules_and_configurations_are_no_other_qubes(key: str) -> None:
    told = WORK._replace(features=WORK.features | {key: "x"}, configured=frozenset((key,)))
    known, found = (plan(RULES, each, NOW) for each in (world(), world(told)))
    again = plan(RULES, world(told), NOW, known=known)
    assert found == known == again
    assert all(again.alone[key] is known.alone[key] for key in known.alone)


def test_what_a_rule_is_alone_has_no_conflict() -> None:
    planned = plan([rule(), rule(target="personal")], world(), NOW)
    assert [forward.state for forward in planned] == [State.ACTIVE, State.REFUSED]
    assert {alone.forward.state for alone in planned.alone.values()} == {State.ACTIVE}
