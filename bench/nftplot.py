# SPDX-License-Identifier: GPL-2.0-or-later
"""Forwards by nft beside the other ways, drawn: a bar for each way in each of four panels."""

from collections.abc import Mapping, Sequence

from .lines import Line, Named
from .svg import Bars, draw

_COLOURS = {"routed": "#888888", "recipe": "#d1495b", "nft": "#00798c", "mux": "#edae49"}
_PANELS = {
    "connect-median": "new connection, median (less is better)",
    "round-trip-median": "round trip of one byte, median (less is better)",
    "bulk-upload": "one stream, client to server (more is better)",
    "datagrams": "datagrams of 64 bytes (more is better)",
}


def picture(lines: Mapping[str, Line], ways: Sequence[type[Named]]) -> str:
    """An SVG of those lines that have a panel, by their keys."""
    panels = []
    for key, title in _PANELS.items():
        values = lines[key].values
        parts = {way.name: {way.name: values[way.name]} for way in ways if way.name in values}
        panels.append(Bars(title, lines[key].unit, parts))
    return draw(panels, _COLOURS)
