# SPDX-License-Identifier: GPL-2.0-or-later
"""The desktop is told of what opens or closes by itself, in plain text, and of many changes at once."""

from collections.abc import Callable
from typing import Any

import looks
import pytest
from mainloop import MainLoop
from worlds import NOW, Command, qube, rule, world

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.apply import Kind as StepKind
from qubes_fwd_qrexec.admin.apply import Step
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.admin.states import Plan
from qubes_fwd_qrexec.common.rules import BrokenRule, NamedRule
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.window.model.look import Look, look_at
from qubes_fwd_qrexec.window.model.notices import (
    MOST_S,
    NAMED_MAX,
    QUIET_S,
    Change,
    Notice,
    Notifier,
    changes,
    notices,
)
from qubes_fwd_qrexec.window.model.notices import Kind as Became

LAN = "srchosts=192.168.0.0/16"
UP = Inventory({name: each._replace(is_running=True) for name, each in world().qubes.items()})
NO_END = "It stays open until you end it."
OPENS = "Connections to port 80 of sys-net (outer side) from {} reach port 80 of work."


def look(*rules: NamedRule, inventory: Inventory = UP, now: float = NOW, **more: Any) -> Look:
    return of(plan(rules, inventory, now), **more)


def of(planned: Plan, **more: Any) -> Look:
    given: dict[str, Any] = {"snapshot": None, "now": NOW, "denials": {}, "due": (), "watch_start": None}
    return Look(plan=planned, **(given | more))


def told(before: Look, after: Look) -> list[Notice]:
    return list(notices(changes(before, after), after))


def texts(before: Look, after: Look) -> list[tuple[str, str, bool]]:
    return [notice[1:] for notice in told(before, after)]


def test_what_opens_is_told_with_to_whom_and_until_when() -> None:
    expires = look(rule(f"{LAN} expire={NOW + 3600}"))
    (notice,) = told(look(), expires)
    assert notice.id == "work web"
    assert notice[1] == "work web is open"
    assert notice.body.startswith(f"{OPENS.format('192.168.0.0/16')} It ends at 2027-01-15 ")
    assert not notice.is_alarming
    assert texts(look(), look(rule(LAN)))[0][1].endswith(f" {NO_END}")


def test_that_it_is_open_to_anybody_is_in_the_title() -> None:
    (notice,) = told(look(), look(rule()))
    assert notice.title == "work web is open to anybody"
    assert OPENS.format("anybody who can reach it") in notice.body


@pytest.mark.parametrize(
    "change", ["srcports=81", "srchosts=any", "dstports=90", "proto=udp", "via=sys-firewall"]
)
def test_that_it_opens_something_else_is_told(change: str) -> None:
    before, after = rule(f"{LAN} {change}"), rule(LAN)
    assert [notice.title for notice in told(look(before), look(after))] == ["work web is open"]


@pytest.mark.parametrize("change", ["comment=x", f"expire={NOW + 3600}", "on-expire=drain"])
def test_what_opens_nothing_else_is_not_told(change: str) -> None:
    assert told(look(rule(LAN)), look(rule(f"{LAN} {change}"))) == []


def test_what_waits_is_told_when_it_is_made_and_when_it_opens() -> None:
    halted = Inventory(UP.qubes | {QubeName("work"): UP.qubes[QubeName("work")]._replace(is_running=False)})
    waiting = look(rule(LAN), inventory=halted)
    assert [(title, body) for title, body, _ in texts(look(), waiting)] == [
        (
            "work web will be open",
            "work is halted, and nobody is answered until it runs: 'qvm-start work', or let connections "
            "start it with autostart=yes. It stays open until you end it.",
        )
    ]
    assert texts(look(), look(rule(), inventory=halted))[0][0] == "work web will be open to anybody"
    assert [notice.title for notice in told(waiting, look(rule(LAN)))] == ["work web is open"]
    assert told(look(rule(LAN)), waiting) == []


def test_what_has_ended_is_told() -> None:
    named = rule(f"expire={NOW + 1}")
    assert texts(look(named), look(named, now=NOW + 2)) == [("work web has ended", "It has expired.", False)]


