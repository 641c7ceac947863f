# SPDX-License-Identifier: GPL-2.0-or-later
"""One look at a system has all that the window shows of it, whatever else cannot be said."""

import pytest
from faulty import Faulty
from worlds import ADD, NOW, Command

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.states import State
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.window.model import figures
from qubes_fwd_qrexec.window.model.look import look_at

KEY = (QubeName("work"), "web")


def test_a_look_has_plan_and_what_is_not_in_force(forward: Command, store: Backend) -> None:
    forward(*ADD)
    look = look_at(store, NOW)
    assert (look.now, look.due, look.denials, look.read_only) == (NOW, (), {}, None)
    assert [each.state for each in look.plan] == [State.ACTIVE]
    assert [entry.key for entry in look.entries.rules] == [KEY]
    forward("set", "work", "web", "comment=x", "--no-apply")
    forward("disable", "work", "web", "--no-apply")
    assert [step.kind for step in look_at(store, NOW).due] == ["close-policy", "revoke", "remove-config"]


def test_what_an_earlier_look_made_of_rules_alone_is_not_made_again(forward: Command, store: Backend) -> None:
    forward(*ADD)
    first = look_at(store, NOW)
    forward("add", "work", "81", "--from", "10.0.0.0/8", "--name", "tls")
    second = look_at(store, NOW, first.plan)
    assert second.plan == look_at(store, NOW).plan
    assert second.plan.alone[KEY] is first.plan.alone[KEY]


def test_it_says_what_starts_watch_where_that_does_not_run(store: Backend) -> None:
    assert look_at(store, NOW).watch_start is not None
    with store.watching():
        assert look_at(store, NOW).watch_start is None


def test_it_says_why_dom0_denies_calls(forward: Command, store: Backend, lab: LabDirectory) -> None:
    forward(*ADD)
    (lab.policy_dir / "20-mine.policy").write_text("qubes.ForwardTCP * @anyvm @anyvm deny\n")
    look = look_at(store, NOW)
    assert [*look.denials] == [KEY]
    assert look.entries.rules[0].is_denied


def test_where_policy_cannot_be_judged_it_is_a_look_all_the_same(lab: LabDirectory, over: Command) -> None:
    def fails(entry: str) -> None:
        if entry == "judge":
            raise StoreError("no policy")

    over(Faulty(lab), *ADD)
    backend = Faulty(lab, before=fails)
    look = look_at(backend, NOW)
    assert (look.denials, look.verdicts) == ({}, None)
    assert not look.entries.rules[0].is_denied
    with pytest.raises(StoreError, match="no policy"):
        figures.ask(backend, look, NOW)


def test_policy_is_judged_once_for_a_look_and_its_figures(lab: LabDirectory, over: Command) -> None:
    backend = Faulty(lab)
    over(backend, *ADD)
    backend.log.clear()
    look = look_at(backend, NOW)
    for _ in range(2):
        figures.ask(backend, look, NOW)
    assert backend.log.count("judge") == 1


def test_what_cannot_be_read_is_a_problem_and_no_error(store: Backend, lab: LabDirectory) -> None:
    (lab.policy_dir / "30-forward.policy").write_bytes(b"\xff")
    look = look_at(store, NOW)
    assert len(look.snapshot.problems) == 1
    assert not look.snapshot.installed.is_read
