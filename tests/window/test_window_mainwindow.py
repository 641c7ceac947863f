# SPDX-License-Identifier: GPL-2.0-or-later
"""The main window over both backends: what it shows of the system, and what keys and buttons ask for."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from onscreen import CONTROL, focused, inside, press, pressable, texts
from screen import settle, until
from worlds import ADD, NOW, Command

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.window.gtk import Gdk, Gtk
from qubes_fwd_qrexec.window.mainwindow import WIDE, MainWindow
from qubes_fwd_qrexec.window.model.board import Board
from qubes_fwd_qrexec.window.widgets import deliver, later

WEB = ("work", "web")


class Asked:
    """In the place of the application: what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: self.calls.append((name, *args))


class Shown:
    def __init__(self, open_backend: Callable[[], Backend], now: Callable[[], float]) -> None:
        self.asked = Asked()
        self.board = Board(open_backend, deliver, later, now)
        self.window = MainWindow(self.board, self.asked, lambda: self.asked.calls.append(("quit",)))
        self.board.subscribe(self.window.show)
        self.widget = self.window.widget
        self.widget.resize(1280, 700)
        self.widget.show()
        focused(self.widget)

    def look(self) -> None:
        """What the system is now."""
        was = self.board.look, self.board.trouble
        self.board.refresh()
        until(lambda: (self.board.look, self.board.trouble) != was)
        settle()

    @property
    def view(self) -> Gtk.TreeView:
        (view,) = inside(self.widget, Gtk.TreeView)
        return view

    def rows(self) -> list[str]:
        """The first column of all rows, as soon as they are there."""
        found: list[str] = []
        self.view.get_model().foreach(lambda model, _, place: found.append(model[place][1]))
        return found

    def select(self, *place: int) -> None:
        self.view.set_cursor(Gtk.TreePath.new_from_indices(place))
        settle()


@pytest.fixture
def clock() -> list[float]:
    return [float(NOW)]


@pytest.fixture
def shown(other_store: Callable[[], Backend], clock: list[float]) -> Iterator[Shown]:
    made = Shown(other_store, lambda: clock[0])
    yield made
    made.board.close()
    made.widget.destroy()
    settle()


def test_until_the_first_look_it_says_that_it_looks(shown: Shown) -> None:
    assert "Reading the qubes…" in texts(shown.widget)
    assert [*inside(shown.widget, Gtk.TreeView)] == []
    (spinner,) = inside(shown.widget, Gtk.Spinner)
    assert spinner.props.active


def test_where_nothing_can_be_read_it_says_why_and_looks_again(clock: list[float], lab: LabDirectory) -> None:
    def fail() -> Backend:
        raise StoreError("<b>qubesd</b> is gone")

    shown = Shown(fail, lambda: clock[0])
    shown.look()
    found = texts(shown.widget)
    assert "What is open is unknown" in found
    assert "<b>qubesd</b> is gone" in found
    assert pressable(shown.widget, "Close everything…").get_sensitive()
    pressable(shown.widget, "Reload").clicked()
    shown.board.close()
    shown.widget.destroy()
    settle()


def test_where_nothing_is_forwarded_it_offers_to_add(shown: Shown) -> None:
    shown.look()
    assert "Nothing on this machine can be reached" in texts(shown.widget)
    pressable(shown.widget, "Add a forward…").clicked()
    pressable(shown.widget, "Add…").clicked()
    assert shown.asked.calls == [("add",), ("add",)]


NOTHING = "Nothing on this machine can be reached"


def test_where_no_rule_is_left_of_what_is_in_force_it_does_not_say_that_nothing_can_be_reached(
    shown: Shown, forward: Command, lab: LabDirectory
) -> None:
    forward(*ADD)
    lab.remove_feature("work", "forward.web")
    shown.look()
    said = texts(shown.widget)
    assert "1 port is open. 1 forward should be closed and is still in force." in said
    assert "There are no rules" in said
    assert NOTHING not in said
    pressable(shown.widget, "Add a forward…").clicked()
    assert shown.asked.calls == [("add",)]
    forward("apply")
    shown.look()
    assert NOTHING in texts(shown.widget)


def test_where_not_all_could_be_read_it_does_not_say_that_nothing_can_be_reached(
    shown: Shown,
) -> None:
    shown.look()
    assert NOTHING in texts(shown.widget)
    assert shown.board.look is not None
    snapshot = shown.board.look.snapshot
    snapshot = snapshot._replace(installed=snapshot.installed._replace(problem="no policy file"))
    shown.board.look = replace(shown.board.look, snapshot=snapshot)
    shown.window.show()
    until(lambda: "There are no rules" in texts(shown.widget))
    assert NOTHING not in texts(shown.widget)


