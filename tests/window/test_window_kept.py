# SPDX-License-Identifier: GPL-2.0-or-later
"""Widgets stay where they are while what they show changes."""

from collections.abc import Mapping

from panes import PROBE, of, shown, text

from qubes_fwd_qrexec.window.gtk import Gtk
from qubes_fwd_qrexec.window.kept import LINE_MAX, PIECE_MAX, TEXT_MAX, Lines, Rows, Text
from qubes_fwd_qrexec.window.widgets import column


class Entry:
    """A row that says something and can have the focus."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.text = Text()
        self.button = Gtk.Button(label=key)
        self.widget = column(self.text.widget, self.button)

    def show(self, item: str) -> None:
        self.text.show(item)


class Shown:
    """Rows in a window, with what else there is."""

    def __init__(self) -> None:
        self.made: dict[str, Entry] = {}
        self.rows: Rows[str, str] = Rows(self._make)
        self.before = Gtk.Button(label="before")
        self.window = shown(column(self.before, self.rows.widget))

    def _make(self, key: str) -> Entry:
        self.made[key] = Entry(key)
        return self.made[key]

    def show(self, items: Mapping[str, str]) -> None:
        for _ in self.rows.show(items):
            pass

    @property
    def focus(self) -> str | None:
        widget = self.window.get_focus()
        return widget.get_label() if isinstance(widget, Gtk.Button) else None


def test_rows_are_in_their_order_and_those_that_stay_are_the_same() -> None:
    found = Shown()
    found.show({"a": "1", "b": "2", "c": "3"})
    assert text(found.rows.widget).split() == ["1", "a", "2", "b", "3", "c"]
    kept = found.made["b"]
    found.show({"c": "3", "new": "4", "b": "5"})
    assert text(found.rows.widget).split() == ["3", "c", "4", "new", "5", "b"]
    assert found.made["b"] is kept
    assert sorted(found.made) == ["a", "b", "c", "new"]
    found.show({})
    assert of(found.rows.widget, Gtk.Button) == []
    found.window.destroy()


def test_a_row_that_stays_keeps_the_focus_and_of_one_that_goes_it_goes_to_another() -> None:
    found = Shown()
    found.show({"a": "1", "b": "2", "c": "3"})
    found.made["b"].button.grab_focus()
    found.show({"c": "3", "b": "changed"})
    assert found.focus == "b"
    found.show({"c": "3"})
    assert found.focus == "c"
    found.show({})
    assert found.focus == "before"
    found.window.destroy()


def test_a_text_is_no_markup_and_takes_no_room_while_it_is_empty() -> None:
    said = Text(style="note")
    window = shown(column(said.widget))
    assert not said.widget.get_visible()
    said.show(PROBE, "bad")
    assert said.widget.get_visible()
    assert said.widget.get_text() == PROBE
    context = said.widget.get_style_context()
    assert (context.has_class("bad"), context.has_class("note")) == (True, False)
    said.show("", "")
    assert not said.widget.get_visible()
    assert not context.has_class("bad")
    window.destroy()


def test_gtk_is_given_only_what_differs() -> None:
    said, given = Text(), list[str]()
    said.widget.connect("notify::label", lambda label, _: given.append(label.get_text()))
    for words in ("one", "one", "two", "two", ""):
        said.show(words)
    assert given == ["one", "two", ""]


def test_what_is_too_long_is_cut() -> None:
    said, lines = Text(), Lines()
    said.show("x" * 100_000)
    lines.show(f"{'x' * 100_000}\nshort")
    assert len(said.widget.get_text()) == TEXT_MAX
    lines.widget.show()
    *pieces, last = text(lines.widget).split("\n")
    assert (sum(map(len, pieces)), max(map(len, pieces)), last) == (LINE_MAX, PIECE_MAX, "short")
    lines.show("one\n\ntwo")
    assert text(lines.widget) == "one\n\ntwo"


def test_a_short_text_asks_for_no_more_than_its_width() -> None:
    sign, words = Text(), Text()
    sign.show("●")
    words.show("many words " * 10)
    assert sign.widget.get_preferred_width()[0] < words.widget.get_preferred_width()[0] < 200


def test_what_a_user_has_selected_stays_selected_while_the_text_is_the_same() -> None:
    said = Text()
    window = shown(column(said.widget))
    said.show("one two")
    said.widget.select_region(0, 3)
    said.show("one two")
    assert said.widget.get_selection_bounds() == (True, 0, 3)
    window.destroy()
