# SPDX-License-Identifier: GPL-2.0-or-later
"""What the bars of the window say of the whole system, and when."""

from dataclasses import replace

import pytest
from looks import still_allowed
from worlds import ADD, NOW, Command, rule

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.window.model.alerts import Alert, Way, alerts
from qubes_fwd_qrexec.window.model.look import Look, look_at


def of(look: Look | None, *left: str, trouble: str | None = None) -> list[Alert]:
    return [*alerts(look, left, trouble)]


def only(look: Look, *left: str, trouble: str | None = None) -> Alert:
    (alert,) = of(look, *left, trouble=trouble)
    return alert


@pytest.fixture
def look(forward: Command, store: Backend) -> Look:
    """All is well: `watch` runs, and nothing is open."""
    return look_at(store, NOW)


def test_where_all_is_well_there_is_no_word(look: Look) -> None:
    assert of(look) == []


def test_before_the_first_look_the_window_itself_says_what_is_wrong() -> None:
    assert of(None, trouble="no qubesd") == []


def test_in_trouble_it_says_of_when_is_what_is_shown(look: Look) -> None:
    alert = only(look, trouble="qubesd\x1b is gone")
    assert alert.text.startswith("What is shown may be old: it is from 2027-01-15 ")
    assert alert.lines == ("qubesd\\x1b is gone",)
    assert (alert.way, alert.is_bad) == (Way.LOOK, True)


def test_a_hold_can_be_lifted(forward: Command, store: Backend) -> None:
    forward(*ADD)
    forward("panic")
    alert = only(look_at(store, NOW))
    assert alert.text == "Everything is held: nothing is open, whatever the rules ask for."
    assert alert.way is Way.RESUME


def test_a_hold_says_that_nothing_is_open_only_where_that_is_sure() -> None:
    held = still_allowed(before=(rule("srchosts=192.168.0.0/16"),), is_held=True)
    sure = replace(held, due=())
    assert only(sure).text.startswith("Everything is held: nothing is open")
    for unsure in (of(held), of(sure, "work goes on"), of(sure, trouble="qubesd is gone")):
        assert "Everything is held." in {alert.text for alert in unsure}


def test_without_watch_it_says_what_starts_that(store: Backend) -> None:
    look = look_at(store, NOW)
    alert = only(look)
    assert alert.text.startswith("Expiry and netvm changes take effect only at the next apply")
    assert alert.lines == (f"To start it: {look.watch_start}.",)
    assert alert.way is Way.APPLY


def test_what_is_not_in_force_can_be_applied(forward: Command, store: Backend) -> None:
    forward(*ADD, "--no-apply")
    alert = only(look_at(store, NOW))
    assert alert.text == "Not everything that the rules ask for is in force."
    assert alert.lines[0].startswith("policy: from now on qubes.ForwardTCP")
    assert (alert.way, alert.is_bad) == (Way.APPLY, False)


def test_what_may_let_in_more_than_the_rules_is_bad(forward: Command, store: Backend) -> None:
    forward(*ADD)
    forward("remove", "work", "web", "--no-apply")
    alert = only(look_at(store, NOW))
    assert alert.text == "What is in force is not what the rules ask for, and may let in more."
    assert (alert.way, alert.is_bad) == (Way.APPLY, True)


def test_what_qubes_say_that_goes_on_is_bad_and_no_apply_ends_it(look: Look) -> None:
    alert = only(look, "work web should be closed")
    assert alert.text == "Something is still going on that no rule asks for."
    assert alert.lines == ("work web should be closed",)
    assert (alert.way, alert.is_bad) == (None, True)


def test_of_many_lines_the_first_are_shown(look: Look) -> None:
    assert only(look, *"abcdef").lines == ("a", "b", "c", "d", "and 2 more")
    assert only(look, *"abcd").lines == ("a", "b", "c", "d")


def test_apply_is_offered_once(forward: Command, store: Backend) -> None:
    forward(*ADD, "--no-apply")
    look = replace(look_at(store, NOW), watch_start="'systemctl start it'")
    assert [alert.way for alert in of(look)] == [Way.APPLY, None]


def test_where_nothing_can_be_changed_no_way_is_offered(forward: Command, store: Backend) -> None:
    forward(*ADD)
    forward("panic")
    look = replace(look_at(store, NOW), read_only="dom0 lets this qube only read", watch_start="start it")
    found = {alert.kind: alert for alert in of(look)}
    assert [*found] == ["held", "read-only", "unwatched"]
    assert found["read-only"].text == "Nothing can be changed from here: dom0 lets this qube only read."
    assert all(alert.way is None and not alert.label for alert in found.values())


def test_what_could_not_be_read_is_named(look: Look) -> None:
    qubes = dict(look.snapshot.inventory.qubes)
    for name in ("work", "personal"):
        qubes[QubeName(name)] = qubes[QubeName(name)]._replace(problem=f"{name}: no answer")
    inventory = look.snapshot.inventory._replace(qubes=qubes)
    alert = only(replace(look, snapshot=look.snapshot._replace(inventory=inventory)))
    assert alert.text == "2 items could not be read."
    assert {*alert.lines} == {"work: no answer", "personal: no answer"}
