# SPDX-License-Identifier: GPL-2.0-or-later
"""What goes wrong in `watch` is told once, and tried again."""

import pytest
from stages import END, Stage, set_netvm
from worlds import NOW

from qubes_fwd_qrexec.admin.labstore import LabStore
from qubes_fwd_qrexec.admin.watch import (
    QUIET_S,
    RETRY_FIRST_S,
)
from qubes_fwd_qrexec.errors import StoreError
from qubes_fwd_qrexec.values import QubeName


def test_a_trouble_is_told_once_and_tried_again_ever_more_slowly(stage: Stage) -> None:
    stage.trouble = "qubesd is away\nfor \x1b[1mnow"

    def after() -> None:
        if len(stage.rests) == 9:
            stage.trouble = None

    stage.on_rest = after
    stage.run()
    assert stage.is_open
    assert set(stage.rests) == {RETRY_FIRST_S}
    assert stage.err.getvalue() == (
        "qvm-forward: qubesd is away\nqvm-forward: for \\x1b[1mnow\nqvm-forward: all is well again\n"
    )
    tried_again_after = [RETRY_FIRST_S + wait for wait in stage.waits[:12] if wait not in (None, QUIET_S)]
    assert tried_again_after == [1, 2, 4, 8, 16, 32, 60, 60, 60]


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
    assert first.startswith(
        "qvm-forward: not everything could be done: the disk is full; what its listener was not told"
    )
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
    assert stage.rests == [1, 2, 4]
    assert not stage.is_open
    assert stage.err.getvalue() == (
        "qvm-forward: changes are not noticed for now: qubesd sends no events\n"
        "qvm-forward: all is well again\n"
    )


def test_without_news_a_rule_ends_all_the_same(expiring: Stage) -> None:
    def lose() -> None:
        expiring.news_trouble = "no events"

    alarms: list[float | None] = []

    def after() -> None:
        alarms.append(expiring.alarm.wall)
        if len(expiring.rests) == 2:
            expiring.hands.pass_by(3600)
        if len(expiring.rests) == 3:
            END()

    expiring.on_rest = after
    expiring.run(lose)
    assert not expiring.is_open
    assert alarms == [NOW + 3600, NOW + 3600, None]


def test_an_end_that_could_not_be_acted_upon_does_not_ring_for_ever(expiring: Stage) -> None:
    def late() -> None:
        expiring.hands.pass_by(3600)
        expiring.trouble = "away"

    def mend() -> None:
        expiring.trouble = None

    expiring.on_rest = mend
    expiring.run(late)
    assert not expiring.is_open
    assert expiring.rests == [1]
    assert expiring.alarms_at_waits[expiring.waits.index(0.0)] is None


def test_after_a_trouble_the_next_one_is_tried_again_soon(stage: Stage) -> None:
    def lose() -> None:
        stage.news_trouble = "no events"

    def mend() -> None:
        if len(stage.rests) in (3, 6):
            stage.news_trouble = None

    stage.on_rest = mend
    stage.run(lose, lose)
    assert stage.rests == [1, 2, 4, 1, 2, 4]


def test_two_troubles_are_told_each_once(stage: Stage) -> None:
    stage.trouble, stage.news_trouble = "no answer", "no events"

    def mend() -> None:
        if len(stage.rests) == 9:
            stage.trouble = stage.news_trouble = None

    stage.on_rest = mend
    stage.run()
    assert stage.is_open
    assert stage.err.getvalue().splitlines() == [
        "qvm-forward: no answer",
        "qvm-forward: changes are not noticed for now: no events",
        "qvm-forward: all is well again",
    ]
