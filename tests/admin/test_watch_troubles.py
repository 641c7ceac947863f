# SPDX-License-Identifier: GPL-2.0-or-later
"""What goes wrong in `watch` is told once, and tried again."""

import pytest
from stages import END, Stage, set_netvm

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.revoking import serving
from qubes_fwd_qrexec.admin.states import Plan
from qubes_fwd_qrexec.admin.watch import RETRY_S
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.qube import QubeState
from qubes_fwd_qrexec.lab.store import LabStore


def test_a_trouble_is_told_once_and_tried_again(stage: Stage) -> None:
    stage.trouble = "qubesd is away\nfor \x1b[1mnow"

    def after() -> None:
        if len(stage.rests) == 9:
            stage.trouble = None

    stage.on_rest = after
    stage.run()
    assert stage.is_open
    assert stage.rests == [RETRY_S] * 9
    assert stage.err.getvalue() == (
        "qvm-forward: qubesd is away\nqvm-forward: for \\x1b[1mnow\nqvm-forward: all is well again\n"
    )


def test_a_change_in_trouble_is_tried_at_once_but_not_before_the_first_pause(stage: Stage) -> None:
    stage.trouble = "away"

    def mend() -> None:
        if len(stage.rests) == 4:
            stage.trouble = None
        stage.lab.set_feature("work", "forward.tunnel", str(len(stage.rests)))

    stage.on_rest = mend
    stage.run()
    assert len(stage.rests) == 4
    assert len(stage.looks) <= 4 + 3


def test_what_fails_to_be_written_is_told_and_mended(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: LabStore, qube: QubeName, key: str, value: str) -> None:
        raise StoreError("the disk is full")

    def mend() -> None:
        monkeypatch.undo()

    monkeypatch.setattr(LabStore, "set_feature", refuse)
    stage.on_rest = mend
    stage.run()
    assert stage.is_open
    first, last = stage.err.getvalue().splitlines()
    assert first == "qvm-forward: not everything could be done: the disk is full"
    assert last == "qvm-forward: all is well again"


def test_news_that_is_lost_is_sought_again_and_all_is_looked_at(stage: Stage) -> None:
    def lose() -> None:
        stage.news_trouble = "qubesd sends no events"

    def mend() -> None:
        if len(stage.rests) == 3:
            set_netvm(stage.lab)
            stage.news_trouble = None

    stage.on_rest = mend
    stage.run(lose)
    assert stage.rests == [RETRY_S] * 3
    assert not stage.is_open
    assert stage.err.getvalue() == ("qvm-forward: qubesd sends no events\nqvm-forward: all is well again\n")


def test_without_news_a_rule_ends_all_the_same(expiring: Stage) -> None:
    def lose() -> None:
        expiring.news_trouble = "no events"

    def after() -> None:
        if len(expiring.rests) == 2:
            expiring.hands.pass_by(3600)
        if len(expiring.rests) == 3:
            END()

    expiring.on_rest = after
    expiring.run(lose)
    assert not expiring.is_open


def test_an_end_that_could_not_be_acted_upon_does_not_ring_for_ever(expiring: Stage) -> None:
    def late() -> None:
        expiring.hands.pass_by(3600)
        expiring.trouble = "away"

    def mend() -> None:
        expiring.trouble = None

    expiring.on_rest = mend
    expiring.run(late)
    assert not expiring.is_open
    assert expiring.rests == [RETRY_S]


def test_two_troubles_are_told_each_once(stage: Stage) -> None:
    stage.trouble, stage.news_trouble = "no answer", "no events"

    def mend() -> None:
        if len(stage.rests) == 4:
            stage.trouble = None
        if len(stage.rests) == 9:
            stage.news_trouble = None

    stage.on_rest = mend
    stage.run()
    assert stage.is_open
    assert stage.err.getvalue().splitlines() == [
        "qvm-forward: no answer",
        "qvm-forward: no events",
        "qvm-forward: all is well again",
    ]


class Targets:
    """What targets are told; one that `is_silent` cannot be told anything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[tuple[str, str]] = []
        self.is_silent = False
        monkeypatch.setattr(LabStore, "ask", self.ask)

    def ask(self, qube: str, service: str, *more: object) -> bytes:
        self.told.append((qube, str(more[-1])))
        if self.is_silent:
            raise StoreError("no answer")
        return b"version=1 ended=0 draining=0\n"


WEB_KEPT = ("work", "version=1 drains=keep\nkeep 8080-8080 sys-net\n")


def test_whatever_serves_is_told_when_it_starts_what_is_allowed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dom0 may have allowed a call while it was starting, of a rule that is over now."""
    targets = Targets(monkeypatch)
    at_first: list[tuple[str, str]] = []

    def halt() -> None:
        at_first.extend(targets.told)
        targets.told.clear()
        stage.lab.set_state("work", QubeState.HALTED)
        stage.lab.set_state("vault", QubeState.HALTED)

    stage.run(
        halt,
        lambda: stage.lab.set_state("work", QubeState.RUNNING),
        lambda: stage.lab.set_state("vault", QubeState.RUNNING),
    )
    assert WEB_KEPT in at_first
    assert sorted(qube for qube, _ in at_first) == sorted(serving(stage.inventory()))
    assert targets.told == [WEB_KEPT, ("vault", "version=1 drains=keep\n")]


def test_when_everything_is_held_all_that_serve_cut_what_they_have(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = Targets(monkeypatch)
    path = stage.lab.policy_dir / f"{policy.NAME}.policy"

    def hold() -> None:
        targets.told.clear()
        path.write_text(policy.text(Plan((), is_held=True)))

    stage.run(hold, lambda: stage.lab.set_feature("vault", "forward.tunnel", "1"))
    assert not stage.is_open
    assert {said for _, said in targets.told} == {"version=1 drains=cut\n"}
    assert len(targets.told) == len({qube for qube, _ in targets.told}) > 1


def test_a_target_that_could_not_be_told_is_named_once_with_what_bounds_it(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = Targets(monkeypatch)

    def end() -> None:
        targets.told.clear()
        targets.is_silent = True
        set_netvm(stage.lab)

    stage.run(end, lambda: stage.lab.set_feature("vault", "forward.tunnel", "1"))
    assert not stage.is_open
    assert stage.rests == []
    assert targets.told == [("work", "version=1 drains=keep\n")]
    (line,) = stage.err.getvalue().splitlines()
    assert "qubes.ForwardRevoke in work: no answer. What is open to work may go on" in line