def test_where_what_is_shown_may_be_old_it_does_not_say_that_nothing_can_be_reached(
    shown: Shown, lab: LabDirectory
) -> None:
    shown.look()
    lab.qubes_dir.rename(lab.root / "away")
    shown.board.refresh()
    until(lambda: "There are no rules" in texts(shown.widget))
    assert NOTHING not in texts(shown.widget)
    (lab.root / "away").rename(lab.qubes_dir)
    shown.board.refresh()
    until(lambda: NOTHING in texts(shown.widget))


def test_rules_are_listed_by_target(shown: Shown, forward: Command) -> None:
    forward(*ADD)
    forward("add", "personal", "81", "--from", "any")
    shown.look()
    assert shown.rows() == ["personal", "● OPEN", "work", "● OPEN"]
    forward("remove", "personal", "tcp-81")
    shown.look()
    assert shown.rows() == ["work", "● OPEN"]


def test_what_is_chosen_is_told_in_detail(shown: Shown, forward: Command) -> None:
    forward(*ADD)
    shown.look()
    shown.select(0, 0)
    until(lambda: "work web" in texts(shown.widget))
    shown.select(0)
    assert "Add a forward to this qube…" in texts(shown.widget)
    pressable(shown.widget, "Add a forward to this qube…").clicked()
    assert shown.asked.calls == [("add", "work")]


def test_enter_goes_to_what_stands_beside_and_changes_nothing(shown: Shown, forward: Command) -> None:
    forward(*ADD)
    shown.look()
    shown.select(0)
    press(shown.view, Gdk.KEY_Return)
    assert shown.widget.get_focus() is pressable(shown.widget, "Add a forward to this qube…")
    assert shown.asked.calls == []


def test_ended_rules_can_be_removed_at_once(shown: Shown, forward: Command, clock: list[float]) -> None:
    forward(*ADD, "--expire", "+1h")
    forward("add", "personal", "81", "--from", "any", "--expire", "+1h")
    forward("add", "personal", "82", "--from", "any")
    clock[0] += 7200
    forward("apply", now=clock[0])
    shown.look()
    assert shown.rows()[:3] == ["personal", "● OPEN", "2 ended"]
    shown.select(1)
    assert "2 forwards have ended" in texts(shown.widget)
    pressable(shown.widget, "Remove all…").clicked()
    press(shown.view, Gdk.KEY_Delete)
    (first, second) = shown.asked.calls
    assert first == second == ("remove", (("personal", "tcp-81"), ("work", "web")))


def test_delete_asks_to_remove_the_chosen_rule_and_no_whole_qube(shown: Shown, forward: Command) -> None:
    forward(*ADD)
    shown.look()
    shown.select(0)
    press(shown.view, Gdk.KEY_Delete)
    assert shown.asked.calls == []
    shown.select(0, 0)
    press(shown.view, Gdk.KEY_Delete)
    assert shown.asked.calls == [("remove", [WEB])]


def test_keys(shown: Shown, forward: Command) -> None:
    forward(*ADD)
    shown.look()
    press(shown.view, Gdk.KEY_n, CONTROL)
    press(shown.view, Gdk.KEY_q, CONTROL)
    assert shown.asked.calls == [("add",), ("quit",)]
    press(shown.view, Gdk.KEY_f, CONTROL)
    (search,) = inside(shown.widget, Gtk.SearchEntry)
    assert shown.widget.get_focus() is search
    look = shown.board.look
    press(search, Gdk.KEY_F5)
    until(lambda: shown.board.look is not look)


def test_a_search_that_finds_nothing_says_so_and_escape_ends_it(shown: Shown, forward: Command) -> None:
    forward(*ADD)
    shown.look()
    (search,) = inside(shown.widget, Gtk.SearchEntry)
    search.set_text("nowhere")
    until(lambda: "No forward matches the filter" in texts(shown.widget))
    press(search, Gdk.KEY_Escape)
    assert search.get_text() == ""
    assert shown.rows() == ["work", "● OPEN"]
    assert shown.widget.get_focus() is shown.view


def test_a_rule_that_is_to_be_shown_is_found_whatever_the_filters_are(shown: Shown, forward: Command) -> None:
    forward(*ADD)
    shown.look()
    (search,) = inside(shown.widget, Gtk.SearchEntry)
    search.set_text("nowhere")
    until(lambda: "No forward matches the filter" in texts(shown.widget))
    shown.window.choose(WEB)
    until(lambda: [*inside(shown.widget, Gtk.TreeView)])
    until(lambda: shown.view.get_selection().get_selected()[1] is not None)
    tree, place = shown.view.get_selection().get_selected()
    assert tree[place][0] == WEB


