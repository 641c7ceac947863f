# SPDX-License-Identifier: GPL-2.0-or-later
"""A plan of many rules, found by name."""

import pytest
from worlds import NOW, rule, world

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
    kept = [key for key in found.alone if found.alone[key] is known.alone.get(key)]
    ended = later_s >= 10
    assert kept == [
        ("hidden", "web"),
        ("personal", "web"),
        ("work", "over"),
        *([] if ended else [("work", "soon")]),
    ]


def test_what_a_rule_is_alone_has_no_conflict() -> None:
    planned = plan([rule(), rule(target="personal")], world(), NOW)
    assert [forward.state for forward in planned] == [State.ACTIVE, State.REFUSED]
    assert {forward.state for forward in planned.alone.values()} == {State.ACTIVE}
