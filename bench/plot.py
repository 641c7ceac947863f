# SPDX-License-Identifier: GPL-2.0-or-later
"""The pictures of docs/numbers.md."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .held import Held
from .record import Record
from .step import Step
from .streamrows import PAYLOADS, STREAMS, WAYS
from .svg import Bars, Lines, draw

_HELD = (1, 10, 100, 1000, 10_000, 50_000)
_GOAL = (4.0, "goal: at most 4 KiB")
_PEERS = {
    "direct": "#888888",
    "socat": "#d1495b",
    "call": "#edae49",
    "call-ours": "#8d6a9f",
    "mux": "#00798c",
}
# The listener stands for socat where that is measured.
_WHOSE = {"listener": "#00798c", "service": "#66b2bf", "lab": "#cccccc", "ended": "#edae49"}
_KINDS = {"upload": "a MiB, client to server", "download": "a MiB, server to client"}
_KINDS |= {"round-trip": "a round trip", "connect": "a connection"}


def growth(steps: Sequence[Step], held: Sequence[Held]) -> str:
    """Rate and latency beside 1 to 10,000 held connections, and what each of up to 50,000 takes."""
    panels = [
        _beside("new connections a second, 16 clients at once", steps, lambda step: step.rate),
        _beside("new connection, one at a time, median in ms", steps, lambda step: step.connect_ms),
        _beside("round trip of one byte, median in ms", steps, lambda step: step.round_trip_ms),
        Lines(
            "memory for each held connection, mux, in KiB",
            "connections held",
            _HELD,
            {
                "both": [(step.held, step.each_kib) for step in held],
                "listener": [(step.held, step.listener_kib / step.held) for step in held],
                "service": [(step.held, step.service_kib / step.held) for step in held],
            },
            limit=_GOAL,
        ),
    ]
    return draw(panels, _PEERS | _WHOSE | {"both": "black"})


def _beside(title: str, steps: Sequence[Step], value: Callable[[Step], float]) -> Lines:
    peers = dict.fromkeys(step.peer for step in steps)
    points = {peer: [(step.held, value(step)) for step in steps if step.peer == peer] for peer in peers}
    return Lines(title, "connections held", _HELD[:-1], points, is_log=True)


def payload(run: Record) -> str:
    """The round trip against the payload."""
    lines = {size: run.line(f"payload-{size}").values for size in PAYLOADS}
    return draw([_lines("round trip, median in ms", "bytes there and back", lines, is_log=True)], _PEERS)


def streams(run: Record) -> str:
    """The rate of all streams together, and the processor time for a MiB, against their number."""
    panels = []
    for key, title in (("", "all streams together, MiB/s"), ("-processor", "processor time for a MiB, ms")):
        for way, whither in WAYS.items():
            lines = {count: run.line(f"streams-{way}-{count}{key}").values for count in STREAMS}
            if key:
                lines = {count: _without_direct(values) for count, values in lines.items()}
            panels.append(_lines(f"{title}, {whither}", "streams", lines, is_log=not key))
    return draw(panels, _PEERS)


def _without_direct(values: Mapping[str, float]) -> dict[str, float]:
    return {peer: value for peer, value in values.items() if peer != "direct"}


def _lines(title: str, x_title: str, lines: Mapping[int, Mapping[str, float]], **kept: Any) -> Lines:
    peers = dict.fromkeys(peer for values in lines.values() for peer in values)
    points = {peer: [(x, values[peer]) for x, values in lines.items() if peer in values] for peer in peers}
    return Lines(title, x_title, list(lines), points, **kept)


def processor(run: Record) -> str:
    """Whose processor time it is, for a MiB each way, a round trip and a connection."""
    panels = []
    for key, title in _KINDS.items():
        lines = {part: run.line(f"processor-{key}-{part}") for part in _WHOSE}
        unit = lines["listener"].unit
        peers = _without_direct(lines["listener"].values)
        parts = {peer: {part: line.values[peer] for part, line in lines.items()} for peer in peers}
        panels.append(Bars(f"processor time for {title}, {unit}", unit, parts))
    return draw(panels, _WHOSE)
