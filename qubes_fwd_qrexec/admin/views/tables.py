# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows as text for people, in the width that there is. The cells are printable ASCII already."""

import os
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, TextIO

# A cell that is cut shorter says nothing.
_CELL_MIN = 10
_GAP = "  "


# ECMA-48, select graphic rendition.
_GREEN, _CYAN, _YELLOW, _RED, _FAINT = "32", "36", "33", "31", "2"
# By the values of `State`, and by verdicts.
_COLOURS = {
    "active": _GREEN,
    "open": _GREEN,
    "waiting": _CYAN,
    "suspended": _YELLOW,
    "expired": _FAINT,
    "disabled": _FAINT,
    "refused": _RED,
    "broken": _RED,
    "held": _YELLOW,
    "draining": _YELLOW,
    "ok": _GREEN,
    "note": _YELLOW,
    "unknown": _YELLOW,
    "stops": _RED,
}


def escaped(untrusted_text: str) -> str:
    """Printable ASCII as it is, all else as an escape."""
    if untrusted_text.isascii() and untrusted_text.isprintable():
        return untrusted_text
    return "".join(
        c if " " <= c <= "~" else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in untrusted_text
    )


class Style(NamedTuple):
    """How wide the terminal is (None: there is none) and whether it shows colours."""

    width: int | None = None
    has_colour: bool = False

    def state(self, state: str, text: str) -> str:
        return f"\x1b[{_COLOURS[state]}m{text}\x1b[0m" if self.has_colour else text


def terminal_size(out: TextIO, environ: Mapping[str, str]) -> os.terminal_size | None:
    """Columns and lines of the terminal that is written to; None if it is no terminal."""
    if not out.isatty():
        return None
    size = os.get_terminal_size(out.fileno())
    columns = environ.get("COLUMNS", "")
    return os.terminal_size((int(columns) if columns.isdecimal() else size.columns, size.lines))


class Table(NamedTuple):
    """Rows below their titles; what is below STATE has the colour of that state.

    Where the terminal is too narrow, cells below the titles of ``yielding`` are cut, in this order, down to
    the width given there. If that is not enough, columns go: those that say nothing, then those of
    ``leaving``, one after the other; and at last cells below ``squeezed`` are cut to what still says
    something.
    """

    titles: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    yielding: Mapping[str, int] = MappingProxyType({})
    leaving: tuple[str, ...] = ()
    squeezed: tuple[str, ...] = ()

    def text(self, style: Style) -> str:
        """A table if it fits in any way, else a block of lines for each row; empty without rows."""
        if not self.rows:
            return ""
        width = style.width or sys.maxsize
        empty = [title for at, title in enumerate(self.titles) if not any(row[at] for row in self.rows)]
        shown = list(self.titles)
        for title in ("", *empty, *self.leaving):
            if title in shown:
                shown.remove(title)
            if (widths := self._widths(shown, width, self.yielding)) is not None:
                return self._table(widths, style)
        if (widths := self._widths(shown, width, dict.fromkeys(self.squeezed, _CELL_MIN))) is not None:
            return self._table(widths, style)
        return "\n".join(self._block(row, style) for row in self.rows)

    def _widths(self, shown: Sequence[str], width: int, least: Mapping[str, int]) -> dict[str, int] | None:
        """How wide the columns are that are shown; None if they cannot be so narrow."""
        widths = {
            title: max(map(len, column))
            for title, *column in zip(self.titles, self.titles, *self.rows, strict=True)
            if title in shown
        }
        excess = sum(widths.values()) + len(_GAP) * (len(widths) - 1) - width
        for title, least_width in least.items():
            less = min(excess, widths.get(title, 0) - least_width)
            if less > 0:
                widths[title] -= less
                excess -= less
        return widths if excess <= 0 else None

    def _table(self, widths: Mapping[str, int], style: Style) -> str:
        columns = [self.titles.index(title) for title in widths]
        lines = [
            [
                shortened(row[column], width).ljust(width)
                for column, width in zip(columns, widths.values(), strict=True)
            ]
            for row in (self.titles, *self.rows)
        ]
        at, state = [*widths].index("STATE"), self.titles.index("STATE")
        for line, row in zip(lines[1:], self.rows, strict=True):
            line[at] = style.state(row[state], line[at])
        return "".join(f"{_GAP.join(line).rstrip()}\n" for line in lines)

    def _block(self, row: tuple[str, ...], style: Style) -> str:
        """The first two cells and the state as a head, then the cells that say something."""
        labelled = dict(zip(self.titles[2:], row[2:], strict=True))
        state = labelled.pop("STATE")
        head = f"{row[0]} {row[1]}: {style.state(state, state)}\n"
        return head + "".join(
            f"  {title.lower()} {cell}\n" for title, cell in labelled.items() if cell not in ("", "?")
        )


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


def shortened(text: str, width: int) -> str:
    """Text that is at most so wide, cut behind a word where one ends in its second half."""
    if len(text) <= width:
        return text
    kept = text[: max(width - 3, 0)]
    if text[len(kept)] not in " ,":
        end = max(kept.rfind(" "), kept.rfind(","))
        kept = kept[:end] if end >= width // 2 else kept
    return f"{kept.rstrip(' ,')}..."


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
