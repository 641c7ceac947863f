# SPDX-License-Identifier: GPL-2.0-or-later
"""The table: lines of values, one column for each peer, then how ours compare with others and each other."""

from collections.abc import Sequence

from .lines import Line, Named
from .peers import BASE, COMPARED

_NOTHING = "-"


def ratio(line: Line, peer: str, base: str = BASE) -> float | None:
    """How many times better than the base a peer is; below 1 it is worse. None where that says nothing."""
    if not line.is_compared or peer not in line.values or base not in line.values:
        return None
    better, worse = line.values[peer], line.values[base]
    if line.is_less_better:
        better, worse = worse, better
    if better == worse:
        return 1.0
    return better / worse if worse > 0 else None


def render(
    lines: Sequence[Line],
    peers: Sequence[type[Named]],
    compared: Sequence[tuple[type[Named], type[Named]]] = COMPARED,
) -> str:
    """A Markdown table that is also readable as it is."""
    shown = [(peer, base) for peer, base in compared if peer in peers and base in peers]
    header = [
        "",
        *(peer.title for peer in peers),
        *(f"{peer.title} to {base.title}" for peer, base in shown),
    ]
    rows = [header]
    for line in lines:
        values = [_value(line, peer.name) for peer in peers]
        rows.append(
            [line.title, *values, *(_times(ratio(line, peer.name, base.name)) for peer, base in shown)]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(
        "| "
        + " | ".join(
            _cell(text, width, is_first=not i)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in rows
    )


def _cell(text: str, width: int, *, is_first: bool) -> str:
    return text.ljust(width) if is_first else text.rjust(width)


def _value(line: Line, peer: str) -> str:
    value = line.values.get(peer)
    if value is None:
        return _NOTHING
    return f"{number(value)} {line.unit}".strip()


def _times(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.2f}x"


def number(value: float) -> str:
    """Three digits that count, and no more of a fraction than that."""
    if float(value).is_integer() or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"
