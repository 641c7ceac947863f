# SPDX-License-Identifier: GPL-2.0-or-later
"""Forwards by nft beside the other ways, drawn: a bar for each way in each of four panels."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

from .lines import Line, Named
from .table import number

mpl.use("svg")
# The same picture from the same numbers: no random ids, no date.
mpl.rcParams["svg.hashsalt"] = "nft"
mpl.rcParams["svg.fonttype"] = "none"
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of the backend

_COLOURS = {"routed": "#888888", "recipe": "#d1495b", "nft": "#00798c", "mux": "#edae49"}
_PANELS = {
    "connect-median": "new connection, median (less is better)",
    "round-trip-median": "round trip of one byte, median (less is better)",
    "bulk-upload": "one stream, client to server (more is better)",
    "datagrams": "datagrams of 64 bytes (more is better)",
}


def draw(lines: Mapping[str, Line], ways: Sequence[type[Named]], file: Path) -> None:
    """Write the picture, an SVG, of those lines that have a panel, by their keys."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 5), layout="constrained")
    for axis, (key, title) in zip(axes.flat, _PANELS.items(), strict=True):
        line = lines[key]
        names = [way for way in reversed(ways) if way.name in line.values]
        bars = axis.barh(
            [way.title for way in names],
            [line.values[way.name] for way in names],
            color=[_COLOURS[way.name] for way in names],
        )
        axis.bar_label(bars, [f" {number(line.values[way.name])}" for way in names], fontsize=8)
        axis.set(title=title, xlabel=line.unit)
        axis.margins(x=0.15)
        axis.grid(visible=True, axis="x", alpha=0.3)
    figure.savefig(file, metadata={"Date": None})
