# SPDX-License-Identifier: GPL-2.0-or-later
"""The pane follows its rule: what it says is so, its buttons do what they say, and focus and place stay."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from answered import REPORT, listening
from answering import Answering
from helpers import BOUND_S
from mainloop import MainLoop
from panes import PROBE, Heard, button, every, looked, of, plain, shown, text
from screen import settle, until
from test_status_clients import ONE, naming
from worlds import ADD, NOW, Command

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.states import Key
from qubes_fwd_qrexec.admin.views.connected import Client
from qubes_fwd_qrexec.admin.views.tables import Check
from qubes_fwd_qrexec.common.report import ForwardReport
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.window import detail as details
from qubes_fwd_qrexec.window import widgets
from qubes_fwd_qrexec.window.about import About
from qubes_fwd_qrexec.window.board import FIGURES_S, Board
from qubes_fwd_qrexec.window.checklist import CheckList
from qubes_fwd_qrexec.window.clientlist import SHOWN_MAX
from qubes_fwd_qrexec.window.clientlist import words as client_words
from qubes_fwd_qrexec.window.detail import Detail
from qubes_fwd_qrexec.window.figures import Figures
from qubes_fwd_qrexec.window.gtk import Gtk
from qubes_fwd_qrexec.window.look import Look

KEY: Key = (QubeName("work"), "web")
PLAIN, CLIENTS = ("sys-net", "qubes.ForwardStatus+"), ("sys-net", "qubes.ForwardStatus+clients")


@pytest.fixture
def loop() -> MainLoop:
    return MainLoop(NOW)


@pytest.fixture
def heard() -> Heard:
    return Heard()


class Pane:
    """A pane in a window, over a board that does not follow by itself."""

    def __init__(self, open_backend: Callable[[], Backend], loop: MainLoop, heard: Heard) -> None:
        self.loop = loop
        self.board = Board(open_backend, widgets.deliver, loop.later, lambda: loop.now)
        self.detail = Detail(self.board, heard)  # type: ignore[arg-type]
        self.window = shown(self.detail.widget)

    @property
    def text(self) -> str:
        return text(self.detail.widget)

    def button(self, words: str) -> Gtk.Button:
        return button(self.detail.widget, words)

    def show(self, key: Key | None, *words: str) -> None:
        """Look anew and show a rule, until all that is said is there."""
        looked(self.board)
        self.detail.show(key)
        self.until(*words)

    def until(self, *words: str) -> None:
        until(lambda: all(each in self.text for each in words) and self.is_settled)

    @property
    def is_settled(self) -> bool:
        """Whether the worker has nothing left to compute."""
        done: list[object] = []
        self.board.compute(lambda: None, done.append, done.append, kind="settled")
        until(lambda: done)
        settle()
        return True

    def can(self) -> set[str]:
        """What can be pressed."""
        found = of(self.detail.widget, Gtk.Button)
        return {(of(each, Gtk.Label) or [Gtk.Label()])[0].get_text() for each in found if each.is_sensitive()}

    def close(self) -> None:
        self.window.destroy()
        self.board.close()


@pytest.fixture
def pane(other_store: Callable[[], Backend], loop: MainLoop, heard: Heard) -> Iterator[Pane]:
    pane = Pane(other_store, loop, heard)
    yield pane
    pane.close()


class Listening:
    """A lab whose sys-net says who is connected, and a pane over it."""

    def __init__(self, lab: LabDirectory, over: Command, loop: MainLoop, heard: Heard, count: int) -> None:
        lab.set_feature("sys-net", "service.qubes-forward-listener", "1")
        self.backend = Answering(lab, {})
        self.connect(*range(1000, 1000 + count))
        over(self.backend, *ADD)
        self.pane = Pane(lambda: self.backend, loop, heard)
        looked(self.pane.board)
        self.pane.detail.show(KEY)
        self.pane.board.be_seen(True)

    def connect(self, *ports: int) -> None:
        """Let clients be connected from these ports."""
        clients = (replace(ONE, port=port) for port in ports)
        report: ForwardReport = replace(REPORT, connections=len(ports))
        self.backend.says |= {PLAIN: listening(report), CLIENTS: naming(*clients)}

    def ask(self) -> None:
        """Have the qubes asked again."""
        was = self.pane.board.figures
        self.pane.loop.pass_time(FIGURES_S)
        until(lambda: self.pane.board.figures is not was)


@pytest.fixture
def listen(
    lab: LabDirectory, over: Command, loop: MainLoop, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int], Listening]]:
    made: list[Listening] = []

    def make(count: int) -> Listening:
        made.append(Listening(lab, over, loop, heard, count))
        return made[-1]

    monkeypatch.setattr(time, "monotonic", lambda: loop.now)
    yield make
    for each in made:
        each.pane.close()


def test_without_a_rule_it_says_what_to_do(pane: Pane) -> None:
    assert pane.text == "Choose a forward to see all about it."
    looked(pane.board)
    pane.detail.show(KEY)
    assert pane.is_settled
    assert pane.text == "Choose a forward to see all about it."


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
    until(lambda: pane.text == "Choose a forward to see all about it.")


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
    pane.show(KEY, "● STILL OPEN", "It should be closed, and is still in force.")
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
    pane.show(KEY, "✖ ", "It opens nothing; 'qvm-forward remove' takes it away.")
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


def test_clients_are_shown_and_cut(listen: Callable[[int], Listening], heard: Heard) -> None:
    found = listen(2)
    found.pane.until("2 clients are connected:", "192.168.0.5:1001 at sys-net (tcp) since ")
    names = [each.get_accessible().get_name() for each in of(found.pane.detail.widget, Gtk.Button)]
    assert "Cut 192.168.0.5:1000" in names
    cut = [each for each in of(found.pane.detail.widget, Gtk.Button) if each.get_label() == "Cut…"]
    cut[1].clicked()
    ((name, key, client),) = heard.calls
    assert (name, key, client.report.port) == ("cut", KEY, 1001)
    heard.calls.clear()
    found.pane.button("Cut all…").clicked()
    assert heard.calls == [("cut", KEY, None)]


def test_a_client_that_may_finish_is_said_to() -> None:
    client = Client(QubeName("sys-net"), replace(ONE, is_draining=True))
    assert client_words(client) == (
        "192.168.0.5:50000 at sys-net (tcp) may finish; 999 from it, 1.5 KiB to it, quiet for 3 s"
    )


def test_thousands_of_clients_are_counted(listen: Callable[[int], Listening]) -> None:
    found = listen(2000)
    found.pane.until("2000 clients are connected:", f"and {2000 - SHOWN_MAX} more")
    cuts = [each for each in of(found.pane.detail.widget, Gtk.Button) if each.get_label() == "Cut…"]
    assert len(cuts) == SHOWN_MAX


def test_a_client_that_stays_keeps_the_focus(listen: Callable[[int], Listening]) -> None:
    found = listen(3)
    found.pane.until("3 clients are connected:")
    named = {each.get_accessible().get_name(): each for each in of(found.pane.detail.widget, Gtk.Button)}
    named["Cut 192.168.0.5:1001"].grab_focus()
    found.connect(1002, 1001)
    found.ask()
    found.pane.until("2 clients are connected:")
    assert found.pane.window.get_focus() is named["Cut 192.168.0.5:1001"]
    found.connect()
    found.ask()
    until(lambda: "connected" not in found.pane.text)
    assert found.pane.window.get_focus() is not None


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
    assert found[:6] == ["Edit…", "Disable", "+1 h", "Let it end later", "Diagnose…", "Remove…"]
