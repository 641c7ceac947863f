# SPDX-License-Identifier: GPL-2.0-or-later
"""Before the hold is lifted all is shown that opens again, and nothing else opens."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
from faulty import allowed, is_held
from looks import look
from panes import Told, button, looked, of, plain, text
from screen import settle, until
from worlds import NOW, Command, rule

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.views.times import print_time
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.window import widgets
from qubes_fwd_qrexec.window.dialogs.resuming import Resuming
from qubes_fwd_qrexec.window.gtk import Gtk
from qubes_fwd_qrexec.window.model.board import Board
from qubes_fwd_qrexec.window.model.reopening import SHOWN_MAX, reopening


def test_what_opens_is_told_with_that_to_anybody_first() -> None:
    rules = rule("srchosts=192.168.0.0/16", name="lan"), rule(f"srcports=81 expire={NOW + 60}", name="web")
    found = reopening(look(*rules, is_held=True), NOW)
    assert found is not None
    assert (found.head, found.is_anybody) == ("2 forwards open again. 1 of them to anybody.", True)
    web, lan = found.lines
    assert web.startswith("work web: ")
    assert web.endswith(f" It ends at {print_time(NOW + 60)}.")
    assert lan.startswith("work lan: ")
    assert lan.endswith(" It stays open until you end it.")
    assert [forward.named.name for forward in found.plan.live] == ["lan", "web"]


def test_many_are_counted() -> None:
    rules = (rule(f"srcports={1000 + n} srchosts=10.0.0.0/8", name=f"r{n:03}") for n in range(SHOWN_MAX + 2))
    found = reopening(look(*rules, is_held=True), NOW)
    assert found is not None
    assert (found.head, found.is_anybody) == (f"{SHOWN_MAX + 2} forwards open again.", False)
    assert (len(found.lines), found.lines[-1]) == (SHOWN_MAX + 1, "and 2 more")


def test_a_long_sentence_is_cut() -> None:
    many = ",".join(f"10.{n}.0.0/16" for n in range(200))
    found = reopening(look(rule(f"srchosts={many}"), is_held=True), NOW)
    assert found is not None
    assert [len(line) < 600 for line in found.lines] == [True]


def test_that_nothing_opens_is_said_and_without_a_hold_there_is_nothing_to_resume() -> None:
    found = reopening(look(rule("enabled=no"), is_held=True), NOW)
    assert found is not None
    assert (found.head, found.lines) == ("Nothing opens.", ())
    assert reopening(look(rule()), NOW) is None


class Later:
    """Timers that a test lets go off."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def __call__(self, seconds: float, call: Callable[[], None]) -> Callable[[], None]:
        self.calls.append(call)
        return partial(self._cancel, call)

    def _cancel(self, call: Callable[[], None]) -> None:
        if call in self.calls:
            self.calls.remove(call)

    def pass_by(self) -> None:
        calls, self.calls = self.calls, []
        for call in calls:
            call()


class Case:
    def __init__(self, other_store: Callable[[], Backend]) -> None:
        self.later = Later()
        self.told = Told()
        self.board = Board(other_store, widgets.deliver, lambda _seconds, _call: lambda: None, lambda: NOW)
        looked(self.board)
        self.dialog = Resuming(self.board, self.told, later=self.later)

    def open(self) -> None:
        """Returns when the dialog has had the board look as often as it does when it is opened."""
        looks = [self.board.look]
        end = self.board.subscribe(lambda: looks.append(self.board.look))
        self.dialog.open(None)
        until(lambda: len({id(look) for look in looks}) == 3 and self.later.calls)
        end()

    @property
    def is_open(self) -> bool:
        return self.dialog.widget.get_visible()

    @property
    def may_resume(self) -> bool:
        return self.button.get_sensitive()

    @property
    def button(self) -> Gtk.Button:
        """The one that resumes."""
        (found,) = (each for each in of(self.dialog.widget, Gtk.Button) if plain(each).startswith("Resume"))
        return found

    def resume(self) -> None:
        self.button.clicked()

    @property
    def text(self) -> str:
        return text(self.dialog.widget)


@pytest.fixture
def case(opened: LabDirectory, forward: Command, other_store: Callable[[], Backend]) -> Iterator[Case]:
    """Two forwards are held, one of them to anybody."""
    forward("panic")
    case = Case(other_store)
    yield case
    case.dialog.widget.destroy()
    case.board.close()
    settle()


