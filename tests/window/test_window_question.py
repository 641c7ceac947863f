# SPDX-License-Identifier: GPL-2.0-or-later
"""A question changes nothing before somebody agrees, and says what became of it."""

import threading
from collections.abc import Callable, Iterator

import pytest
from helpers import BOUND_S
from mainloop import MainLoop
from panes import PROBE, Told, button, text
from screen import settle, until
from worlds import NOW

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.common.errors import RefusedError
from qubes_fwd_qrexec.window import widgets
from qubes_fwd_qrexec.window.dialogs.question import WAIT_S, Question
from qubes_fwd_qrexec.window.gtk import Gdk, Gtk
from qubes_fwd_qrexec.window.model.actions import Done
from qubes_fwd_qrexec.window.model.board import Board

DONE = Done(("done",), (), is_well=True)


class Job:
    """What is agreed to; it ends when the test says so, with what the test says."""

    def __init__(self, *results: Done | Exception) -> None:
        self._results = list(results)
        self._may_end = threading.Semaphore(0)
        self.begun = 0

    def __call__(self, backend: Backend) -> Done:
        self.begun += 1
        assert self._may_end.acquire(timeout=BOUND_S)
        result = self._results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    def end(self) -> None:
        self._may_end.release()


@pytest.fixture
def loop() -> MainLoop:
    return MainLoop(NOW)


@pytest.fixture
def board(other_store: Callable[[], Backend]) -> Iterator[Board]:
    board = Board(other_store, widgets.deliver, lambda _seconds, _call: lambda: None, lambda: NOW)
    yield board
    board.close()


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def question(board: Board, told: Told, loop: MainLoop) -> Iterator[Question]:
    question = Question(board, told, "A title", "_Do it", "bad", later=loop.later)
    question.body.add(widgets.label(PROBE))
    yield question
    question.close()


def opened(question: Question, job: Job) -> None:
    question.offer(job)
    question.open(None)
    question.widget.get_window().focus(Gdk.CURRENT_TIME)
    until(question.widget.has_toplevel_focus)


def is_open(question: Question) -> bool:
    return question.widget.get_visible()


def test_it_does_what_was_agreed_to_once_and_closes(question: Question, told: Told) -> None:
    job = Job(DONE)
    opened(question, job)
    assert PROBE in text(question.widget)
    yes = button(question.widget, "Do it")
    yes.clicked()
    until(lambda: job.begun)
    assert not yes.get_sensitive()
    yes.clicked()
    question.offer(job)
    assert not yes.get_sensitive()
    job.end()
    until(lambda: told)
    assert (told, job.begun, is_open(question)) == ([DONE], 1, False)


def test_an_error_keeps_it_open_and_the_next_try_may_go_well(question: Question, told: Told) -> None:
    job = Job(RefusedError(f"no {PROBE}"), DONE)
    opened(question, job)
    yes = button(question.widget, "Do it")
    yes.grab_focus()
    yes.clicked()
    job.end()
    until(lambda: f"no {PROBE}" in text(question.widget))
    assert (told, yes.get_sensitive()) == ([], True)
    assert question.widget.get_focus() is yes
    yes.clicked()
    until(lambda: job.begun == 2)
    assert "no" not in text(question.widget).split()
    job.end()
    until(lambda: told)
    assert not is_open(question)


@pytest.mark.parametrize("result", [DONE, RefusedError("no")])
def test_what_has_begun_is_told_of_after_the_dialog_was_closed(
    question: Question, told: Told, result: Done | Exception
) -> None:
    job = Job(result)
    opened(question, job)
    button(question.widget, "Do it").clicked()
    until(lambda: job.begun)
    question.close()
    job.end()
    until(lambda: told)
    assert told == [result]


def test_one_that_stays_keeps_what_is_not_well(board: Board, told: Told) -> None:
    question = Question(board, told, "A title", "_Do it", stays=True)
    job = Job(Done(("a line",), (PROBE,), is_well=False), DONE)
    opened(question, job)
    yes = button(question.widget, "Do it")
    yes.clicked()
    job.end()
    until(lambda: f"a line\n{PROBE}" in text(question.widget))
    assert (told, yes.get_sensitive()) == ([], True)
    yes.clicked()
    job.end()
    until(lambda: told)
    assert (told, is_open(question)) == ([DONE], False)


def test_the_button_can_be_renamed(question: Question) -> None:
    opened(question, Job())
    question.rename("_Open to anybody", "anybody")
    yes = button(question.widget, "Open to anybody")
    context = yes.get_style_context()
    assert (context.has_class("anybody"), context.has_class("bad")) == (True, False)


def test_nothing_is_done_while_nothing_is_offered_or_it_is_cancelled(question: Question, told: Told) -> None:
    job = Job()
    opened(question, job)
    question.offer(None)
    yes = button(question.widget, "Do it")
    assert not yes.get_sensitive()
    yes.clicked()
    question.offer(job)
    button(question.widget, "Cancel").clicked()
    settle()
    assert (job.begun, told, question.is_closed, is_open(question)) == (0, [], True, False)


def test_enter_agrees_to_nothing_and_escape_closes(question: Question) -> None:
    opened(question, job := Job())
    assert question.widget.get_default_widget() is None
    focused = question.widget.get_focus()
    assert isinstance(focused, Gtk.Button)
    assert focused is button(question.widget, "Cancel")
    question.widget.emit("close")
    settle()
    assert (job.begun, is_open(question)) == (0, False)


def test_it_is_as_high_as_what_it_asks_and_no_higher_than_a_small_screen(question: Question) -> None:
    opened(question, Job())
    low = question.widget.get_preferred_height()[0]
    question.body.add(widgets.label("line\n" * 10))
    question.body.show_all()
    question.fit()
    high = question.widget.get_preferred_height()[0]
    assert low + 100 < high
    question.body.add(widgets.label("line\n" * 200))
    question.body.show_all()
    question.fit()
    assert high < question.widget.get_preferred_height()[0] < 560
    question.close()


def test_what_is_shown_anew_can_be_agreed_to_after_a_second(
    question: Question, loop: MainLoop, told: Told
) -> None:
    first, second, third = Job(DONE), Job(DONE), Job(DONE)
    question.open(None)
    yes = button(question.widget, "Do it")
    question.ask("one port", first)
    loop.pass_time(WAIT_S / 2)
    question.ask("two ports", second)
    loop.pass_time(WAIT_S * 0.9)
    assert not yes.get_sensitive()
    loop.pass_time(WAIT_S * 0.1)
    assert yes.get_sensitive()
    # The same is shown, and based on something newer.
    question.ask("two ports", third)
    assert yes.get_sensitive()
    yes.clicked()
    third.end()
    until(lambda: told)
    assert (first.begun, second.begun, third.begun) == (0, 0, 1)


def test_what_was_withdrawn_can_be_agreed_to_a_second_after_it_comes_again(
    question: Question, loop: MainLoop
) -> None:
    question.open(None)
    yes = button(question.widget, "Do it")
    question.ask("one port", Job(DONE))
    question.withdraw()
    loop.pass_time(WAIT_S)
    assert not yes.get_sensitive()
    question.ask("one port", Job(DONE))
    assert not yes.get_sensitive()
    loop.pass_time(WAIT_S)
    assert yes.get_sensitive()


def test_it_follows_the_board_until_it_is_closed(question: Question, board: Board) -> None:
    told: list[None] = []
    question.follow(lambda: told.append(None))
    board.start()
    until(lambda: told)
    question.close()
    told.clear()
    other: list[None] = []
    board.subscribe(lambda: other.append(None))
    board.refresh()
    until(lambda: other)
    assert told == []
