# SPDX-License-Identifier: GPL-2.0-or-later
"""Widgets that stay while what they show changes, so the user keeps focus and scroll position.

GTK is given only what differs.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Generic, Protocol, TypeVar

from qubes_fwd_qrexec.admin.views.tables import shortened

from .gtk import Gtk
from .widgets import column, label

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
_V = TypeVar("_V", contravariant=True)
# A label that is not told how narrow it may be lays its text out again and again to find that.
_CHARS_MIN = 10
TEXT_MAX = 600
"""Characters of one text. Two hundred networks have more, and it takes long to lay them out."""
LINE_MAX = 4000
"""Characters of one of many lines."""
PIECE_MAX = 400
"""GTK lays lines out one by one, so that a long one is broken into pieces of so many characters."""
# How many widgets of one row may take the focus one after the other.
_FOCI_MAX = 8


class Text:
    """A text, which takes no room while it is empty."""

    def __init__(
        self, *, wraps: bool = True, is_selectable: bool = True, style: str = "", longest: int = TEXT_MAX
    ) -> None:
        self.widget = label(wraps=wraps, is_selectable=is_selectable, style=style)
        self.widget.set_no_show_all(True)
        self._wraps = wraps
        self._longest = longest
        self._shown = ""
        self._style = style

    def show(self, text: str, style: str | None = None) -> None:
        """``style`` takes the place of the class that it had. What is too long is cut."""
        text = shortened(text, self._longest)
        if text != self._shown:
            if bool(text) is not bool(self._shown):
                self.widget.set_visible(bool(text))
            self._shown = text
            if self._wraps:
                self.widget.set_width_chars(min(len(text), _CHARS_MIN))
            self.widget.set_text(text)
        if style is not None and style != self._style:
            context = self.widget.get_style_context()
            if self._style:
                context.remove_class(self._style)
            if style:
                context.add_class(style)
            self._style = style


class Lines:
    """Many lines to be read and selected, which GTK lays out bit by bit."""

    def __init__(self, *, is_monospace: bool = False) -> None:
        self.widget = Gtk.TextView(editable=False, cursor_visible=False, monospace=is_monospace)
        self.widget.set_wrap_mode(Gtk.WrapMode.WORD_CHAR)
        self.widget.set_accepts_tab(False)
        self._shown = ""

    def show(self, text: str) -> None:
        """Of a line that is longer than `LINE_MAX` the rest is cut."""
        text = "\n".join(piece for line in text.split("\n") for piece in _pieces(shortened(line, LINE_MAX)))
        if text != self._shown:
            self._shown = text
            self.widget.get_buffer().set_text(text)


def _pieces(line: str) -> list[str]:
    return [line[at : at + PIECE_MAX] for at in range(0, max(len(line), 1), PIECE_MAX)]


class Row(Protocol[_V]):
    """The widget of one item."""

    @property
    def widget(self) -> Gtk.Widget: ...

    def show(self, item: _V) -> None: ...


class Rows(Generic[K, V]):
    """Rows below each other, one for each key: one that stays keeps its widget."""

    def __init__(self, make: Callable[[K], Row[V]]) -> None:
        self.widget = column()
        self._make = make
        self._rows: dict[K, Row[V]] = {}
        self._order: list[K] = []

    def show(self, items: Mapping[K, V]) -> Iterator[None]:
        """Show these in their order, a step for each row."""
        for key in [key for key in self._order if key not in items]:
            self._remove(key)
            yield
        for at, (key, item) in enumerate(items.items()):
            if key not in self._rows:
                self._rows[key] = self._make(key)
                self.widget.pack_start(self._rows[key].widget, False, False, 0)
                self._order.append(key)
                self._rows[key].show(item)
                self._rows[key].widget.show_all()
            else:
                self._rows[key].show(item)
            if self._order[at] != key:
                self._order.remove(key)
                self._order.insert(at, key)
                self.widget.reorder_child(self._rows[key].widget, at)
            yield

    def _remove(self, key: K) -> None:
        """Take a row away. The focus goes from it to the next, else to the one before, else to what lies
        before all rows.
        """
        at, widget = self._order.index(key), self._rows.pop(key).widget
        self._order.remove(key)
        if self.widget.get_focus_child() is widget:
            others = (*self._order[at:], *reversed(self._order[:at]))
            back = Gtk.DirectionType.TAB_BACKWARD
            if not any(self._rows[other].widget.child_focus(back) for other in others):
                for _ in range(_FOCI_MAX):
                    if self.widget.get_focus_child() is widget:
                        widget.get_toplevel().child_focus(back)
        widget.destroy()
