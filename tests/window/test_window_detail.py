# SPDX-License-Identifier: GPL-2.0-or-later
"""The pane follows its rule: what it says is so, its buttons do what they say, and focus and place stay."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from answered import REPORT, listening
from answering import Answering
from detailpane import CLIENTS, KEY, PLAIN, Pane
from helpers import BOUND_S
from mainloop import MainLoop
from panes import PROBE, Heard, every, looked, of, plain, shown, text
from screen import settle, until
from test_status_clients import ONE, naming
from worlds import ADD, NOW, Command

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.states import Key
from qubes_fwd_qrexec.admin.views.tables import Check
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.window import detail as details
from qubes_fwd_qrexec.window.checklist import CheckList
from qubes_fwd_qrexec.window.gtk import Gtk
from qubes_fwd_qrexec.window.model.about import About
from qubes_fwd_qrexec.window.model.figures import Figures
from qubes_fwd_qrexec.window.model.look import Look


@pytest.fixture
def loop() -> MainLoop:
    return MainLoop(NOW)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def pane(other_store: Callable[[], Backend], loop: MainLoop, heard: Heard) -> Iterator[Pane]:
    pane = Pane(other_store, loop, heard)
    yield pane
    pane.close()


def test_without_a_rule_it_says_what_to_do(pane: Pane) -> None:
    assert pane.text == "Choose a forward to see its details."
    looked(pane.board)
    pane.detail.show(KEY)
    assert pane.is_settled
    assert pane.text == "Choose a forward to see its details."


def test_all_about_a_rule_is_shown(pane: Pane, forward: Command) -> None:
    forward(*ADD, "--expire", "1h")
    pane.show(KEY, "dom0 allows the call")
    said = pane.text
    assert said.startswith("work web\n● ")
    for words in (
        "Connections to port 80 of sys-net (outer side) from 192.168.0.0/16 reach port 8080 of work.",
        "sys-net, port 80",
        "✓ ok\nsources\n192.168.0.0/16 may connect, nobody else",
        "✓ ok\nexpiry\n2027-01-15 09:00",
    ):
        assert words in said
    assert "Choose a forward" not in said


def test_rule_and_policy_are_there_for_whoever_wants_them(
    pane: Pane, forward: Command, lab: LabDirectory
) -> None:
    forward(*ADD)
    pane.show(KEY, "dom0 allows the call")
    line = lab.feature("work", "forward.web") or ""
    assert line not in pane.text
    (expander,) = of(pane.detail.widget, Gtk.Expander)
    expander.set_expanded(True)
    settle()
    assert line in pane.text
    assert "qubes.ForwardTCP" in pane.text
    assert "sys-net: vm-config.fwd.work.web = " in pane.text


def test_it_follows_the_rule_and_shows_nothing_of_one_that_is_gone(pane: Pane, forward: Command) -> None:
    forward(*ADD)
    pane.show(KEY, "● ")
    forward("disable", "work", "web")
    looked(pane.board)
    pane.until("○ ", "'qvm-forward enable work web' opens it again.")
    assert "● " not in pane.text
    forward("remove", "work", "web")
    looked(pane.board)
    until(lambda: pane.text == "Choose a forward to see its details.")


def test_the_buttons_do_what_they_say(pane: Pane, forward: Command, heard: Heard) -> None:
    forward(*ADD, "--expire", "1h")
    pane.show(KEY, "dom0 allows the call")
    for words, call in (
        ("Edit…", ("edit", KEY)),
        ("Disable", ("disable", KEY)),
        ("+1 h", ("extend", KEY, 3600)),
        ("Diagnose…", ("diagnose", KEY)),
        ("Remove…", ("remove", [KEY])),
    ):
        heard.calls.clear()
        pane.button(words).clicked()
        assert heard.calls == [call]


def test_the_end_can_be_put_off_by_what_the_menu_has(pane: Pane, forward: Command, heard: Heard) -> None:
    forward(*ADD, "--expire", "1h")
    pane.show(KEY, "dom0 allows the call")
    (menu,) = of(pane.detail.widget, Gtk.MenuButton)
    items = menu.get_popup().get_children()
    assert [item.get_label() for item in items] == ["5 min", "1 h", "8 h"]
    for item in items:
        item.activate()
    assert heard.calls == [("extend", KEY, seconds) for seconds in (300, 3600, 8 * 3600)]


@pytest.mark.parametrize(
    ("options", "can"),
    [
        ((), {"Edit…", "Disable"}),
        (("--expire", "1h"), {"Edit…", "Disable", "+1 h", ""}),
        (("--disabled",), {"Edit…", "Enable"}),
    ],
)
def test_only_what_can_be_done_can_be_pressed(
    pane: Pane, forward: Command, options: tuple[str, ...], can: set[str]
) -> None:
    forward(*ADD, *options)
    pane.show(KEY, "policy")
    assert pane.can() & {"Edit…", "Enable", "Disable", "+1 h", "", "Confirm…"} == can
    assert {"Diagnose…", "Remove…"} <= pane.can()


def test_enabling_what_lets_in_anybody_is_marked_and_asks_first(pane: Pane, forward: Command) -> None:
    forward("add", "work", "80", "--from", "any", "--name", "web", "--disabled")
    pane.show(KEY, "policy")
    enable = pane.button("Enable…")
    assert enable.get_style_context().has_class("anybody")
    forward("set", "work", "web", "srchosts=10.0.0.0/8")
    pane.show(KEY, "10.0.0.0/8")
    assert enable.get_label() == "Ena_ble"
    assert not enable.get_style_context().has_class("anybody")


def test_a_suspended_rule_can_be_confirmed_here_and_at_its_finding(
    pane: Pane, forward: Command, lab: LabDirectory, heard: Heard
) -> None:
    forward(*ADD)
    lab.write_qube(replace(lab.qube("work"), netvm=QubeName("sys-net")))
    pane.show(KEY, "● STILL OPEN", "It should be closed but is still in force.")
    forward("apply")
    pane.show(KEY, "▲ SUSPENDED", "✖ stops\npath\n")
    assert "It should be closed" not in pane.text
    here, helps = (each for each in of(pane.detail.widget, Gtk.Button) if plain(each) == "Confirm…")
    here.clicked()
    assert heard.calls == [("confirm", KEY)]
    heard.calls.clear()
    assert helps.get_tooltip_text() == "qvm-forward confirm work web"
    helps.clicked()
    assert [(name, remedy.command) for name, remedy in heard.calls] == [
        ("remedy", "qvm-forward confirm work web")
    ]


def test_what_cannot_be_read_shows_its_text_and_can_be_removed(
    pane: Pane, lab: LabDirectory, heard: Heard
) -> None:
    lab.set_feature("work", "forward.web", PROBE)
    pane.show(KEY, "✖ ", "It opens nothing; 'qvm-forward remove' removes it.")
    (expander,) = of(pane.detail.widget, Gtk.Expander)
    expander.set_expanded(True)
    settle()
    assert PROBE in pane.text
    assert not {"Edit…", "Enable", "Disable", "+1 h", "Confirm…"} & pane.can()
    pane.button("Remove…").clicked()
    assert heard.calls == [("remove", [KEY])]


class ReadOnly(Answering):
    """A system that cannot be changed from here, with one client."""

    def __init__(self, lab: LabDirectory) -> None:
        super().__init__(lab, {PLAIN: listening(REPORT), CLIENTS: naming(ONE)})

    def read_only(self) -> str | None:
        return "this qube may only look"


def test_where_nothing_can_be_changed_the_buttons_say_why(
    lab: LabDirectory, over: Command, loop: MainLoop, heard: Heard
) -> None:
    lab.set_feature("sys-net", "service.qubes-forward-listener", "1")
    over(ReadOnly(lab), *ADD, "--expire", "1h")
    pane = Pane(lambda: ReadOnly(lab), loop, heard)
    looked(pane.board)
    pane.board.be_seen(True)
    pane.show(KEY, "1 client is connected:")
    assert pane.can() == {"Diagnose…"}
    assert pane.button("Disable").get_tooltip_text() == "this qube may only look"
    pane.close()


def test_a_fault_of_ours_is_said_in_place_of_the_rule(
    pane: Pane, forward: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward(*ADD)
    with monkeypatch.context() as patch:
        patch.setattr(details, "about", lambda *_: 1 / 0)
        pane.show(KEY, "this is a fault of the window itself")
        assert "Edit…" not in pane.text
    looked(pane.board)
    pane.until("dom0 allows the call")
    assert "fault" not in pane.text


def test_no_string_is_markup(pane: Pane, forward: Command, lab: LabDirectory) -> None:
    forward(*ADD, "--comment", PROBE)
    pane.show(KEY, "dom0 allows the call")
    (expander,) = of(pane.detail.widget, Gtk.Expander)
    expander.set_expanded(True)
    settle()
    assert f"comment={PROBE}" in pane.text
    for label in of(pane.detail.widget, Gtk.Label):
        assert not label.get_use_markup()


def test_every_control_has_a_name(pane: Pane, forward: Command) -> None:
    forward(*ADD, "--expire", "1h")
    pane.show(KEY, "dom0 allows the call")
    controls = [w for w in every(pane.detail.widget) if w.get_can_focus() and isinstance(w, Gtk.Button)]
    assert controls
    assert [w for w in controls if not w.get_accessible().get_name()] == []


def test_focus_and_place_stay_while_only_values_change(pane: Pane, forward: Command) -> None:
    forward(*ADD, "--expire", "1h")
    pane.window.resize(400, 300)
    pane.show(KEY, "dom0 allows the call")
    place = pane.detail.widget.get_vadjustment()
    until(lambda: place.get_upper() > place.get_page_size() + 100)
    pane.button("Remove…").grab_focus()
    settle()
    place.set_value(40)
    focus, at = pane.window.get_focus(), place.get_value()
    forward("set", "work", "web", "expire=+2h", "comment=x")
    looked(pane.board)
    pane.until("in 2 h")
    assert (pane.window.get_focus(), place.get_value()) == (focus, at)
    assert at == 40


def test_where_a_button_can_no_longer_be_pressed_the_focus_goes_to_one_that_opens_nothing(
    pane: Pane, forward: Command
) -> None:
    forward(*ADD)
    pane.show(KEY, "dom0 allows the call")
    pane.button("Disable").grab_focus()
    forward("disable", "work", "web")
    looked(pane.board)
    pane.until("○ ")
    assert pane.window.get_focus() is pane.button("Diagnose…")


def test_of_another_rule_nothing_can_be_done_before_it_is_shown(
    pane: Pane, forward: Command, heard: Heard
) -> None:
    forward(*ADD)
    forward("add", "personal", "81", "--from", "any", "--name", "wiki")
    pane.show(KEY, "dom0 allows the call")
    pane.detail.show((QubeName("personal"), "wiki"))
    assert not pane.button("Remove…").is_sensitive()
    pane.until("personal wiki", "dom0 allows the call")
    pane.button("Remove…").clicked()
    assert heard.calls == [("remove", [("personal", "wiki")])]


def test_what_was_computed_for_another_rule_is_not_taken_for_this_one(
    pane: Pane, forward: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward(*ADD)
    forward("add", "personal", "81", "--from", "any", "--name", "wiki")
    looked(pane.board)
    is_first_done, may_go_on, real = threading.Event(), threading.Event(), details.about

    def about(look: Look, figures: Figures | None, key: Key, now: float) -> About | None:
        if key != KEY:
            is_first_done.set()
            assert may_go_on.wait(BOUND_S)
        return real(look, figures, key, now)

    monkeypatch.setattr(details, "about", about)
    pane.detail.show(KEY)
    done: list[object] = []
    pane.board.compute(is_first_done.set, done.append, done.append, kind="after")
    assert is_first_done.wait(BOUND_S)
    is_first_done.clear()
    pane.detail.show((QubeName("personal"), "wiki"))
    assert is_first_done.wait(BOUND_S)
    settle()
    assert "work web" not in pane.text
    may_go_on.set()
    pane.until("personal wiki")


def test_two_checks_of_one_name_have_a_row_each() -> None:
    found = CheckList(Heard())  # type: ignore[arg-type]
    window = shown(found.widget)
    for _ in found.show([Check("in force", "ok", "at a"), Check("in force", "stops", "at b")]):
        pass
    assert text(found.widget).split("\n") == ["✓ ok", "in force", "at a", "✖ stops", "in force", "at b"]
    window.destroy()


def test_the_focus_can_be_given_to_it(pane: Pane, forward: Command) -> None:
    forward(*ADD)
    pane.show(KEY, "dom0 allows the call")
    pane.detail.focus()
    assert pane.window.get_focus() is pane.button("Edit…")


def test_the_picture_fits_the_width(pane: Pane, forward: Command) -> None:
    forward(*ADD)
    pane.window.resize(1000, 700)
    pane.show(KEY, "dom0 allows the call")
    until(lambda: "+---" in pane.text)
    pane.window.resize(380, 700)
    until(lambda: "+---" not in pane.text)
    assert "sys-net, port 80" in pane.text
    assert pane.detail.widget.get_allocated_width() == 380


def test_a_pane_that_is_gone_follows_nothing(pane: Pane, forward: Command) -> None:
    forward(*ADD)
    looked(pane.board)
    pane.detail.show(KEY)
    pane.window.destroy()
    looked(pane.board)
    assert pane.is_settled


def test_it_can_be_walked_by_keyboard(pane: Pane, forward: Command) -> None:
    forward(*ADD, "--expire", "1h")
    pane.show(KEY, "dom0 allows the call")
    pane.button("Edit…").grab_focus()
    found: list[str] = []
    for _ in range(6):
        focus = pane.window.get_focus()
        if isinstance(focus, Gtk.Button):
            labels = of(focus, Gtk.Label)
            found.append(labels[0].get_text() if labels else focus.get_accessible().get_name())
        pane.window.child_focus(Gtk.DirectionType.TAB_FORWARD)
    assert found[:6] == ["Edit…", "Disable", "+1 h", "Extend it by…", "Diagnose…", "Remove…"]
