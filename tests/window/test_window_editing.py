# SPDX-License-Identifier: GPL-2.0-or-later
"""What the dialog changes of a stored rule: what its user has changed, and only if the rule is as it was."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from editorstage import LINE, PROBE, WORK, Stage, Timer, set_netvm, stored
from screen import settle, until

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.common.options import Option
from qubes_fwd_qrexec.common.rules import ForwardRule
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.window.model.board import Board
from qubes_fwd_qrexec.window.widgets import deliver


@pytest.fixture
def stage(other_store: Callable[[], Backend], watched: None) -> Iterator[Stage]:
    timer = Timer()
    board = Board(other_store, deliver, Timer(), lambda: timer.now)
    stage = Stage(board, timer)
    stage.looked()
    yield stage
    if stage.editor.widget is not None:
        stage.editor.widget.destroy()
    board.close()
    settle()


@pytest.fixture
def edited(lab: LabDirectory, stage: Stage) -> Stage:
    """The dialog is open on a stored rule."""
    lab.set_feature("work", "forward.web", LINE)
    stage.looked()
    stage.edit()
    return stage


def test_an_edit_changes_what_the_user_has_changed(edited: Stage, lab: LabDirectory) -> None:
    until(lambda: edited.has("Nothing has been changed yet."))
    assert not edited.button("Save").get_sensitive()
    edited.entry("Comment").set_text(PROBE)
    edited.ready("Save").clicked()
    until(lambda: edited.told)
    assert stored(lab) == replace(ForwardRule.parse(LINE), comment=PROBE)
    assert edited.told[0].lines[0].startswith("Forward work web is changed and active.")


def test_an_edit_may_begin_with_what_a_way_out_asks_for(stage: Stage, lab: LabDirectory) -> None:
    lab.set_feature("work", "forward.web", LINE)
    stage.looked()
    stage.edit([Option("srchosts", "any", "")])
    stage.ready("Save: open to anybody")


def test_what_is_not_there_or_cannot_be_read_opens_no_dialog(stage: Stage, lab: LabDirectory) -> None:
    lab.set_feature("work", "forward.bad", "nonsense")
    stage.looked()
    for name in ("gone", "bad"):
        stage.editor.edit(None, (WORK, name))
    assert stage.editor.widget is None


def test_a_rule_that_changes_meanwhile_is_shown_both_ways_and_the_fields_can_be_kept(
    edited: Stage, lab: LabDirectory
) -> None:
    edited.entry("Comment").set_text("mine")
    edited.ready("Save")
    lab.set_feature("work", "forward.web", f"{LINE} comment=theirs")
    edited.looked()
    until(lambda: edited.has("This rule has been changed in the meantime."))
    assert edited.has("You saw: action=forward")
    assert edited.has("comment=theirs")
    assert not edited.button("Save").get_sensitive()
    edited.button("Keep what I entered").clicked()
    edited.ready("Save").clicked()
    until(lambda: edited.told)
    assert stored(lab).comment == "mine"


def test_a_rule_that_changes_meanwhile_can_be_taken_as_it_is(edited: Stage, lab: LabDirectory) -> None:
    lab.set_feature("work", "forward.web", f"{LINE} comment=theirs")
    edited.looked()
    until(lambda: edited.has("This rule has been changed in the meantime."))
    edited.button("Use what is stored now").clicked()
    until(lambda: edited.has("Nothing has been changed yet."))
    assert edited.entry("Comment").get_text() == "theirs"


def test_a_change_of_which_no_look_knows_yet_is_not_overwritten(edited: Stage, lab: LabDirectory) -> None:
    edited.entry("Comment").set_text("mine")
    button = edited.ready("Save")
    button.grab_focus()
    lab.set_feature("work", "forward.web", f"{LINE} comment={PROBE}")
    button.clicked()
    until(lambda: edited.has("it is not what you saw, but"))
    assert edited.has(f"You saw: {ForwardRule.parse(LINE)}")
    assert (edited.is_open, edited.told, stored(lab).comment) == (True, [], PROBE)
    assert edited.dialog.get_focus() is edited.button("Cancel")
    until(lambda: edited.has("This rule has been changed in the meantime."))
    assert edited.button("Keep what I entered").get_sensitive()


def test_netvms_that_change_unseen_open_nothing(stage: Stage, lab: LabDirectory) -> None:
    stage.add()
    stage.fill()
    button = stage.ready("Open")
    set_netvm(lab, "work", "sys-net")
    button.clicked()
    until(lambda: stage.has("the netvms of work were sys-firewall - sys-net"))
    assert "forward.tcp-80" not in lab.features("work")
    until(lambda: stage.timer.calls)
    stage.timer.pass_by()
    stage.ready("Open")
