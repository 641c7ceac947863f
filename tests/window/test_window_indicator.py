# SPDX-License-Identifier: GPL-2.0-or-later
"""The icon is there only while there is something to say, and says it in plain text."""

from collections.abc import Callable, Iterator

import pytest
from panes import looked
from screen import settle, until
from worlds import ADD, NOW, Command

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.window import widgets
from qubes_fwd_qrexec.window.indicator import Indicator
from qubes_fwd_qrexec.window.model.board import Board


class Case:
    def __init__(self, other_store: Callable[[], Backend]) -> None:
        self.fails: str | None = None
        self._other_store = other_store
        self.did: list[str] = []
        self.board = Board(self._open, widgets.deliver, lambda _seconds, _call: lambda: None, lambda: NOW)
        self.indicator = Indicator(
            self.board,
            open_window=lambda: self.did.append("open"),
            close_everything=lambda: self.did.append("close"),
            leave=lambda: self.did.append("leave"),
        )

    def _open(self) -> Backend:
        if self.fails:
            raise StoreError(self.fails)
        return self._other_store()

    @property
    def shown(self) -> tuple[str | None, str | None]:
        icon = self.indicator.icon
        return (icon.get_icon_name(), icon.get_tooltip_text()) if icon.get_visible() else (None, None)


@pytest.fixture
def case(other_store: Callable[[], Backend]) -> Iterator[Case]:
    case = Case(other_store)
    yield case
    case.board.close()
    case.indicator.icon.set_visible(False)
    settle()


def test_it_comes_and_goes_with_what_is_open(case: Case, forward: Command) -> None:
    assert case.shown == (None, None)
    looked(case.board)
    assert case.shown == (None, None)
    forward(*ADD)
    looked(case.board)
    assert case.shown == ("qubes-forward-open", "1 port is open.")
    forward("add", "personal", "81", "--from", "any")
    looked(case.board)
    assert case.shown == ("qubes-forward-anybody", "2 ports are open, 1 of them to anybody.")
    forward("panic")
    looked(case.board)
    assert case.shown == ("qubes-forward-held", "Everything is held.")
    forward("resume")
    forward("remove", "personal", "tcp-81")
    forward("disable", "work", "web")
    looked(case.board)
    assert case.shown == (None, None)


def test_a_system_that_cannot_be_read_is_not_one_where_nothing_is_open(case: Case) -> None:
    case.fails = "<b>&amp; qubesd is away"
    case.board.refresh()
    until(lambda: case.board.trouble)
    assert case.shown == (
        "qubes-forward-unknown",
        "What is open is unknown: <b>&amp; qubesd is away",
    )
    case.fails = None
    looked(case.board)
    assert case.shown == (None, None)


def test_a_click_opens_the_window_and_its_menu_does_what_it_says(case: Case) -> None:
    case.indicator.icon.emit("activate")
    items = case.indicator.menu.get_children()
    assert [item.get_label() for item in items] == ["_Open the window", "_Close everything…", "_Quit"]
    for item in items:
        item.activate()
    assert case.did == ["open", "open", "close", "leave"]


def test_its_menu_pops_up(case: Case) -> None:
    case.indicator.icon.emit("popup-menu", 0, 0)
    until(case.indicator.menu.get_mapped)
    assert all(item.get_mapped() for item in case.indicator.menu.get_children())
    case.indicator.menu.popdown()
    settle()


def test_its_name_is_that_of_the_program(case: Case) -> None:
    assert case.indicator.icon.get_title() == "qubes-forward-indicator"
