# SPDX-License-Identifier: GPL-2.0-or-later
"""The growth drawn: rate, latency and memory beside 1 to 10,000 held connections, one line for each peer."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl

from .step import Step

mpl.use("svg")
# The same picture from the same numbers: no random ids, no date.
mpl.rcParams["svg.hashsalt"] = "growth"
mpl.rcParams["svg.fonttype"] = "none"
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of the backend

_COLOURS = {"direct": "#888888", "socat": "#d1495b", "call": "#edae49", "mux": "#00798c"}
_GOAL_KIB = 24


def draw(found: Sequence[Step], file: Path) -> None:
    """Write the picture, an SVG."""
    panels: tuple[tuple[str, str, str, Callable[[Step], float | None]], ...] = (
        ("new connections, 16 clients at once", "log", "connections / s", lambda step: step.rate),
        ("new connection, one at a time, median", "log", "ms", lambda step: step.connect_ms),
        ("round trip of one byte, median", "linear", "ms", lambda step: step.round_trip_ms),
        (
            "memory for each held connection",
            "linear",
            "KiB, without the lab's own",
            lambda step: step.each_kib or None,
        ),
    )
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for axis, (title, scale, unit, value) in zip(axes.flat, panels, strict=True):
        for peer, colour in _COLOURS.items():
            points = [
                (step.held, y) for step in found if step.peer == peer and (y := value(step)) is not None
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", color=colour, label=peer)
        axis.set(xscale="log", yscale=scale, title=title, ylabel=unit, xlabel="connections held")
        if scale == "linear":
            axis.set_ylim(bottom=0)
        axis.grid(visible=True, which="major", alpha=0.3)
        axis.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda y, _: f"{y:g}"))
        axis.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes[1][1].axhline(_GOAL_KIB, color="black", linestyle=":", linewidth=1)
    axes[1][1].annotate(
        "goal: at most 24 KiB", (1, _GOAL_KIB), xytext=(0, 3), textcoords="offset points", fontsize=8
    )
    axes[0][0].legend(loc="lower right")
    figure.savefig(file, metadata={"Date": None})