def test_it_opens_what_it_shows_after_a_second(case: Case, opened: LabDirectory) -> None:
    case.open()
    assert "2 forwards open again. 1 of them to anybody." in case.text
    assert "personal tcp-81: Connections to port 81 of sys-net" in case.text
    assert not case.may_resume
    assert is_held(opened)
    case.later.pass_by()
    assert case.may_resume
    case.resume()
    until(lambda: case.told)
    assert (case.is_open, is_held(opened), len(allowed(opened))) == (False, False, 2)
    assert case.told[0].is_well
    assert case.told[0].lines[0] == "Nothing is held any more. Open again:"


def test_all_that_opens_is_shown_however_many_they_are(case: Case, opened: LabDirectory) -> None:
    line = opened.feature("work", "forward.web") or ""
    for port in range(1000, 1040):
        opened.set_feature("work", f"forward.r{port}", line.replace("srcports=80-80", f"srcports={port}"))
    case.open()
    assert "42 forwards open again." in case.text
    assert all(
        f"work r{port}: Connections to port {port} of sys-net" in case.text for port in range(1000, 1040)
    )


def test_that_it_opens_to_anybody_is_on_the_button(case: Case, forward: Command) -> None:
    case.open()
    context = case.button.get_style_context()
    assert (plain(case.button), context.has_class("anybody")) == ("Resume: open to anybody", True)
    forward("remove", "personal", "tcp-81")
    looked(case.board)
    until(lambda: "1 forward opens again." in case.text)
    assert (plain(case.button), context.has_class("anybody")) == ("Resume", False)


def test_what_changes_meanwhile_is_shown_and_not_agreed_to_at_once(case: Case, forward: Command) -> None:
    case.open()
    case.later.pass_by()
    forward("set", "work", "web", "srchosts=any")
    looked(case.board)
    until(lambda: "2 of them to anybody" in case.text)
    assert not case.may_resume
    case.later.pass_by()
    assert case.may_resume


def test_the_second_begins_anew_with_each_change(case: Case, forward: Command) -> None:
    case.open()
    forward("set", "work", "web", "srchosts=any")
    looked(case.board)
    until(lambda: "2 of them to anybody" in case.text)
    assert len(case.later.calls) == 1


def test_what_has_changed_and_is_not_shown_yet_does_not_open(
    case: Case, forward: Command, opened: LabDirectory
) -> None:
    case.open()
    case.later.pass_by()
    forward("set", "work", "web", "srchosts=any")
    case.resume()
    until(lambda: "nothing was opened: work web would not open as you were shown" in case.text)
    assert is_held(opened)
    until(lambda: "2 of them to anybody" in case.text)
    case.later.pass_by()
    case.resume()
    until(lambda: case.told)
    assert not is_held(opened)


def test_what_changes_without_words_can_be_agreed_to_as_before(
    case: Case, forward: Command, opened: LabDirectory
) -> None:
    case.open()
    case.later.pass_by()
    forward("set", "work", "web", "limits=rate:7")
    looked(case.board)
    done: list[object] = []
    case.board.compute(lambda: None, done.append, done.append, kind="after")
    until(lambda: done)
    assert case.may_resume
    case.resume()
    until(lambda: case.told)
    assert not is_held(opened)


def test_it_closes_when_somebody_else_has_resumed(case: Case, forward: Command) -> None:
    case.open()
    forward("resume")
    looked(case.board)
    until(lambda: not case.is_open)
    assert (case.told, case.later.calls) == ([], [])


def test_a_look_from_before_the_hold_does_not_close_it(
    opened: LabDirectory, forward: Command, other_store: Callable[[], Backend]
) -> None:
    """As where panic has just ended, and the window has not seen that yet."""
    case = Case(other_store)
    forward("panic")
    case.dialog.open(None)
    assert "Reading the system…" in case.text
    until(lambda: "2 forwards open again." in case.text)
    case.later.pass_by()
    assert case.may_resume
    case.dialog.widget.destroy()
    case.board.close()


def test_where_nothing_is_held_it_closes(opened: LabDirectory, other_store: Callable[[], Backend]) -> None:
    case = Case(other_store)
    case.dialog.open(None)
    until(lambda: not case.is_open)
    case.board.close()


def test_cancelling_opens_nothing(case: Case, opened: LabDirectory) -> None:
    case.open()
    button(case.dialog.widget, "Cancel").clicked()
    until(lambda: not case.is_open)
    assert is_held(opened)
    looked(case.board)
