# SPDX-License-Identifier: GPL-2.0-or-later
"""A list of checks: for each its verdict, what was checked, what was found, and buttons for what helps."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from qubes_fwd_qrexec.admin.views.tables import Check, escaped

from .gtk import Gtk
from .kept import Rows, Text
from .model.commands import Commands
from .model.remedies import remedy
from .model.words import _
from .widgets import button, column, row


class _Key(NamedTuple):
    """Which of the checks of one name it is, and the buttons that it has."""

    name: str
    number: int
    ways_out: tuple[tuple[str, ...], ...]


class CheckList:
    """Shows checks; ``widget`` has a row for each."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self._columns = tuple(Gtk.SizeGroup(mode=Gtk.SizeGroupMode.HORIZONTAL) for _ in range(2))
        self._rows: Rows[_Key, Check] = Rows(self._made)
        self.widget = self._rows.widget

    def show(self, checks: Sequence[Check]) -> Iterator[None]:
        """Show these, a step for each row."""
        names: list[str] = []
        items: dict[_Key, Check] = {}
        for check in checks:
            items[_Key(check.name, names.count(check.name), check.ways_out)] = check
            names.append(check.name)
        return self._rows.show(items)

    def _made(self, key: _Key) -> "_CheckRow":
        return _CheckRow(key, self._columns, self._commands)


class _CheckRow:
    def __init__(self, key: _Key, columns: Sequence[Gtk.SizeGroup], commands: Commands) -> None:
        self._verdict, self._name, self._text = (Text(wraps=i == 2, is_selectable=i == 2) for i in range(3))
        self._name.show(escaped(key.name))
        below = column(self._text.widget)
        for command in key.ways_out:
            below.pack_start(_button(command, commands), False, False, 0)
        self.widget = row(self._verdict.widget, self._name.widget, gap=12)
        self.widget.pack_start(below, True, True, 0)
        for size, cell in zip(columns, (self._verdict.widget, self._name.widget), strict=True):
            cell.set_yalign(0)
            size.add_widget(cell)

    def show(self, check: Check) -> None:
        self._verdict.show(*verdict_words(check.verdict))
        self._text.show(escaped(check.text))


def verdict_words(verdict: str) -> tuple[str, str]:
    """A sign and a word, and the style class, of ok, note, unknown or stops."""
    return {
        # Translators: what a check found, in one word: nothing wrong
        "ok": (_("✓ ok"), "open"),
        # Translators: what a check found, in one word: something to know
        "note": (_("! note"), "note"),
        # Translators: what a check found, in one word: this keeps the forward closed
        "stops": (_("✖ stops"), "bad"),
    }.get(verdict, (_("? unknown"), "note"))


def _button(command: tuple[str, ...], commands: Commands) -> Gtk.Button:
    """What does it, or copies it to be done elsewhere."""
    found = remedy(command)
    made = button(found.label.replace("_", "__"), lambda: commands.remedy(found), tooltip=found.command)
    made.set_halign(Gtk.Align.START)
    return made
