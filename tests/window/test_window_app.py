# SPDX-License-Identifier: GPL-2.0-or-later
"""The program over both backends: it does what it is asked for, shows what came of that, and ends well."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
from helpers import BOUND_S
from onscreen import inside, texts
from screen import settle, until
from worlds import ADD, Command

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.store import LabStore
from qubes_fwd_qrexec.window.app import APP_ID, Manager, Program, begin
from qubes_fwd_qrexec.window.gtk import Gdk, GLib, Gtk
from qubes_fwd_qrexec.window.model.actions import Done
from qubes_fwd_qrexec.window.model.remedies import Act, Remedy
from qubes_fwd_qrexec.window.program import Start

WEB = ("work", "web")


class Running:
    """The program with its window, which has looked once. No news come, so a test has it look again."""

    def __init__(self, open_backend: Callable[[], Backend]) -> None:
        self.ends: list[str] = []
        self.manager = Manager(Start(open_backend, None), lambda: self.ends.append("ended"))
        self.widget = self.manager.widget
        self.widget.show()
        self.look()

    def look(self) -> None:
        board = self.manager.board
        was = board.look
        board.refresh()
        until(lambda: board.look is not was)

    def dialogs(self) -> list[Gtk.Window]:
        return [
            window
            for window in Gtk.Window.list_toplevels()
            if window.get_visible() and window.get_transient_for() is self.widget
        ]

    def says(self, text: str) -> bool:
        return any(text in each for each in texts(self.widget))


@pytest.fixture
def running(other_store: Callable[[], Backend], forward: Command) -> Iterator[Running]:
    forward(*ADD)
    made = Running(other_store)
    yield made
    for dialog in made.dialogs():
        dialog.destroy()
    made.manager.close()
    settle()


@pytest.mark.parametrize(
    ("ask", "title"),
    [
        (lambda manager: manager.add(), "Add"),
        (lambda manager: manager.edit(WEB), "Edit"),
        (lambda manager: manager.confirm(WEB), "Confirm"),
        (lambda manager: manager.remove([WEB]), "Remove"),
        (lambda manager: manager.cut(WEB, None), "Cut"),
        (lambda manager: manager.diagnose(WEB), "Diagnos"),
        (lambda manager: manager.close_everything(), "Close everything"),
        (lambda manager: manager.resume(), "Resume"),
    ],
)
def test_what_needs_a_word_opens_a_dialog_and_changes_nothing(
    running: Running, lab: LabDirectory, ask: Callable[[Manager], None], title: str
) -> None:
    was = lab.features("work")
    ask(running.manager)
    until(running.dialogs)
    (dialog,) = running.dialogs()
    assert title in (dialog.get_title() or "")
    # A diagnosis takes a while, and the list can be worked on meanwhile.
    assert dialog.get_modal() is (title != "Diagnos")
    assert lab.features("work") == was


@pytest.mark.parametrize(
    "ask",
    [
        lambda manager: manager.add(),
        lambda manager: manager.edit(WEB),
        lambda manager: manager.diagnose(WEB),
    ],
)
def test_a_double_click_opens_one_dialog(running: Running, ask: Callable[[Manager], None]) -> None:
    ask(running.manager)
    ask(running.manager)
    until(running.dialogs)
    settle()
    (dialog,) = running.dialogs()
    dialog.destroy()
    ask(running.manager)
    until(running.dialogs)
    assert len(running.dialogs()) == 1


def test_what_the_pane_shows_is_changed_and_nothing_else_though_there_is_a_newer_look(
    running: Running, lab: LabDirectory, forward: Command
) -> None:
    forward("disable", "work", "web")
    running.look()
    running.manager.show(WEB)
    until(lambda: running.says("192.168.0.0/16 may connect, nobody else"))
    forward("set", "work", "web", "srchosts=10.0.0.0/8")
    running.look()  # what the pane shows of it is computed now
    was = lab.features("work")["forward.web"]
    running.manager.enable(WEB)
    until(lambda: running.says("work web was not enabled") or running.says("work web is enabled"))
    assert lab.features("work")["forward.web"] == was
    until(lambda: running.says("10.0.0.0/8 may connect, nobody else"))
    running.manager.enable(WEB)
    until(lambda: "enabled=no" not in lab.features("work")["forward.web"])


def test_a_change_is_done_and_what_came_of_it_is_shown(running: Running, lab: LabDirectory) -> None:
    running.manager.disable(WEB)
    until(lambda: running.says("disabled"))
    assert "enabled=no" in lab.features("work")["forward.web"]
    until(lambda: running.manager.board.look.plan.find(*WEB).named.rule.enabled is False)
    running.manager.enable(WEB)
    until(lambda: "enabled=no" not in lab.features("work")["forward.web"])


ANYBODY = ("work", "all")


def test_what_opens_to_anybody_is_asked_about_and_nothing_that_stays_closed_all_the_same(
    running: Running, lab: LabDirectory, forward: Command
) -> None:
    forward("add", "work", "82", "--from", "any", "--name", "all", "--disabled")
    forward("set", "work", "all", "expire=+1h")
    was = lab.features("work")["forward.all"]
    running.look()
    running.manager.extend(ANYBODY)  # it stays disabled
    until(lambda: running.says("work all is changed"))
    assert running.dialogs() == []
    assert lab.features("work")["forward.all"] != was
    running.look()
    running.manager.enable(ANYBODY)
    (dialog,) = running.dialogs()
    assert dialog.get_title() == "Open to anybody"
    assert "enabled=no" in lab.features("work")["forward.all"]


def test_clicks_while_a_change_waits_are_no_further_changes(running: Running, store: Backend) -> None:
    with store.locked():
        for _ in range(3):
            running.manager.disable(WEB)
        assert running.says("Working…")
    until(lambda: not running.says("Working…"))
    assert running.says("disabled")
    running.manager.window.outcome.hide()
    over: list[object] = []
    running.manager.board.change(lambda _: None, over.append, over.append)
    until(lambda: over)
    assert not running.says("disabled")


def test_what_is_asked_for_while_a_change_waits_is_done_after_it(
    running: Running, lab: LabDirectory, store: Backend
) -> None:
    """Whoever opens something and regrets it closes it."""
    with store.locked():
        running.manager.disable(WEB)
        running.manager.extend(WEB)
        running.manager.disable(WEB)
    until(lambda: not running.says("Working…"))
    assert "enabled=no" in lab.features("work")["forward.web"]
    assert running.says("work web was not disabled")


def test_a_rule_that_is_no_longer_what_was_seen_is_not_changed(
    running: Running, lab: LabDirectory, forward: Command
) -> None:
    forward("set", "work", "web", "comment=other")
    was = lab.features("work")["forward.web"]
    running.manager.disable(WEB)
    until(lambda: running.says("work web was not disabled"))
    assert lab.features("work")["forward.web"] == was


def test_apply_is_done_only_when_it_is_asked_for(
    running: Running, lab: LabDirectory, forward: Command
) -> None:
    forward("remove", "work", "web", "--no-apply")
    running.look()
    assert "vm-config.fwd.work.web" in lab.features("sys-net")
    running.manager.apply()
    until(lambda: "vm-config.fwd.work.web" not in lab.features("sys-net"))


def test_a_way_out_is_taken(running: Running, lab: LabDirectory) -> None:
    running.manager.remedy(Remedy("Mark it", Act.MARK, None, (), "", "sys-vpn"))
    until(lambda: "forward.tunnel" in lab.features("sys-vpn"))
    running.manager.remedy(Remedy("Confirm", Act.CONFIRM, WEB, (), ""))
    until(running.dialogs)


def test_what_the_window_cannot_do_can_be_pasted(running: Running) -> None:
    running.manager.remedy(Remedy("Start it", Act.COPY, None, (), "qvm-start 'sys-vpn'"))
    found = Gtk.Clipboard.get(Gdk.SELECTION_CLIPBOARD).wait_for_text()
    assert found == "qvm-start 'sys-vpn'"


def test_a_rule_can_be_shown_from_elsewhere(running: Running) -> None:
    running.manager.show(WEB)
    until(lambda: running.says("web"))


def test_a_bug_is_told_in_words(running: Running) -> None:
    running.manager.tell(ValueError("<b>x</b>"))
    until(lambda: running.says("<b>x</b>"))


def test_a_dialog_that_is_being_made_is_not_shown_once_its_window_is_closed(running: Running) -> None:
    running.manager.add()
    running.manager.close()
    settle()
    assert not [window for window in Gtk.Window.list_toplevels() if window.get_title() == "Add a forward"]


def test_closing_waits_for_a_change_that_has_begun(running: Running, lab: LabDirectory) -> None:
    begun, done = threading.Event(), []

    def change(backend: Backend) -> Done:
        begun.set()
        backend.set_feature("work", "forward.web", "action=forward")
        done.append(True)
        return Done((), (), is_well=True)

    running.manager.board.change(change, done.append, done.append)
    assert begun.wait(BOUND_S)
    running.widget.close()
    until(lambda: running.ends)
    assert done == [True]
    running.manager.close()
    assert running.ends == ["ended"]


def test_a_start_while_a_change_is_not_done_shows_another_window_at_once(
    lab: LabDirectory, forward: Command
) -> None:
    """And the program ends only when that is done."""
    forward(*ADD)
    program = Program(Start(lambda: LabStore(lab), str(lab.root)))
    begun, may_end = threading.Event(), threading.Event()
    done: list[str] = []

    def change(_: Backend) -> Done:
        begun.set()
        assert may_end.wait(BOUND_S)
        done.append("changed")
        return Done((), (), is_well=True)

    def story() -> Iterator[None]:
        while (manager := program.manager) is None or not manager.widget.get_visible():
            yield
        manager.add()
        manager.board.change(change, fail, fail)
        assert begun.wait(BOUND_S)
        program.end()
        program.activate()
        another = program.manager
        assert another is not None
        assert another is not manager
        while another.board.look is None:
            yield
        assert another.widget.get_visible()
        program.end()
        for _ in range(20):  # in which a program would end that does not wait
            yield
        done.append("closed")
        may_end.set()

    def fail(_: object) -> None:
        raise AssertionError

    told = story()
    source = GLib.timeout_add(10, lambda: next(told, None) is None)
    assert program.run([]) == 0
    GLib.source_remove(source)
    assert done == ["closed", "changed"]


def test_each_system_has_a_window_of_its_own(other_store: Callable[[], Backend], tmp_path: object) -> None:
    ids = [
        Program(Start(other_store, lab)).get_application_id() for lab in (None, "/x/lab", "/x/../x/lab", "/y")
    ]
    assert ids[0] == APP_ID
    assert ids[1] == ids[2]
    assert len({*ids}) == 3
    assert all(id_.startswith(APP_ID) for id_ in ids)


def shown_window() -> Gtk.Window | None:
    """The main window of the program that runs, once it lists the rule."""
    for window in Gtk.Window.list_toplevels():
        if window.get_visible() and any("sys-firewall" in text for text in cells(window)):
            return window
    return None


def cells(window: Gtk.Window) -> Iterator[str]:
    for view in inside(window, Gtk.TreeView):
        yield from (row[2] for row in view.get_model())


def test_a_bug_in_what_gtk_calls_is_shown_and_ends_nothing(lab: LabDirectory, forward: Command) -> None:
    forward(*ADD)
    said: list[bool] = []

    def fail() -> bool:
        if shown_window() is None:
            return True
        GLib.timeout_add(10, close)
        raise KeyError("<b>x</b>")

    def close() -> bool:
        window = shown_window()
        assert window is not None
        said.append(any("KeyError: '<b>x</b>'" in text for text in texts(window)))
        os.kill(os.getpid(), signal.SIGTERM)
        return False

    GLib.timeout_add(10, fail)
    assert begin(Start(lambda: LabStore(lab), str(lab.root))) == 0
    assert said == [True]
    assert sys.excepthook is sys.__excepthook__
