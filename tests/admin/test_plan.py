# SPDX-License-Identifier: GPL-2.0-or-later
"""A plan of many rules, found by name."""

from worlds import NOW, rule, world

from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.common.rules import BrokenRule
from qubes_fwd_qrexec.common.values import QubeName, RuleName


def test_the_plan_keeps_broken_rules_and_finds_by_name() -> None:
    broken = BrokenRule(QubeName("work"), "x", "y", "z")
    found = plan([rule(), broken], world(), NOW)
    assert found.broken == (broken,)
    assert found.find("work", "web") == found.forwards[0]
    assert found.find("work", RuleName("nope")) is None
    assert found.live == found.forwards
