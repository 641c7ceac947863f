# SPDX-License-Identifier: GPL-2.0-or-later
"""The board follows a system, and asks its qubes only while it is seen."""

from collections.abc import Callable, Iterator
from threading import Event
from typing import Any

import pytest
from helpers import BOUND_S
from mainloop import MainLoop
from worlds import NOW, Command

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.states import State
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.store import LabStore
from qubes_fwd_qrexec.window.model import board as boards
from qubes_fwd_qrexec.window.model import figures
from qubes_fwd_qrexec.window.model.board import FIGURES_S, LOOK_TIMEOUT_S, Board
from qubes_fwd_qrexec.window.model.figures import Figures
from qubes_fwd_qrexec.window.model.look import Look


@pytest.fixture
def loop() -> MainLoop:
    return MainLoop(NOW)


class Asked:
    """In the place of what asks qubes, which none of these labs has."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.error: Exception | None = None

    def __call__(self, backend: Backend, look: object, now: float) -> Figures:
        self.times.append(now)
        if self.error is not None:
            raise self.error
        return Figures(now, None)  # type: ignore[arg-type]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, loop: MainLoop) -> Asked:
    asked = Asked()
    monkeypatch.setattr(figures, "ask", asked)
    monkeypatch.setattr(boards.time, "monotonic", lambda: loop.now)
    return asked


@pytest.fixture
def board(loop: MainLoop, other_store: Callable[[], Backend], asked: Asked) -> Iterator[Board]:
    """Not started, so that no news come."""
    board = Board(other_store, loop.deliver, loop.later, lambda: loop.now)
    yield board
    board.close()


def states(board: Board) -> list[State]:
    assert board.look is not None
    return [forward.state for forward in board.look.plan]


def looked(board: Board, loop: MainLoop) -> None:
    was = board.look
    board.refresh()
    loop.until(lambda: board.look is not was)


def test_whoever_subscribed_is_told_of_each_look(board: Board, loop: MainLoop) -> None:
    told: list[int] = []
    end = board.subscribe(lambda: told.append(1))
    looked(board, loop)
    looked(board, loop)
    assert len(told) == 2
    end()
    looked(board, loop)
    assert len(told) == 2


def test_it_follows_a_system(loop: MainLoop, lab: LabDirectory, asked: Asked) -> None:
    board = Board(lambda: LabStore(lab), loop.deliver, loop.later, lambda: loop.now)
    board.start()
    loop.until(lambda: board.look is not None)
    assert states(board) == []
    lab.set_feature("work", "forward.web", "action=forward srcports=80 srchosts=any owner=work")
    loop.until(lambda: states(board) == [State.ACTIVE])
    board.close()


def test_a_change_is_followed_by_a_look(board: Board, loop: MainLoop, forward: Command) -> None:
    looked(board, loop)
    done: list[str] = []

    def change(backend: Backend) -> str:
        forward("add", "work", "80", "--from", "any")
        return "added"

    board.change(change, done.append, lambda error: done.append(str(error)))
    loop.until(lambda: states(board) == [State.ACTIVE])
    assert done == ["added"]


def test_a_change_that_fails_is_told_and_followed_by_a_look(board: Board, loop: MainLoop) -> None:
    told: list[object] = []

    def change(backend: Backend) -> str:
        raise StoreError("no")

    board.change(change, told.append, lambda error: told.append(str(error)))
    loop.until(lambda: board.look is not None)
    assert told == ["no"]


def test_a_look_that_fails_leaves_the_last_one_and_says_so(
    board: Board, loop: MainLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked(board, loop)
    was = board.look

    def fail(*_: object) -> None:
        raise StoreError("qubesd is not there")

    with monkeypatch.context() as patch:
        patch.setattr(boards, "look_at", fail)
        board.refresh()
        loop.until(lambda: board.trouble is not None)
    assert board.trouble == "qubesd is not there"
    assert board.look is was
    looked(board, loop)
    assert board.trouble is None


def test_a_look_that_takes_too_long_leaves_the_last_one_and_says_so_until_it_is_done(
    board: Board, loop: MainLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a qubesd that hangs. Another look that is asked for meanwhile puts nothing off."""
    looked(board, loop)
    was, answers, look_at = board.look, Event(), boards.look_at

    def hang(*given: Any) -> Look:
        assert answers.wait(BOUND_S)
        return look_at(*given)

    monkeypatch.setattr(boards, "look_at", hang)
    told: list[str | None] = []
    board.subscribe(lambda: told.append(board.trouble))
    board.refresh()
    loop.pass_time(LOOK_TIMEOUT_S - 1)
    board.refresh()
    assert told == []
    loop.pass_time(1)
    assert board.trouble == "the qubes have not been read within 30 s; if qubesd hangs, restart it"
    assert told == [board.trouble]
    assert board.look is was
    answers.set()
    loop.until(lambda: board.look is not was)
    assert board.trouble is None


