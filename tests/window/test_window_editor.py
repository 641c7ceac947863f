# SPDX-License-Identifier: GPL-2.0-or-later
"""The dialog that adds and changes forwards, over a lab and over a fake Admin API."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from controls import FOCUSABLE, called, find, walk
from editorstage import LINE, PROBE, WORK, Stage, Timer, set_netvm, stored
from faulty import Faulty
from screen import settle, until
from worlds import NOW, Command
from zones import zone

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.window.gtk import Gdk, Gtk
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


def test_a_forward_is_added_as_it_was_shown(stage: Stage, lab: LabDirectory) -> None:
    stage.add()
    assert stage.has("Something still has to be filled in.") or not stage.button("Open").get_sensitive()
    stage.fill()
    stage.ready("Open")
    assert stage.has("Connections to port 80 of sys-net (outer side) from 10.0.0.0/8 reach port 80 of work.")
    stage.button("Open").clicked()
    assert not stage.button("Cancel").get_sensitive()
    until(lambda: stage.told)
    assert not stage.is_open
    (done,) = stage.told
    assert (done.is_well, done.warnings) == (True, ())
    assert done.lines[0].startswith("Forward work tcp-80 is stored and active.")
    rule = stored(lab, "tcp-80")
    assert (rule.expire, rule.path, rule.owner) == (NOW + 3600, ("sys-firewall", "sys-net"), "work")


def test_the_button_waits_until_just_these_fields_have_been_judged(stage: Stage) -> None:
    stage.add(WORK)
    stage.fill()
    button = stage.ready("Open")
    stage.entry("Comment").set_text("x")
    assert not button.get_sensitive()
    stage.ready("Open")


def test_what_is_opened_to_anybody_is_chosen_and_named(stage: Stage, lab: LabDirectory) -> None:
    stage.add()
    stage.fill(sources="")
    stage.radio("Until I remove it").set_active(True)
    until(lambda: stage.has("Still to be filled in: Networks and qubes that may connect."))
    assert not stage.button("Open").get_sensitive()
    stage.radio("Anybody who can reach it").set_active(True)
    button = stage.ready("Open to anybody")
    assert button.get_style_context().has_class("anybody")
    button.clicked()
    until(lambda: stage.told)
    assert (stored(lab, "tcp-80").sources.anyone, stored(lab, "tcp-80").expire) == (True, None)


def test_a_fault_is_shown_at_its_field_until_it_is_mended(stage: Stage) -> None:
    stage.add()
    stage.fill(ports=PROBE, sources=PROBE)
    until(lambda: stage.has("To be corrected:"))
    port = stage.entry("Server port")
    assert stage.has(f"{PROBE!a} is not a port or range of ports")
    assert port.get_style_context().has_class("invalid_entry")
    assert f"{PROBE!a}" in port.get_accessible().get_description()
    assert not stage.button("Open").get_sensitive()
    port.set_text("80")
    until(lambda: not port.get_style_context().has_class("invalid_entry"))
    assert stage.entry("Networks and qubes that may connect").get_style_context().has_class("invalid_entry")


@pytest.fixture
def hidden(lab: LabDirectory, stage: Stage) -> Stage:
    """The dialog is open on a qube behind a tunnel."""
    set_netvm(lab, "personal", "sys-vpn")
    lab.set_feature("sys-vpn", "forward.tunnel", "1")
    stage.looked()
    stage.add()
    stage.fill("personal")
    until(lambda: stage.has("This cannot be opened."))
    return stage


def test_a_tunnel_is_not_bypassed_but_the_forward_exposed_at_it(hidden: Stage, lab: LabDirectory) -> None:
    assert not hidden.button("Open").get_sensitive()
    hidden.button("Expose it at sys-vpn").clicked()
    assert hidden.dialog.get_focus() is hidden.entry("The other qube")
    hidden.ready("Open").clicked()
    until(lambda: hidden.told)
    assert (stored(lab, "tcp-80", "personal").via, stored(lab, "tcp-80", "personal").bypass_tunnel) == (
        "sys-vpn",
        False,
    )


def test_a_tunnel_is_bypassed_by_a_tick_of_its_own(hidden: Stage, lab: LabDirectory) -> None:
    tick = find(hidden.dialog, Gtk.CheckButton, "Bypass the tunnel, I accept the risk")
    settle()
    assert tick.get_mapped()
    tick.set_active(True)
    hidden.ready("Open").clicked()
    until(lambda: hidden.told)
    assert stored(lab, "tcp-80", "personal").bypass_tunnel


def test_a_mend_that_has_to_be_filled_in_leads_to_its_field(stage: Stage) -> None:
    stage.add()
    stage.fill("vault")
    until(lambda: stage.has("This cannot be opened."))
    stage.button("Expose it at another qube…").clicked()
    assert stage.dialog.get_focus() is stage.entry("The other qube")


def test_a_mend_for_elsewhere_is_copied(lab: LabDirectory, stage: Stage) -> None:
    lab.set_feature("work", "forward.web", LINE)
    stage.looked()
    stage.add()
    stage.fill("personal")
    until(lambda: stage.has("Rule work web already has port 80 of sys-net"))
    stage.button("Copy “qvm-forward disable work web”").clicked()
    clipboard = Gtk.Clipboard.get(Gdk.SELECTION_CLIPBOARD)
    assert clipboard.wait_for_text() == "qvm-forward disable work web"


def test_a_button_that_means_something_else_waits_a_moment(stage: Stage, lab: LabDirectory) -> None:
    stage.add()
    stage.fill()
    stage.ready("Open")
    lab.write_qube(replace(lab.qube("sys-firewall"), netvm=None))
    stage.looked()
    until(lambda: stage.timer.calls)
    assert not stage.button("Open").get_sensitive()
    stage.timer.pass_by()
    stage.ready("Open")
    stage.looked()
    settle()
    assert stage.timer.calls == []


def test_an_error_keeps_the_dialog_open_and_its_fields(lab: LabDirectory) -> None:
    board = Board(lambda: Faulty(lab, "set work"), deliver, Timer(), lambda: NOW)
    stage = Stage(board, Timer())
    stage.looked()
    stage.add()
    stage.fill()
    button = stage.ready("Open")
    button.grab_focus()
    button.clicked()
    until(lambda: stage.has("cannot set work forward.tcp-80"))
    assert stage.dialog.get_focus() is stage.button("Open")
    assert (stage.is_open, stage.entry("Qube").get_text(), stage.told) == (True, "work", [])
    assert "forward.tcp-80" not in lab.features("work")
    stage.looked()
    assert stage.has("cannot set work")
    stage.ready("Open").clicked()
    assert not stage.has("cannot set work")
    until(lambda: stage.has("cannot set work"))
    stage.entry("Comment").set_text("x")
    assert not stage.has("cannot set work")
    stage.dialog.destroy()
    board.close()


def test_what_is_wrong_only_when_it_is_stored_is_shown_at_its_field_too(stage: Stage) -> None:
    stage.add()
    stage.fill()
    until_field = stage.entry("Until")
    until_field.set_text("2027-01-15 08:01")
    button = stage.ready("Open")
    stage.timer.now += 61
    button.clicked()
    until(lambda: stage.has("that time is in the past"))
    assert until_field.get_style_context().has_class("invalid_entry")
    assert stage.dialog.get_focus() is until_field
    stage.radio("8 hours").set_active(True)
    stage.ready("Open")
    assert not until_field.get_style_context().has_class("invalid_entry")


def test_a_time_of_the_day_is_that_of_the_day_for_which_it_was_shown(stage: Stage, lab: LabDirectory) -> None:
    with zone("UTC"):
        stage.add(WORK)
        stage.fill()
        stage.entry("Until").set_text("8:01")
        until(lambda: stage.has("It ends 2027-01-15 08:01 UTC (in 1 min)."))
        stage.timer.now += 61
        stage.button("Open").clicked()
        until(lambda: stage.has("that time is in the past"))
        assert "forward.tcp-80" not in lab.features("work")


def test_a_span_of_time_begins_when_it_is_opened(stage: Stage, lab: LabDirectory) -> None:
    stage.add(WORK)
    stage.fill()
    stage.ready("Open")
    stage.timer.now += 61
    stage.button("Open").clicked()
    until(lambda: stage.told)
    assert stored(lab, "tcp-80").expire == NOW + 61 + 3600


def escape(stage: Stage) -> None:
    """What Escape does in a dialog of GTK."""
    stage.dialog.emit("close")


def test_escape_changes_nothing(stage: Stage, lab: LabDirectory) -> None:
    before = lab.features("work")
    stage.add()
    stage.fill()
    stage.ready("Open")
    escape(stage)
    until(lambda: not stage.is_open)
    stage.looked()
    assert lab.features("work") == before


def test_while_a_change_is_made_the_dialog_cannot_be_left(stage: Stage, store: Backend) -> None:
    stage.add()
    stage.fill()
    button = stage.ready("Open")
    with store.locked():
        button.clicked()
        escape(stage)
        settle()
        assert stage.is_open
        assert not stage.entry("Qube").is_sensitive()
    until(lambda: stage.told)


def test_what_was_begun_is_told_where_the_dialog_is_gone(
    stage: Stage, store: Backend, forward: Command
) -> None:
    for ports in ("80", "81"):
        stage.add()
        stage.fill(ports=ports)
        button = stage.ready("Open")
        if ports == "81":
            forward("add", "work", "82", "--from", "any", "--name", "tcp-81")
        with store.locked():
            button.clicked()
            stage.dialog.destroy()
        until(lambda: len(stage.told) == (1 if ports == "80" else 2))  # noqa: B023
    assert [done.is_well for done in stage.told] == [True, False]
    assert "there is one already" in stage.told[1].warnings[0]


def test_of_two_openings_at_once_the_last_is_shown(stage: Stage) -> None:
    before = Gtk.Window.list_toplevels()
    stage.editor.add(None)
    stage.add(WORK)
    settle()
    dialogs = [w for w in Gtk.Window.list_toplevels() if w not in before and isinstance(w, Gtk.Dialog)]
    assert dialogs == [stage.dialog]
    assert stage.entry("Qube").get_text() == "work"


def test_nothing_is_the_default(stage: Stage) -> None:
    stage.add()
    assert stage.dialog.get_default_widget() is None
    assert not any(isinstance(w, Gtk.Entry) and w.get_activates_default() for w in walk(stage.dialog))


def test_nothing_is_saved_where_nothing_can_be_changed(stage: Stage) -> None:
    assert stage.board.look is not None
    stage.board.look = replace(stage.board.look, read_only="This qube may only look.")
    stage.add()
    stage.fill()
    until(lambda: stage.has("reach port 80 of work."))
    assert stage.has("This qube may only look.")
    assert not stage.button("Open").get_sensitive()


def test_before_the_first_look_it_says_so(other_store: Callable[[], Backend]) -> None:
    board = Board(other_store, deliver, Timer(), lambda: NOW)
    stage = Stage(board, Timer())
    stage.add()
    assert stage.has("The qubes have not been read yet.")
    stage.looked()
    until(lambda: stage.has("Something still has to be filled in."))
    stage.dialog.destroy()
    stage.looked()
    board.close()


def test_each_control_has_a_name_and_a_letter_of_its_own(stage: Stage) -> None:
    stage.add()
    find(stage.dialog, Gtk.Expander, "Further options").set_expanded(True)
    stage.radio("Its netvm, only for other qubes").set_active(True)
    settle()
    controls = [w for w in walk(stage.dialog) if isinstance(w, FOCUSABLE) and w.get_mapped()]
    assert len(controls) > 40
    assert [w for w in controls if not called(w) and w.get_ancestor(Gtk.ComboBox) is None] == []
    labels = [w for w in walk(stage.dialog) if isinstance(w, Gtk.Label) and w.get_use_underline()]
    letters = Counter(m[1].lower() for w in labels if (m := re.search(r"(?<!_)_([^_])", w.get_label())))
    assert {letter: count for letter, count in letters.items() if count > 1} == {}
    assert len(letters) > 20


def test_it_fits_a_small_screen(stage: Stage) -> None:
    stage.add()
    find(stage.dialog, Gtk.Expander, "Further options").set_expanded(True)
    settle()
    smallest, _ = stage.dialog.get_preferred_size()
    assert (smallest.width <= 780, smallest.height <= 540) == (True, True)


def test_what_was_shown_is_what_the_change_is_held_to(
    stage: Stage, forward: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also that there was no rule of the name that is made up."""
    stage.add()
    stage.fill()
    button = stage.ready("Open")
    forward("add", "work", "81", "--from", "any", "--name", "tcp-80")
    button.clicked()
    until(lambda: stage.has("there is one already"))
    until(lambda: stage.timer.calls)
    stage.timer.pass_by()
    stage.ready("Open").clicked()
    until(lambda: stage.told)
    assert stage.told[0].lines[0].startswith("Forward work tcp-80-2 is stored")
