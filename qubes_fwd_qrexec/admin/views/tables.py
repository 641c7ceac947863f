# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows as text for people: a table where it fits, one block for each row where it does not.

The cells are printable ASCII already. It prints nothing.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from qubes_fwd_qrexec.admin.states import State

# Below this a cell says nothing any more, and blocks are better.
_CELL_MIN = 12
_GAP = "  "


class Colour(StrEnum):
    """What a terminal is told: ECMA-48, select graphic rendition."""

    GREEN = "32"
    CYAN = "36"
    YELLOW = "33"
    RED = "31"
    FAINT = "2"


_COLOURS = {
    State.ACTIVE: Colour.GREEN,
    State.WAITING: Colour.CYAN,
    State.SUSPENDED: Colour.YELLOW,
    State.EXPIRED: Colour.FAINT,
    State.DISABLED: Colour.FAINT,
    State.REFUSED: Colour.RED,
    State.BROKEN: Colour.RED,
    State.HELD: Colour.YELLOW,
}


class Style(NamedTuple):
    """How wide the terminal is (None: there is none) and whether it shows colours."""

    width: int | None = None
    has_colour: bool = False

    def colour(self, colour: Colour, text: str) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self.has_colour else text

    def state(self, state: State, text: str) -> str:
        return self.colour(_COLOURS[state], text)


class Table(NamedTuple):
    """Rows below their titles. ``states`` colours the cell below STATE, where there is one.

    ``yielding`` are the titles of cells that may be cut, in the order in which they give way.
    """

    titles: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    states: Sequence[State]
    yielding: tuple[str, ...] = ()

    def text(self, style: Style) -> str | None:
        """The table in the width that there is, or None if it needs more."""
        lines = [self.titles, *self.rows]
        for title in self.yielding:
            column = self.titles.index(title)
            widths = _widths(lines)
            excess = _width(widths) - (style.width or _width(widths))
            if excess > 0:
                room = max(widths[column] - excess, min(_CELL_MIN, widths[column]))
                lines = [(*row[:column], _cut(row[column], room), *row[column + 1 :]) for row in lines]
        widths = _widths(lines)
        if style.width is not None and _width(widths) > style.width:
            return None
        return _line(lines[0], widths) + "".join(
            _line(self._coloured(row, widths, state, style), widths)
            for row, state in zip(lines[1:], self.states, strict=True)
        )

    def blocks(self, style: Style) -> str:
        """Each row by itself, over several lines; what the first two cells and the state say is its head."""
        return "\n".join(
            self._block(row, state, style) for row, state in zip(self.rows, self.states, strict=True)
        )

    def _coloured(
        self, row: tuple[str, ...], widths: Sequence[int], state: State, style: Style
    ) -> tuple[str, ...]:
        column = self.titles.index("STATE")
        # Filled up before it is coloured: what colours does not count for the width.
        painted = style.state(state, row[column].ljust(widths[column]))
        return (*row[:column], painted, *row[column + 1 :])

    def _block(self, row: tuple[str, ...], state: State, style: Style) -> str:
        labelled = dict(zip(self.titles, row, strict=True))
        head = f"{row[0]} {row[1]}: {style.state(state, labelled['STATE'])}\n"
        rest = [title for title in self.titles[2:] if title != "STATE" and labelled[title] not in ("", "?")]
        return head + "".join(f"  {title.lower()} {labelled[title]}\n" for title in rest)


def _widths(lines: Sequence[tuple[str, ...]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*lines, strict=True)]


def _width(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: max(room - 3, 0)]}..."


def _line(row: tuple[str, ...], widths: Sequence[int]) -> str:
    cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
    return f"{_GAP.join(cells).rstrip()}\n"
