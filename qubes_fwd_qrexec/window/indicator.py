# SPDX-License-Identifier: GPL-2.0-or-later
"""The icon in the panel's tray, which is there only while there is something to say."""

from collections.abc import Callable

from .gtk import Gtk
from .model.board import Board
from .model.indication import Indication, indication
from .model.words import _

NAME = "qubes-forward-indicator"


class Indicator:
    """``icon`` is the icon, and ``menu`` its menu. A click opens the window."""

    def __init__(
        self,
        board: Board,
        *,
        open_window: Callable[[], None],
        close_everything: Callable[[], None],
        leave: Callable[[], None],
    ) -> None:
        self._board = board
        self._shown = Indication("", "")
        self.icon = Gtk.StatusIcon(visible=False, title=NAME)
        self.icon.set_name(NAME)
        self.icon.connect("activate", lambda _icon: open_window())
        self.icon.connect("popup-menu", self._pop_up)
        self.menu = Gtk.Menu()
        items = (
            (_("_Open the window"), open_window),
            (_("_Close everything…"), close_everything),
            (_("_Quit"), leave),
        )
        for text, does in items:
            self.menu.append(_item(text, does))
        self.menu.show_all()
        board.subscribe(self._show)

    def _show(self) -> None:
        found, was = indication(self._board.look, self._board.trouble), self._shown
        self._shown = found
        if found.text != was.text:
            self.icon.set_tooltip_text(found.text)
        if found.icon != was.icon:
            self.icon.set_from_icon_name(found.icon)
            self.icon.set_visible(bool(found.icon))

    def _pop_up(self, icon: Gtk.StatusIcon, button: int, time: int) -> None:
        self.menu.popup(None, None, Gtk.StatusIcon.position_menu, icon, button, time)


def _item(text: str, does: Callable[[], None]) -> Gtk.MenuItem:
    made = Gtk.MenuItem.new_with_mnemonic(text)
    made.connect("activate", lambda _item: does())
    return made