def test_what_is_suspended_is_told_with_the_netvms() -> None:
    named = rule("path=sys-firewall,sys-net")
    moved = Inventory({**UP.qubes, QubeName("work"): qube("work", "sys-net", is_running=True)})
    assert texts(look(named), look(named, inventory=moved)) == [
        (
            "work web is suspended",
            "The netvms of work were sys-firewall - sys-net when the rule was agreed to and are sys-net now. "
            "It stays closed until you confirm it.",
            False,
        )
    ]


def test_what_is_refused_is_told_with_the_reason() -> None:
    gone = world(without=("sys-net",))
    ((title, body, _),) = texts(look(rule("via=sys-net")), look(rule("via=sys-net"), inventory=gone))
    assert title == "work web is closed"
    assert body == "The netvm of sys-firewall, sys-net, does not exist; set another."


def test_what_cannot_be_read_any_more_is_told() -> None:
    broken = Plan(
        (), (BrokenRule(QubeName("work"), "web", "", "<b>&\x1b"), BrokenRule(QubeName("a"), "b", "", "x"))
    )
    assert texts(look(rule()), of(broken)) == [
        ("work web is closed", r"Its rule cannot be read: \x3cb\x3e\x26\x1b", False)
    ]


def test_what_dom0_denies_is_not_called_open() -> None:
    denied = look(rule(), denials={("work", "web"): "by 20-mine.policy: <b>"})
    expected = [("work web is denied by dom0", r"dom0 denies its calls: by 20-mine.policy: \x3cb\x3e", False)]
    assert texts(look(), denied) == expected
    assert texts(look(rule()), denied) == expected
    assert [notice.title for notice in told(denied, look(rule()))] == ["work web is open to anybody"]
    assert [notice.title for notice in told(denied, look(rule(f"expire={NOW - 1}")))] == [
        "work web has ended"
    ]


@pytest.mark.parametrize("after", [look(), look(rule("enabled=no"))])
def test_what_somebody_closes_is_not_told(after: Look) -> None:
    assert told(look(rule()), after) == []


@pytest.mark.parametrize(
    "change", ["enabled=no", f"expire={NOW - 1}", "owner=other", "path=sys-net", "via=nowhere"]
)
def test_what_was_never_open_is_not_told(change: str) -> None:
    assert told(look(), look(rule(change))) == []


def test_a_hold_is_told_once_and_what_opens_after_it() -> None:
    is_open = look(rule(), rule("srcports=81", name="other"))
    held = of(is_open.plan.held())
    assert texts(is_open, held) == [
        (
            "Everything is held",
            "Nothing opens until you resume. The rules are kept as they are.",
            False,
        )
    ]
    assert told(held, of(look(rule()).plan.held())) == []
    assert [notice.title for notice in told(held, is_open)] == [
        "work other is open to anybody",
        "work web is open to anybody",
    ]


def many(count: int, first: str = "") -> list[NamedRule]:
    return [rule(f"srcports={1000 + n} {LAN if n else first}", name=f"r-{n:04}") for n in range(count)]


def test_many_are_told_in_one_notice() -> None:
    assert len(told(look(), look(*many(NAMED_MAX)))) == NAMED_MAX
    (notice,) = told(look(), look(*many(1000)))
    assert notice == (
        "open",
        "1000 forwards are open",
        "1 of them to anybody. work r-0000, work r-0001, work r-0002 and 997 more.",
        False,
    )
    (notice,) = told(look(*many(1000)), look(*many(1000), inventory=world(without=("work",))))
    assert notice[1:] == (
        "1000 forwards are closed",
        "work r-0000, work r-0001, work r-0002 and 997 more.",
        False,
    )


def not_yet(is_open: Look) -> Look:
    """The same before its policy is written."""
    (forward,) = is_open.plan
    return of(is_open.plan, due=(Step(StepKind.OPEN_POLICY, lines=tuple(policy.lines(forward))),))


