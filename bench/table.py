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
    """A column for each peer, and one for each pair that is compared."""
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
    return markdown(rows, left=1)


def markdown(rows: Sequence[Sequence[str]], *, left: int = 0) -> str:
    """Rows below the first as a Markdown table that is also readable as it is. So many columns from the
    ``left`` have text, the others numbers.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    line = ["-" * width if at < left else "-" * (width - 1) + ":" for at, width in enumerate(widths)]
    found = []
    for row in (rows[0], line, *rows[1:]):
        texts = zip(row, widths, strict=True)
        cells = [text.ljust(w) if at < left else text.rjust(w) for at, (text, w) in enumerate(texts)]
        found.append(f"| {' | '.join(cells)} |")
    return "\n".join(found)


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
