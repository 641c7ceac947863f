# SPDX-License-Identifier: GPL-2.0-or-later
"""For tests of panes and dialogs: they find widgets by what these say, and hear what the window is asked."""

from collections.abc import Iterator
from typing import Any, TypeVar

from screen import settle, until

from qubes_fwd_qrexec.window.gtk import Gdk, Gtk
from qubes_fwd_qrexec.window.model.actions import Done
from qubes_fwd_qrexec.window.model.board import Board

W = TypeVar("W", bound=Gtk.Widget)
PROBE = "<b>&amp; <i>"
"""What markup would make something else of."""


class Heard:
    """In the place of the application: what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.calls.append((name, *args))


class Told(list[Any]):
    """What the main window was given to show."""

    def __call__(self, outcome: Done | Exception) -> None:
        self.append(outcome)


def every(widget: Gtk.Widget) -> Iterator[Gtk.Widget]:
    """A widget and all that is within, as far as it is shown."""
    if not widget.get_visible():
        return
    yield widget
    if isinstance(widget, Gtk.Expander) and not widget.get_expanded():
        return
    if isinstance(widget, Gtk.Container):
        inside: list[Gtk.Widget] = []
        widget.forall(inside.append)
        for child in inside:
            yield from every(child)


def of(widget: Gtk.Widget, kind: type[W]) -> list[W]:
    return [each for each in every(widget) if isinstance(each, kind)]


def text(widget: Gtk.Widget) -> str:
    """All that is said, a line for each label, and what is in text views."""
    return "\n".join(_said(each) for each in every(widget) if isinstance(each, Gtk.Label | Gtk.TextView))


def _said(widget: Gtk.Label | Gtk.TextView) -> str:
    if isinstance(widget, Gtk.Label):
        return widget.get_text()
    buffer = widget.get_buffer()
    return buffer.get_text(buffer.get_start_iter(), buffer.get_end_iter(), False)


def button(widget: Gtk.Widget, words: str) -> Gtk.Button:
    """The one button that says this, without the line under its letter."""
    found = [each for each in of(widget, Gtk.Button) if plain(each) == words]
    assert len(found) == 1, (words, [plain(each) for each in of(widget, Gtk.Button)])
    return found[0]


def plain(button: Gtk.Button) -> str:
    labels = of(button, Gtk.Label)
    return labels[0].get_text() if labels else ""


def looked(board: Board) -> None:
    """Have the board look at the system anew."""
    was = board.look
    board.refresh()
    until(lambda: board.look is not was)


def shown(widget: Gtk.Widget, width: int = 500, height: int = 700) -> Gtk.Window:
    """A window with this in it, which has the keyboard."""
    window = Gtk.Window(default_width=width, default_height=height)
    window.add(widget)
    window.show_all()
    until(lambda: widget.get_allocated_width() > 1)
    window.get_window().focus(Gdk.CURRENT_TIME)
    until(window.has_toplevel_focus)
    return window


def picture(widget: Gtk.Widget, path: str) -> None:
    """For whoever writes a test: what a window looks like."""
    settle()
    place = widget.get_window()
    Gdk.pixbuf_get_from_window(place, 0, 0, place.get_width(), place.get_height()).savev(path, "png", [], [])
