# SPDX-License-Identifier: GPL-2.0-or-later
"""A plan of many rules: found by name, and with the calls that they need together."""

from worlds import NOW, rule, world

from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.admin.views import reasons
from qubes_fwd_qrexec.common.config import CALLS_MAX
from qubes_fwd_qrexec.common.rules import BrokenRule, NamedRule
from qubes_fwd_qrexec.common.values import QubeName, RuleName


def test_the_plan_keeps_broken_rules_and_finds_by_name() -> None:
    broken = BrokenRule(QubeName("work"), "x", "y", "z")
    found = plan([rule()], world(), NOW, broken=[broken])
    assert found.broken == (broken,)
    assert found.find("work", "web") == found.forwards[0]
    assert found.find("work", RuleName("nope")) is None
    assert found.live == found.forwards


def hints(rules: list[NamedRule]) -> list[str]:
    """Those of the last rule that speak of calls."""
    return [hint for hint in reasons.hints(list(plan(rules, world(), NOW))[-1]) if "qrexec calls" in hint]


def rules(count: int, dstports: str = "", transport: str = "") -> list[NamedRule]:
    return [
        rule(
            f"srcports={8000 + number} dstports={dstports or 8000 + number} transport={transport}",
            name=f"r-{number:02}",
        )
        for number in range(count)
    ]


def test_as_many_mux_calls_as_there_are_calls_fit_and_one_more_is_said() -> None:
    assert hints(rules(CALLS_MAX)) == []
    (hint,) = hints(rules(CALLS_MAX + 1))
    assert hint.startswith(
        f"the forwards of sys-net need {CALLS_MAX + 1} qrexec calls, and it makes {CALLS_MAX}"
    )


def test_forwards_to_the_same_ports_of_a_target_share_a_call_and_others_do_not() -> None:
    assert hints(rules(2 * CALLS_MAX, dstports="80")) == []
    assert hints(rules(2 * CALLS_MAX, dstports="80", transport="call"))
    assert hints([*rules(CALLS_MAX, transport="call"), rule("srcports=7000", "personal")])


def test_what_is_not_open_needs_no_call() -> None:
    idle = [rule(f"srcports={9000 + n} enabled=no", name=f"i-{n:02}") for n in range(CALLS_MAX)]
    assert hints([*idle, *rules(CALLS_MAX)]) == []