def told_by(is_open: Look, planned: Plan, kind: StepKind = StepKind.REMOVE_CONFIG) -> Look:
    """A plan while the listener still has what it was told before."""
    (forward,) = is_open.plan
    (config,) = forward.listener_configs
    step = Step(kind, "x", QubeName("sys-net"), config.key, str(config))
    return of(planned, due=(step,))


def test_what_is_not_in_force_yet_is_told_when_it_is() -> None:
    is_open = look(rule())
    assert told(look(), not_yet(is_open)) == []
    assert [notice.title for notice in told(not_yet(is_open), is_open)] == ["work web is open to anybody"]


def test_what_is_closed_is_told_when_it_is() -> None:
    is_open, closed = look(rule()), look(rule(f"expire={NOW - 1}"))
    still = told_by(is_open, closed.plan)
    found = [*changes(is_open, still), *changes(still, closed)]
    assert [notice.title for notice in notices(found, closed)] == ["work web has ended"]
    assert list(notices(changes(is_open, still), look())) == []


def test_what_should_be_closed_and_stays_in_force_is_told() -> None:
    named = rule("path=sys-firewall,sys-net")
    moved = Inventory({**UP.qubes, QubeName("work"): qube("work", "sys-net", is_running=True)})
    still = told_by(look(named), look(named, inventory=moved).plan)
    assert texts(look(named), still) == [
        (
            "work web is still open",
            "It should be closed but is still in force. 'qvm-forward apply' closes it. The netvms of work "
            "were sys-firewall - sys-net when the rule was agreed to and are sys-net now.",
            True,
        )
    ]
    assert told(still, still) == []


def test_what_is_disabled_is_told_only_if_it_stays_in_force() -> None:
    is_open, closed = look(rule()), look(rule("enabled=no"))
    still = told_by(is_open, closed.plan)
    assert list(notices([*changes(is_open, still), *changes(still, closed)], closed)) == []
    assert [(title, body) for title, body, _ in texts(is_open, still)] == [
        (
            "work web is still open",
            "It should be closed but is still in force. 'qvm-forward apply' closes it.",
        )
    ]


def test_what_is_in_force_as_it_was_is_told_with_that() -> None:
    wide, narrow = look(rule()), look(rule(LAN))
    found = told_by(wide, narrow.plan, StepKind.SET_CONFIG)
    ((title, body, _),) = texts(wide, found)
    assert title == "work web is open to anybody"
    assert body.startswith("Something else is still in force, and may let in more than this. Connections to ")
    (notice,) = notices(changes(wide, found), narrow)
    assert (notice.title, notice.body) == ("work web is open", f"{OPENS.format('192.168.0.0/16')} {NO_END}")


def test_nothing_that_users_or_qubes_store_is_markup_or_long() -> None:
    evil = "<b>&amp;</b>\x1b\n<a href='x'>" * 50
    broken = of(Plan((), (BrokenRule(QubeName("work"), "web", evil, evil),)))
    unread = Inventory(UP.qubes | {QubeName("work"): qube("work", "sys-firewall", problem=evil)})
    unnamed = broken.entries.rules[0]._replace(key=(QubeName("work"), evil[:20]))
    found = [
        *told(look(rule()), broken),
        *told(look(rule()), look(rule(), inventory=unread)),
        *told(look(), look(rule(), denials={("work", "web"): evil})),
        *told(look(), look(rule("comment=<b>"))),
        *notices([Change(Became.CLOSED, unnamed)], look()),
    ]
    assert len(found) == 5
    for notice in found:
        for text in (notice.title, notice.body):
            assert not set("<>&") & set(text)
            assert text.isprintable()
            assert len(text) <= 500


class Sent:
    def __init__(self, loop: MainLoop) -> None:
        self.notices: list[Notice] = []
        self.withdrawn: list[str] = []
        self.notifier = Notifier(self.notices.append, self.withdrawn.append, loop.later)

    def titles(self) -> list[str]:
        found = [notice.title for notice in self.notices]
        self.notices.clear()
        return found


