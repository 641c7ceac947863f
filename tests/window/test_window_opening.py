# SPDX-License-Identifier: GPL-2.0-or-later
"""Nothing is opened to anybody by one click."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
from mainloop import MainLoop
from panes import Told, button, looked, text
from screen import until
from worlds import NOW, Command

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.states import Key
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.window import widgets
from qubes_fwd_qrexec.window.dialogs.opening import Opening, opens_to_anybody
from qubes_fwd_qrexec.window.dialogs.question import WAIT_S
from qubes_fwd_qrexec.window.model import actions
from qubes_fwd_qrexec.window.model.board import Board

KEY: Key = (QubeName("work"), "web")
ADD = ("add", "work", "80", "--name", "web", "--from")


@pytest.fixture
def loop() -> MainLoop:
    return MainLoop(NOW)


@pytest.fixture
def board(other_store: Callable[[], Backend], loop: MainLoop) -> Iterator[Board]:
    board = Board(other_store, widgets.deliver, loop.later, lambda: NOW)
    yield board
    board.close()


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def opening(board: Board, told: Told, loop: MainLoop) -> Iterator[Opening]:
    opening = Opening(board, told, later=loop.later)
    yield opening
    opening.widget.destroy()


@pytest.mark.parametrize(
    ("words", "asks"),
    [
        (("any", "--disabled"), True),
        (("any",), False),
        (("10.0.0.0/8", "--disabled"), False),
    ],
)
def test_what_is_closed_and_would_let_in_anybody_is_asked_about(
    board: Board, forward: Command, words: tuple[str, ...], asks: bool
) -> None:
    forward(*ADD, *words)
    looked(board)
    assert board.look is not None
    assert opens_to_anybody(board.look, KEY) is asks
    assert not opens_to_anybody(board.look, (QubeName("work"), "gone"))


def test_it_opens_after_the_question(
    opening: Opening, told: Told, board: Board, loop: MainLoop, forward: Command, lab: LabDirectory
) -> None:
    forward(*ADD, "any", "--disabled")
    looked(board)
    opening.open(None, KEY, actions.enable)
    assert "Anybody who can reach sys-net:80 may connect to work web." in text(opening.widget)
    assert "enabled=no" in (lab.feature("work", "forward.web") or "")
    yes = button(opening.widget, "Open to anybody")
    assert yes.get_style_context().has_class("anybody")
    loop.pass_time(WAIT_S)
    yes.clicked()
    until(lambda: told)
    assert told[0].is_well
    assert "enabled=no" not in (lab.feature("work", "forward.web") or "")


def test_more_time_for_one_that_has_ended_is_given_after_the_question(
    opening: Opening, told: Told, board: Board, loop: MainLoop, forward: Command, lab: LabDirectory
) -> None:
    forward(*ADD, "any", "--expire", "1h", now=NOW - 7200)
    looked(board)
    opening.open(None, KEY, partial(actions.extend, seconds=3600))
    loop.pass_time(WAIT_S)
    button(opening.widget, "Open to anybody").clicked()
    until(lambda: told)
    assert f"expire={NOW + 3600}" in (lab.feature("work", "forward.web") or "")


def test_what_changed_unseen_is_not_opened(
    opening: Opening, told: Told, board: Board, loop: MainLoop, forward: Command
) -> None:
    forward(*ADD, "any", "--disabled")
    looked(board)
    opening.open(None, KEY, actions.enable)
    loop.pass_time(WAIT_S)
    forward("set", "work", "web", "srcports=81")
    yes = button(opening.widget, "Open to anybody")
    yes.clicked()
    until(lambda: "it is not what you saw" in text(opening.widget))
    assert told == []
    until(lambda: "sys-net:81" in text(opening.widget))
    assert not yes.get_sensitive()
    loop.pass_time(WAIT_S)
    assert yes.get_sensitive()
    forward("enable", "work", "web")
    board.refresh()
    until(lambda: not opening.widget.get_visible())
