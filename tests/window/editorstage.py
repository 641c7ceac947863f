# SPDX-License-Identifier: GPL-2.0-or-later
"""The dialog that adds and changes forwards, worked as its user does."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from controls import called, find, texts, walk
from screen import until
from worlds import NOW

from qubes_fwd_qrexec.common.options import Option
from qubes_fwd_qrexec.common.rules import ForwardRule
from qubes_fwd_qrexec.common.values import QubeName, RuleName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.window.dialogs.editor import Editor
from qubes_fwd_qrexec.window.gtk import Gtk
from qubes_fwd_qrexec.window.model.actions import Done
from qubes_fwd_qrexec.window.model.board import Board

WORK, WEB = QubeName("work"), (QubeName("work"), RuleName("web"))
LINE = "action=forward mode=qrexec srcports=80 srchosts=10.0.0.0/8 owner=work path=sys-firewall,sys-net"
PROBE = "<b>&amp;"


class Timer:
    """In the place of GTK's: what is to be called later is called by the test."""

    def __init__(self) -> None:
        self.now = float(NOW)
        self.calls: list[Callable[[], None]] = []

    def __call__(self, seconds: float, call: Callable[[], None]) -> Callable[[], None]:
        self.calls.append(call)
        return lambda: self.calls.remove(call) if call in self.calls else None

    def pass_by(self) -> None:
        while self.calls:
            self.calls.pop(0)()


class Stage:
    """A board that has looked, and an editor."""

    def __init__(self, board: Board, timer: Timer) -> None:
        self.board = board
        self.timer = timer
        self.told: list[Done] = []
        self.editor = Editor(board, self.told.append, self.timer)

    @property
    def dialog(self) -> Gtk.Dialog:
        widget = self.editor.widget
        assert widget is not None
        return widget

    @property
    def is_open(self) -> bool:
        return self.editor.widget is not None and self.dialog.get_mapped()

    def add(self, target: QubeName | None = None) -> None:
        self._open(lambda: self.editor.add(None, target))

    def edit(self, options: Sequence[Option] = ()) -> None:
        self._open(lambda: self.editor.edit(None, WEB, options))

    def _open(self, begin: Callable[[], None]) -> None:
        was = self.editor.widget
        begin()
        until(lambda: self.editor.widget is not was and self.is_open)

    def looked(self) -> None:
        was = self.board.look
        self.board.refresh()
        until(lambda: self.board.look is not was)

    def entry(self, name: str) -> Gtk.Entry:
        return find(self.dialog, Gtk.Entry, name)

    def radio(self, name: str) -> Gtk.RadioButton:
        return find(self.dialog, Gtk.RadioButton, name)

    def button(self, name: str) -> Gtk.Button:
        return find(self.dialog, Gtk.Button, name)

    def has(self, text: str) -> bool:
        return any(text in each for each in texts(self.dialog))

    def ready(self, name: str) -> Gtk.Button:
        """The button of that name, once it may be pressed."""
        until(lambda: any(called(b) == name and b.get_sensitive() for b in self.buttons()))
        return self.button(name)

    def buttons(self) -> list[Gtk.Button]:
        return [widget for widget in walk(self.dialog) if isinstance(widget, Gtk.Button)]

    def fill(self, target: str = "work", ports: str = "80", sources: str = "10.0.0.0/8") -> None:
        self.entry("Qube").set_text(target)
        self.entry("Server port").set_text(ports)
        self.entry("Networks and qubes that may connect").set_text(sources)


def stored(lab: LabDirectory, name: str = "web", qube: str = "work") -> ForwardRule:
    return ForwardRule.parse(lab.features(qube)[f"forward.{name}"])


def set_netvm(lab: LabDirectory, qube: str, netvm: str) -> None:
    lab.write_qube(replace(lab.qube(qube), netvm=QubeName(netvm)))