def test_nothing_is_told_of_the_first_look_nor_twice_of_one() -> None:
    loop = MainLoop()
    sent = Sent(loop)
    is_open = look(rule())
    for each in (is_open, is_open, look(rule())):
        sent.notifier.looked(each)
    loop.pass_time(2 * MOST_S)
    assert sent.titles() == []


def test_a_burst_is_told_at_its_end() -> None:
    loop = MainLoop()
    sent = Sent(loop)
    for count in range(6):
        sent.notifier.looked(look(*many(count)))
        loop.pass_time(QUIET_S / 2)
    assert sent.titles() == []
    loop.pass_time(QUIET_S / 2)
    assert sent.titles() == ["5 forwards are open"]
    loop.pass_time(MOST_S - 3.5 * QUIET_S)
    sent.notifier.looked(look())
    sent.notifier.looked(look(rule()))
    loop.pass_time(0.9 * QUIET_S)
    assert sent.titles() == []
    loop.pass_time(0.1 * QUIET_S)
    assert sent.titles() == ["work web is open to anybody"]


def test_a_burst_that_does_not_end_is_told_all_the_same() -> None:
    loop = MainLoop()
    sent = Sent(loop)
    for count in range(21):
        sent.notifier.looked(look(*many(count)))
        loop.pass_time(QUIET_S / 2)
    assert sent.titles() == ["20 forwards are open"]


def test_what_opened_and_ended_meanwhile_is_told_as_both() -> None:
    loop = MainLoop()
    sent = Sent(loop)
    named = rule(f"expire={NOW + 1}")
    for each in (look(), look(named), look(named, now=NOW + 2)):
        sent.notifier.looked(each)
    loop.pass_time(QUIET_S)
    assert sent.titles() == ["work web is open to anybody", "work web has ended"]


def disabled(*names: str) -> Look:
    """Five rules that somebody has disabled, of which these are in force all the same."""
    rules = [rule(f"srcports={80 + number} enabled=no", name=name) for number, name in enumerate("abcde")]
    before = tuple(rule(f"srcports={80 + 'abcde'.index(name)}", name=name) for name in names)
    return looks.look(*rules, inventory=UP, before=before)


def five() -> Look:
    """The same rules before that."""
    rules = [rule(f"srcports={80 + number}", name=name) for number, name in enumerate("abcde")]
    return looks.look(*rules, inventory=UP)


def test_an_alarm_is_withdrawn_when_there_is_no_reason_any_more() -> None:
    loop = MainLoop()
    sent = Sent(loop)
    for each in (five(), disabled("a", "b")):
        sent.notifier.looked(each)
    loop.pass_time(QUIET_S)
    assert [(notice.title, notice.is_alarming) for notice in sent.notices] == [
        ("work a is still open", True),
        ("work b is still open", True),
    ]
    sent.notifier.looked(disabled("b"))
    assert sent.withdrawn == ["work a"]
    for each in (disabled(), disabled("a"), disabled()):
        sent.notifier.looked(each)
    assert sent.withdrawn == ["work a", "work b"]


def test_an_alarm_of_many_is_withdrawn_when_the_last_is_closed() -> None:
    loop = MainLoop()
    sent = Sent(loop)
    for each in (five(), disabled(*"abcd")):
        sent.notifier.looked(each)
    loop.pass_time(QUIET_S)
    assert sent.titles() == ["4 forwards are still open"]
    sent.notifier.looked(disabled("a"))
    assert sent.withdrawn == []
    sent.notifier.looked(disabled())
    assert sent.withdrawn == ["still"]


def test_a_look_at_each_system_is_told(
    forward: Command, store: Backend, other_store: Callable[[], Backend]
) -> None:
    before = look_at(store, NOW)
    forward("add", "work", "80:8080", "--from", "192.168.0.0/16", "--name", "web")
    is_open = look_at(store, NOW)
    (notice,) = told(before, is_open)
    assert "from 192.168.0.0/16 reach port 8080 of work" in notice.body
    forward("panic")
    assert [notice.title for notice in told(is_open, look_at(store, NOW))] == ["Everything is held"]
