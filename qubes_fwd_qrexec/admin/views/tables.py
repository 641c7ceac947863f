# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows as text for people, in the width that there is. The cells are printable ASCII already."""

import sys
from collections.abc import Sequence
from typing import NamedTuple

# A cell that is cut shorter says nothing.
_CELL_MIN = 12
_GAP = "  "


# ECMA-48, select graphic rendition.
_GREEN, _CYAN, _YELLOW, _RED, _FAINT = "32", "36", "33", "31", "2"
# By the values of `State`, and by verdicts.
_COLOURS = {
    "active": _GREEN,
    "waiting": _CYAN,
    "suspended": _YELLOW,
    "expired": _FAINT,
    "disabled": _FAINT,
    "refused": _RED,
    "broken": _RED,
    "held": _YELLOW,
    "ok": _GREEN,
    "note": _YELLOW,
    "unknown": _YELLOW,
    "stops": _RED,
}


def escaped(untrusted_text: str) -> str:
    """Printable ASCII as it is, all else as an escape."""
    return "".join(
        c if " " <= c <= "~" else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in untrusted_text
    )


class Style(NamedTuple):
    """How wide the terminal is (None: there is none) and whether it shows colours."""

    width: int | None = None
    has_colour: bool = False

    def state(self, state: str, text: str) -> str:
        """The text in the colour of a state or verdict."""
        return f"\x1b[{_COLOURS[state]}m{text}\x1b[0m" if self.has_colour else text


class Table(NamedTuple):
    """Rows below their titles; ``states`` colours the cells below STATE.

    ``yielding`` are the titles of cells that may be cut, in the order in which they give way.
    """

    titles: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    states: Sequence[str]
    yielding: tuple[str, ...] = ()

    def text(self, style: Style) -> str:
        """A table if it fits, else a block of lines for each row."""
        widths = [max(map(len, column)) for column in zip(self.titles, *self.rows, strict=True)]
        excess = sum(widths) + len(_GAP) * (len(widths) - 1) - (style.width or sys.maxsize)
        for column in map(self.titles.index, self.yielding):
            less = max(0, min(excess, widths[column] - _CELL_MIN))
            widths[column], excess = widths[column] - less, excess - less
        if excess > 0:
            return "\n".join(self._block(*each, style) for each in zip(self.rows, self.states, strict=True))
        lines = [_cells(row, widths) for row in (self.titles, *self.rows)]
        column = self.titles.index("STATE")
        for line, state in zip(lines[1:], self.states, strict=True):
            line[column] = style.state(state, line[column])
        return "".join(f"{_GAP.join(line).rstrip()}\n" for line in lines)

    def _block(self, row: tuple[str, ...], state: str, style: Style) -> str:
        """The first two cells and the state as a head, then the cells that say something."""
        labelled = dict(zip(self.titles[2:], row[2:], strict=True))
        head = f"{row[0]} {row[1]}: {style.state(state, labelled.pop('STATE'))}\n"
        return head + "".join(
            f"  {title.lower()} {cell}\n" for title, cell in labelled.items() if cell not in ("", "?")
        )


def _cells(row: tuple[str, ...], widths: Sequence[int]) -> list[str]:
    return [cut(cell, width).ljust(width) for cell, width in zip(row, widths, strict=True)]


def counted(number: int, what: str) -> str:
    """``1 call``, ``2 calls``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def size(count: int) -> str:
    """A number of bytes for people: ``0``, ``999``, ``1.5 KiB``, ``12 MiB``."""
    value, units = float(count), ["", " KiB", " MiB", " GiB", " TiB", " PiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        del units[0]
    return f"{value:.1f}{units[0]}" if units[0] and value < 10 else f"{value:.0f}{units[0]}"


def cut(text: str, width: int) -> str:
    """Text that is at most so wide."""
    return text if len(text) <= width else f"{text[: max(width - 3, 0)]}..."


class Check(NamedTuple):
    """What one check found; ``verdict`` is ok, note, unknown or stops.

    Where it stops, ``cause`` is a word for why, ``remedy`` what helps, and ``ways_out`` the commands in that,
    with a word in capitals where the user chooses.
    """

    name: str
    verdict: str
    text: str
    cause: str = ""
    remedy: str = ""
    ways_out: tuple[tuple[str, ...], ...] = ()


def checks(found: Sequence[Check], style: Style) -> str:
    """Checks below each other, their texts wrapped where a terminal is."""
    import textwrap

    verdict_width = max(len(check.verdict) for check in found)
    name_width = max(len(check.name) for check in found)
    lines = []
    for check in found:
        verdict = check.verdict.ljust(verdict_width)
        head = f"{verdict}{_GAP}{check.name.ljust(name_width)}{_GAP}"
        width = max(style.width or sys.maxsize, 2 * len(head))
        line = textwrap.fill(
            escaped(check.text),
            width,
            initial_indent=head,
            subsequent_indent=" " * len(head),
            break_on_hyphens=False,
        )
        lines.append(f"{style.state(check.verdict, verdict)}{line[verdict_width:]}\n")
    return "".join(lines)