def test_a_look_that_hangs_after_another_that_was_done_is_noticed(
    board: Board, loop: MainLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_at, first, answers = boards.look_at, Event(), Event()
    waits, begun = [first, answers], Event()

    def hang(*given: Any) -> Look:
        begun.set()
        assert waits.pop(0).wait(BOUND_S)
        return look_at(*given)

    monkeypatch.setattr(boards, "look_at", hang)
    board.refresh()
    assert begun.wait(BOUND_S)
    board.refresh()
    first.set()
    loop.until(lambda: board.look is not None)
    assert board.trouble is None
    loop.pass_time(LOOK_TIMEOUT_S)
    assert board.trouble is not None
    answers.set()
    loop.until(lambda: board.trouble is None)
    loop.pass_time(2 * LOOK_TIMEOUT_S)
    assert board.trouble is None


def test_an_end_is_noticed_when_its_time_comes(board: Board, loop: MainLoop, forward: Command) -> None:
    forward("add", "work", "80", "--from", "any", "--expire", "+90m")
    looked(board, loop)
    assert states(board) == [State.ACTIVE]
    loop.pass_time(5399)
    assert states(board) == [State.ACTIVE]
    loop.pass_time(1)
    loop.until(lambda: states(board) == [State.EXPIRED])


def test_an_end_that_passed_while_the_machine_slept_is_noticed_with_the_next_figures(
    loop: MainLoop, other_store: Callable[[], Backend], forward: Command, asked: Asked
) -> None:
    """Its timers stand still meanwhile, so the next tick may be a minute off."""
    slept = [0.0]
    made = Board(other_store, loop.deliver, loop.later, lambda: loop.now + slept[0])
    forward("add", "work", "80", "--from", "any", "--expire", "+90m")
    looked(made, loop)
    made.be_seen(True)
    loop.until(lambda: made.figures is not None)
    slept[0] = 7200.0
    loop.pass_time(FIGURES_S)
    loop.until(lambda: states(made) == [State.EXPIRED])
    made.close()


def test_times_are_told_anew_each_minute_and_near_an_end_each_second_and_only_while_seen(
    board: Board, loop: MainLoop, forward: Command
) -> None:
    forward("add", "work", "80", "--from", "any", "--expire", "+5m")
    looked(board, loop)
    told: list[int] = []
    board.subscribe(lambda: told.append(1))
    loop.pass_time(60)
    assert told == []
    board.be_seen(True)
    loop.until(lambda: board.figures)
    board.be_seen(False)
    loop.pass_time(60)
    told.clear()
    board.be_seen(True)
    assert len(told) == 1  # at once, before any qube answers
    loop.pass_time(60)
    assert len(told) == 2
    told.clear()
    loop.pass_time(10)
    assert len(told) == 10


def test_qubes_are_asked_when_the_first_look_has_been_shown(
    board: Board, loop: MainLoop, asked: Asked
) -> None:
    board.be_seen(True)
    looked(board, loop)
    loop.pass_time(0.9)
    done: list[None] = []
    board.ask(lambda _: None, done.append, pytest.fail)
    loop.until(lambda: done)
    assert asked.times == []
    loop.pass_time(0.1)
    loop.until(lambda: board.figures is not None)
    assert asked.times == [NOW + 1]


def test_qubes_are_asked_only_while_it_is_seen(board: Board, loop: MainLoop, asked: Asked) -> None:
    looked(board, loop)
    loop.pass_time(60)
    assert asked.times == []
    board.be_seen(True)
    loop.until(lambda: board.figures is not None)
    board.be_seen(False)
    loop.pass_time(60)
    assert len(asked.times) == 1
    board.be_seen(True)
    loop.until(lambda: board.figures is not None and board.figures.at == NOW + 120)
    assert asked.times == [NOW + 60, NOW + 120]


def test_qubes_are_asked_five_seconds_after_the_last_answer_however_often_it_is_shown(
    board: Board, loop: MainLoop, asked: Asked
) -> None:
    looked(board, loop)
    for _ in range(3):
        board.be_seen(True)
        board.be_seen(False)
    board.be_seen(True)
    loop.until(lambda: board.figures is not None)
    loop.pass_time(FIGURES_S - 1)
    assert asked.times == [NOW]
    loop.pass_time(1)
    loop.until(lambda: board.figures is not None and board.figures.at > NOW)
    assert asked.times == [NOW, NOW + FIGURES_S]


def test_where_nobody_answers_there_are_no_figures_until_somebody_does(
    board: Board, loop: MainLoop, asked: Asked
) -> None:
    looked(board, loop)
    board.be_seen(True)
    loop.until(lambda: board.figures is not None)
    asked.error = StoreError("no")
    loop.pass_time(FIGURES_S)
    loop.until(lambda: board.figures is None)
    asked.error = None
    loop.pass_time(FIGURES_S)
    loop.until(lambda: board.figures is not None)


def test_only_the_last_preview_is_computed(board: Board, loop: MainLoop) -> None:
    told: list[int] = []
    for number in range(50):
        board.compute(lambda number=number: number, told.append, told.append, kind="preview")  # type: ignore[misc, arg-type]
    loop.until(lambda: told and told[-1] == 49)
    assert told == sorted(told)


def test_where_no_news_come_it_says_so_and_looks_once(
    loop: MainLoop, lab: LabDirectory, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a management qube each look that is refused is shown to dom0's user."""
    heard: list[str] = []
    ways: dict[str, Callable[..., None]] = {}

    class Silent:
        def __init__(self, _: object, deliver: object, changed: object, failed: Callable[..., None]) -> None:
            ways["failed"] = failed

        def close(self) -> None: ...

    monkeypatch.setattr(boards, "News", Silent)
    board = Board(lambda: LabStore(lab), loop.deliver, loop.later, lambda: loop.now)
    board.start()
    loop.until(lambda: board.look is not None)
    board.subscribe(lambda: heard.append(str(board.trouble)))
    was = board.look
    ways["failed"](StoreError("no news"))
    loop.until(lambda: board.look is not was)
    was = board.look
    ways["failed"](StoreError("still no news"))
    assert heard == ["no news", "still no news"]
    board.close()
    assert board.look is was


def test_watch_is_noticed_when_it_starts_and_when_it_ends(
    board: Board, loop: MainLoop, store: Backend
) -> None:
    """No news tell of it."""
    looked(board, loop)
    board.be_seen(True)
    assert board.look is not None
    assert board.look.watch_start is not None
    with store.watching():
        loop.pass_time(60)
        loop.until(lambda: board.look is not None and board.look.watch_start is None)
    board.be_seen(False)
    board.be_seen(True)
    loop.until(lambda: board.look is not None and board.look.watch_start is not None)