def test_the_menu_of_a_rule_has_what_can_be_done_with_it(shown: Shown, forward: Command) -> None:
    forward(*ADD)
    shown.look()
    shown.select(0, 0)
    shown.view.emit("popup-menu")
    menu = Gtk.Menu.get_for_attach_widget(shown.view)[-1]
    assert [item.get_label() for item in menu.get_children()] == [
        *("_Edit…", "_Disable", "Cu_t all connections…", "Dia_gnose", "_Remove…")
    ]
    for item in menu.get_children():
        item.activate()
    assert shown.asked.calls == [
        *(("edit", WEB), ("disable", WEB), ("cut", WEB, None), ("diagnose", WEB), ("remove", [WEB]))
    ]


def test_where_nothing_can_be_changed_no_button_changes_anything(shown: Shown, forward: Command) -> None:
    forward(*ADD)
    shown.look()
    assert shown.board.look is not None
    shown.board.look = replace(shown.board.look, read_only="this qube may only read")
    shown.window.show()
    shown.select(0, 0)
    add = pressable(shown.widget, "Add…")
    assert not add.get_sensitive()
    assert add.get_tooltip_text() == "this qube may only read"
    assert "Nothing can be changed from here: this qube may only read." in texts(shown.widget)
    press(shown.view, Gdk.KEY_Delete)
    press(shown.view, Gdk.KEY_n, CONTROL)
    assert shown.asked.calls == []
    shown.view.emit("popup-menu")
    menu = Gtk.Menu.get_for_attach_widget(shown.view)[-1]
    assert [item.get_label() for item in menu.get_children() if item.get_sensitive()] == ["Dia_gnose"]


def test_a_button_tells_its_key(shown: Shown) -> None:
    shown.look()
    assert pressable(shown.widget, "Add…").get_tooltip_text() == "A new forward (Ctrl+N)"


def test_everything_can_be_closed_at_any_time(shown: Shown) -> None:
    pressable(shown.widget, "Close everything…").clicked()
    assert shown.asked.calls == [("close_everything",)]


def test_the_bars_go_their_ways(shown: Shown, forward: Command) -> None:
    forward(*ADD)
    forward("panic")
    shown.look()
    pressable(shown.widget, "Resume…").clicked()
    assert shown.asked.calls == [("resume",)]


def test_the_details_are_beside_the_list_or_below_it(shown: Shown, forward: Command) -> None:
    forward(*ADD)
    shown.look()
    (paned,) = inside(shown.widget, Gtk.Paned)
    for width, height, wanted, wanted_share in (
        (WIDE, 700, Gtk.Orientation.HORIZONTAL, 0.6),
        (800, 600, Gtk.Orientation.VERTICAL, 0.42),
        (3840, 2160, Gtk.Orientation.HORIZONTAL, 0.6),
    ):
        shown.widget.resize(width, height)
        until(lambda wanted=wanted: paned.get_orientation() is wanted)
        until(lambda size=(width, height): shown.widget.get_size() == size)
        until(lambda wanted_share=wanted_share: abs(share(paned) - wanted_share) < 0.05)


def test_below_the_list_the_buttons_take_less_height(shown: Shown, forward: Command) -> None:
    forward(*ADD)
    shown.look()
    shown.select(0, 0)
    until(lambda: "work web" in texts(shown.widget))

    def rows() -> int:
        (grid,) = (
            each
            for each in inside(shown.widget, Gtk.Grid)
            if pressable(shown.widget, "Edit…") in each.get_children()
        )
        return len({grid.child_get_property(each, "top-attach") for each in grid.get_children()})

    for width, wanted in ((1280, 3), (800, 2), (1280, 3)):
        shown.widget.resize(width, 700)
        until(lambda wanted=wanted: rows() == wanted)


def share(paned: Gtk.Paned) -> float:
    is_wide = paned.get_orientation() is Gtk.Orientation.HORIZONTAL
    room = paned.get_allocated_width() if is_wide else paned.get_allocated_height()
    return paned.get_position() / room


def test_where_the_list_goes_the_focus_goes_to_what_takes_its_place(shown: Shown, forward: Command) -> None:
    forward(*ADD)
    shown.look()
    shown.select(0, 0)
    assert shown.view.is_focus()
    forward("remove", "work", "web")
    shown.look()
    assert pressable(shown.widget, "Add a forward…").is_focus()


def test_while_nothing_fits_what_is_searched_for_the_focus_stays_there(
    shown: Shown, forward: Command
) -> None:
    forward(*ADD)
    shown.look()
    (search,) = inside(shown.widget, Gtk.SearchEntry)
    search.grab_focus()
    search.set_text("nobody")
    until(lambda: "No forward matches the filter" in texts(shown.widget))
    settle()
    assert search.is_focus()
