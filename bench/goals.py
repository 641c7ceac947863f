# SPDX-License-Identifier: GPL-2.0-or-later
"""The goals, and what the runs found of each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .admin import Row
from .held import Held
from .record import Record
from .table import markdown, number, ratio

_HELD = 10_000
_WHITHER = ("upload", "download")


@dataclass(frozen=True, slots=True)
class Found:
    """What was found; ``before`` is the state that the goals were set for, which took turns with ``since``.

    ``why_not_all`` says why fewer than 50,000 connections were held; ``turn_s`` is the window's longest turn
    after its start.
    """

    before: Record
    since: Record
    connect: Record
    stream: Record
    fair: Record
    held: Sequence[Held]
    why_not_all: str | None
    admin: Sequence[Row]
    turn_s: float


class Goal(NamedTuple):
    """A goal, what was found, and whether that meets it; None if it cannot be measured."""

    text: str
    found: str
    is_met: bool | None


def goals(found: Found) -> Iterator[Goal]:
    """All of them, in words."""
    rates = [_times(found.stream, f"bulk-{way}") for way in _WHITHER]
    yield Goal("one stream is at least as fast as over `call`", _both(rates), min(rates) >= 1)
    used = [1 / _times(found.stream, f"processor-{way}-own") for way in _WHITHER]
    yield Goal(
        "for a MiB listener and service use at most 1.2 times the processor time of the listener over `call`",
        _both(used),
        max(used) <= 1.2,
    )
    trip = 1 / _times(found.stream, "round-trip-median")
    yield Goal(
        "a round trip takes at most 1.2 times as long as over `call`", f"{trip:.2f} times", trip <= 1.2
    )
    many = _since(found, "many-rate")
    yield Goal("16 clients get 2.5 times the connections of before", f"{many:.2f} times", many >= 2.5)
    connect = 1 / _since(found, "connect-median")
    yield Goal("a new connection takes at most half of the time", f"{connect:.2f} of it", connect <= 0.5)
    (many_held,) = (step for step in found.held if step.held == _HELD)
    each = f"{number(many_held.each_kib)} KiB"
    yield Goal("at most 4 KiB for each of 10,000 held connections", each, many_held.each_kib <= 4)
    most = found.held[-1]
    alive = f"{most.alive} of {most.held} alive"
    if found.why_not_all is not None:
        yield Goal(
            "50,000 held in one listener, and alive", f"{alive}, all that the machine lets it hold", None
        )
    else:
        yield Goal("50,000 held in one listener, and alive", alive, most.alive == most.held >= 50_000)
    ours = [_times(found.connect, key, "call-ours") for key in ("connect-median", "many-rate")]
    yield Goal(
        "`call` to our own service is no slower than to the stock one",
        f"{ours[0]:.2f} times as fast, {ours[1]:.2f} times with 16 clients",
        min(ours) >= 1,
    )
    for key, limit, where in _FAIR:
        worst = found.fair.line(f"fair-{key}").values["mux"]
        text = f"99 of 100 round trips {where} take under {limit} ms, in the worst round"
        yield Goal(text, f"{number(worst)} ms", worst < limit)
    for row in found.admin:
        if row.goal_s is not None:
            text = f"dom0, {row.title}: at most {row.goal_s:.2g} s of processor time"
            yield Goal(text, f"{row.processor_s:.2g} s", row.is_met)
    turn_ms = 1000 * found.turn_s
    yield Goal(
        "no turn of the window takes longer than 50 ms, but for its start", f"{turn_ms:.0f} ms", turn_ms <= 50
    )


_FAIR = (
    ("upload", 20, "beside a stream to the server"),
    ("download", 20, "beside a stream to the client"),
    ("stalled", 50, "beside 63 streams that nobody reads"),
)


def _times(run: Record, key: str, peer: str = "mux") -> float:
    """How many times better than ``call`` a peer is. Raises KeyError if one of both is missing."""
    found = ratio(run.line(key), peer, "call")
    if found is None:
        raise KeyError(key)
    return found


def _since(found: Found, key: str) -> float:
    """How many times better mux is than before. Raises KeyError."""
    line, before = found.since.line(key), found.before.line(key).values["mux"]
    return before / line.values["mux"] if line.is_less_better else line.values["mux"] / before


def _both(times: Sequence[float]) -> str:
    return f"{times[0]:.2f} times to the server, {times[1]:.2f} to the client"


_VERDICTS = {True: "met", False: "**missed**", None: "not measured"}


def render(found: Iterator[Goal]) -> str:
    """A Markdown table."""
    rows = [["goal", "found", ""]]
    rows += [[text, said, _VERDICTS[is_met]] for text, said, is_met in found]
    return markdown(rows, left=3)
