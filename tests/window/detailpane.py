# SPDX-License-Identifier: GPL-2.0-or-later
"""The pane of one rule in a window, for tests of what it shows."""

from collections.abc import Callable

from mainloop import MainLoop
from panes import Heard, button, looked, of, shown, text
from screen import settle, until

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.states import Key
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.window import widgets
from qubes_fwd_qrexec.window.detail import Detail
from qubes_fwd_qrexec.window.gtk import Gtk
from qubes_fwd_qrexec.window.model.board import Board

KEY: Key = (QubeName("work"), "web")
PLAIN, CLIENTS = ("sys-net", "qubes.ForwardStatus+"), ("sys-net", "qubes.ForwardStatus+clients")
"""What sys-net is asked: without and with its clients."""


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
