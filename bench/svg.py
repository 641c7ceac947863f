# SPDX-License-Identifier: GPL-2.0-or-later
"""Pictures of lines and bars as SVG: the same text for the same numbers, and nothing needed to draw it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from .table import number

WIDTH, HEIGHT = 480, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 20, 34, 62
_AXIS = HEIGHT - _BOTTOM
_GREY = "#dddddd"


@dataclass(frozen=True, slots=True)
class Lines:
    """A line for each name, through points of x, on a logarithmic axis, and y.

    ``limit`` is drawn across, with its words.
    """

    title: str
    x_title: str
    ticks: Sequence[float]
    points: Mapping[str, Sequence[tuple[float, float]]]
    is_log: bool = False
    limit: tuple[float, str] | None = None

    def svg(self, colours: Mapping[str, str]) -> Iterator[str]:
        tops = [y for points in self.points.values() for _, y in points]
        if self.limit is not None:
            tops.append(self.limit[0])
        marks = _decades(min(tops), max(tops)) if self.is_log else _steps(max(tops))

        def x_of(x: float) -> float:
            part = math.log(x / self.ticks[0]) / math.log(self.ticks[-1] / self.ticks[0])
            return _LEFT + part * (WIDTH - _LEFT - _RIGHT)

        def y_of(y: float) -> float:
            low, high = marks[0], marks[-1]
            part = math.log(y / low) / math.log(high / low) if self.is_log else y / high
            return _AXIS - part * (_AXIS - _TOP)

        for mark in marks:
            yield _line(_LEFT, y_of(mark), WIDTH - _RIGHT, y_of(mark), _GREY)
            yield _text(_LEFT - 6, y_of(mark) + 4, number(mark), "end")
        for tick in self.ticks:
            yield _line(x_of(tick), _TOP, x_of(tick), _AXIS, _GREY)
            yield _text(x_of(tick), _AXIS + 15, f"{tick:,.0f}", "middle")
        yield _text((WIDTH + _LEFT) / 2, _AXIS + 31, self.x_title, "middle")
        if self.limit is not None:
            y, words = self.limit
            yield _line(_LEFT, y_of(y), WIDTH - _RIGHT, y_of(y), "black", 'stroke-dasharray="3 3"')
            yield _text(_LEFT + 5, y_of(y) - 4, words)
        for name, points in self.points.items():
            places = [(x_of(x), y_of(y)) for x, y in points]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            yield f'<polyline points="{path}" fill="none" stroke="{colours[name]}" stroke-width="2"/>'
            for x, y in places:
                yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colours[name]}"/>'
        yield from _legend(list(self.points), colours)


@dataclass(frozen=True, slots=True)
class Bars:
    """A bar for each name, of parts that lie end to end, in ``unit``."""

    title: str
    unit: str
    parts: Mapping[str, Mapping[str, float]]

    def svg(self, colours: Mapping[str, str]) -> Iterator[str]:
        marks = _steps(max(sum(parts.values()) for parts in self.parts.values()))
        left = _LEFT + 50

        def x_of(x: float) -> float:
            return left + x / marks[-1] * (WIDTH - left - _RIGHT - 40)

        for mark in marks:
            yield _line(x_of(mark), _TOP, x_of(mark), _AXIS, _GREY)
            yield _text(x_of(mark), _AXIS + 15, number(mark), "middle")
        yield _text((WIDTH + left) / 2, _AXIS + 31, self.unit, "middle")
        height = (_AXIS - _TOP) / len(self.parts)
        for place, (name, parts) in enumerate(self.parts.items()):
            top, end = _TOP + place * height, 0.0
            yield _text(left - 6, top + height / 2 + 4, name, "end")
            for part, length in parts.items():
                x, width = x_of(end), x_of(end + length) - x_of(end)
                box = f'x="{x:.1f}" y="{top + height / 5:.1f}" width="{width:.1f}"'
                yield f'<rect {box} height="{height * 3 / 5:.1f}" fill="{colours[part]}"/>'
                end += length
            yield _text(x_of(end) + 5, top + height / 2 + 4, number(end))
        yield from _legend(
            list(dict.fromkeys(part for parts in self.parts.values() for part in parts)), colours
        )


def draw(panels: Sequence[Lines | Bars], colours: Mapping[str, str]) -> str:
    """The picture: panels, two in a row, each with the names of its colours below."""
    width, height = min(2, len(panels)) * WIDTH, -(-len(panels) // 2) * HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for place, panel in enumerate(panels):
        x, y = place % 2 * WIDTH, place // 2 * HEIGHT
        title = f'<text x="{_LEFT}" y="20" font-size="13" font-weight="bold">{escape(panel.title)}</text>'
        parts += [f'<g transform="translate({x} {y})">', title, *panel.svg(colours), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def _steps(top: float) -> list[float]:
    """From 0 to the top or a little above: three to six round numbers."""
    step = 10.0 ** math.floor(math.log10(top))
    step = next(step * part for part in (0.2, 0.5, 1, 2) if step * part * 5 >= top)
    return [step * count for count in range(math.ceil(top / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten, from below the lowest to above the highest."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


def _line(x: float, y: float, to_x: float, to_y: float, colour: str, more: str = "") -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{colour}" {more}/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _legend(names: Sequence[str], colours: Mapping[str, str]) -> Iterator[str]:
    for place, name in enumerate(names):
        x, y = _LEFT + place * (WIDTH - _LEFT) / len(names), HEIGHT - 14
        yield f'<rect x="{x:.1f}" y="{y - 9}" width="10" height="10" fill="{colours[name]}"/>'
        yield _text(x + 14, y, name)
