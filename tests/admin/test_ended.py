# SPDX-License-Identifier: GPL-2.0-or-later
"""A rule whose time is over stays ended, wherever the clock is set to, until somebody gives it a new life."""

from faulty import Faulty, allowed
from worlds import ADD, NOW, Command

from qubes_fwd_qrexec.lab.directory import LabDirectory

HOUR = 3600
MORE = (("set", "work", "web", "expire=+8h"), ("enable", "work", "web"), ("set", "work", "web", "expire="))


def test_a_clock_that_is_set_back_opens_nothing_again(forward: Command, lab: LabDirectory) -> None:
    forward(*ADD, "--expire", "+1h")
    out = forward("apply", now=NOW + HOUR).out
    assert "  work web: mark it as expired for good\n" in out
    assert "ended=yes" in lab.features("work")["forward.web"]
    assert forward("apply", now=NOW).out == "Nothing to change: all is as the rules ask for.\n"
    assert forward("list", "--json", now=NOW).json["forwards"][0]["state"] == "expired"
    forward("add", "work", "81", "--from", "any", now=NOW)
    assert len(allowed(lab)) == 1


def test_more_time_or_enable_gives_it_a_new_life(forward: Command, lab: LabDirectory) -> None:
    forward(*ADD, "--expire", "+1h")
    for command in MORE:
        forward("apply", now=NOW + 10 * HOUR)
        assert allowed(lab) == frozenset()
        assert forward(*command, now=NOW).status == 0
        assert "ended" not in lab.features("work")["forward.web"]
        assert len(allowed(lab)) == 1


def test_another_change_of_it_gives_it_none(forward: Command, lab: LabDirectory) -> None:
    forward(*ADD, "--expire", "+1h")
    forward("apply", now=NOW + HOUR)
    forward("set", "work", "web", "comment=x")
    forward("disable", "work", "web")
    assert "ended=yes" in lab.features("work")["forward.web"]
    assert allowed(lab) == frozenset()


def test_a_rule_that_somebody_disabled_stays_so(forward: Command, lab: LabDirectory) -> None:
    forward(*ADD, "--expire", "+1h", "--disabled")
    forward("apply", now=NOW + HOUR)
    forward("set", "work", "web", "expire=+8h", now=NOW + HOUR)
    assert allowed(lab) == frozenset()


def test_what_cannot_be_stored_closes_all_the_same(
    forward: Command, over: Command, lab: LabDirectory
) -> None:
    forward(*ADD, "--expire", "+1h")
    line = lab.features("work")["forward.web"]
    lab.set_feature("work", "forward.web", line.replace(str(NOW + HOUR), str(NOW - 1)))
    result = over(Faulty(lab, "set work"), "apply")
    assert (result.status, allowed(lab)) == (1, frozenset())
    assert "cannot set work forward.web" in result.err
    assert "Not done: work web: mark it as expired for good" in result.err
