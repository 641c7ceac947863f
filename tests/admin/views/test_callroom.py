# SPDX-License-Identifier: GPL-2.0-or-later
"""An exposed qube that needs more qrexec calls than it makes: what is said of it."""

from worlds import NOW, rule, world

from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.admin.states import Plan
from qubes_fwd_qrexec.admin.views.travel import calls_needed, room
from qubes_fwd_qrexec.common.config import CALLS_MAX
from qubes_fwd_qrexec.common.rules import NamedRule


def rules(count: int, dstports: str = "", transport: str = "") -> list[NamedRule]:
    return [
        rule(
            f"srcports={8000 + number} dstports={dstports or 8000 + number} transport={transport}",
            name=f"r-{number:02}",
        )
        for number in range(count)
    ]


def planned(rules: list[NamedRule]) -> Plan:
    return plan(rules, world(), NOW)


def said(rules: list[NamedRule], before: list[NamedRule] | None = None) -> str | None:
    """What is said of the last rule."""
    after = planned(rules)
    old = planned(rules[:-1] if before is None else before)
    return room(list(after)[-1], calls_needed(after), calls_needed(old))


def test_as_many_mux_calls_as_there_are_calls_fit_and_one_more_is_said() -> None:
    assert said(rules(CALLS_MAX)) is None
    words = said(rules(CALLS_MAX + 1))
    assert words is not None
    assert words.startswith(
        f"the forwards of sys-net need {CALLS_MAX + 1} qrexec calls, but it makes at most {CALLS_MAX}"
    )


def test_it_is_said_when_it_gets_worse_and_not_at_every_change() -> None:
    many = rules(CALLS_MAX + 1)
    assert said(many, many) is None


def test_forwards_to_the_same_ports_of_a_target_share_a_call_and_others_do_not() -> None:
    assert calls_needed(planned(rules(2 * CALLS_MAX, dstports="80"))) == {"sys-net": 1}
    single = planned(rules(CALLS_MAX, dstports="80", transport="call"))
    assert calls_needed(single) == {"sys-net": CALLS_MAX}
    mixed = planned([*rules(2, transport="call"), rule("srcports=7000", "personal")])
    assert calls_needed(mixed) == {"sys-net": 3}


def test_each_exposed_qube_has_calls_of_its_own() -> None:
    inner = rule("forwardtype=internal srcports=7000", "personal")
    assert calls_needed(planned([*rules(2), inner])) == {"sys-net": 2, "sys-firewall": 1}


def test_udp_has_calls_of_its_own() -> None:
    udp = rule("srcports=81 dstports=80 proto=udp", name="udp")
    assert calls_needed(planned([rule(), udp])) == {"sys-net": 2}
    assert calls_needed(planned([rule("proto=both"), udp])) == {"sys-net": 2}


def test_what_is_not_open_needs_no_call() -> None:
    idle = [rule(f"srcports={9000 + n} enabled=no", name=f"i-{n:02}") for n in range(CALLS_MAX)]
    assert calls_needed(planned(idle)) == {}
