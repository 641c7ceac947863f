# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m bench page``: makes the tables and pictures of docs/numbers.md from the runs in docs/numbers.

What is between ``<!-- made: KIND RUN ... -->`` and ``<!-- end -->`` is made, and all else is written by hand.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import admin, goals, growth, held, plot, record, window
from .admin import Row
from .adminlab import Spent
from .goals import Found
from .held import Held
from .peers import PEERS, Call, CallOurs, MuxCall, Socat
from .record import Record
from .step import Step
from .table import render
from .windowturns import START

PAGE = Path(__file__).parents[1] / "docs" / "numbers.md"
PLACE = PAGE.with_suffix("")
_COMPARED = ((CallOurs, Call), (MuxCall, Socat), (MuxCall, Call))
_MADE = re.compile(r"(<!-- made: (?P<words>[^>]+) -->\n).*?(\n?<!-- end -->)", re.DOTALL)


def made(text: str, place: Path = PLACE) -> str:
    """The page's text, with all that is made of the runs. Raises ValueError if it asks for something else."""

    def make(found: re.Match[str]) -> str:
        kind, *runs = found["words"].split()
        if kind not in _KINDS:
            raise ValueError(f"{kind!a} is not made; there are {', '.join(_KINDS)}")
        return f"{found[1]}\n{_KINDS[kind](place, runs)}\n\n<!-- end -->"

    return _MADE.sub(make, text)


def pictures(place: Path = PLACE) -> dict[str, str]:
    """Each by the name of its file."""
    return {
        "growth.svg": plot.growth(_steps(place), _held(place)),
        "payload.svg": plot.payload(_record(place, "payload")),
        "streams.svg": plot.streams(_record(place, "streams")),
        "processor.svg": plot.processor(_record(place, "stream")),
    }


def _table(place: Path, runs: Sequence[str]) -> str:
    """Of processor time only what compares peers; a picture has the rest."""
    results = [result for run in runs for result in _record(place, run).results.values()]
    lines = [line for result in results for line in result.lines]
    lines = [line for line in lines if line.is_compared or not line.key.startswith("processor-")]
    measured = {peer for line in lines for peer in line.values}
    return render(lines, [peer for peer in PEERS if peer.name in measured], _COMPARED)


def _facts(place: Path, runs: Sequence[str]) -> str:
    """On what machine it was measured, how often, and what failed."""
    documents = [_document(place, run) for run in runs]
    machines = [document["machine"] for document in documents]
    loads = sorted(float(facts["load before"]) for facts in machines)
    about = [f"{name}: {fact}" for name, fact in machines[0].items() if name in _MACHINE]
    parts = [f"- {'; '.join(about)}; load before: {loads[0]} to {loads[-1]}."]
    for document in documents:
        for row, result in document.get("rows", {}).items():
            parts.append(f"- {row}: {'; '.join((result['samples'], *result['notes']))}.")
    return "\n".join(parts)


_MACHINE = ("date", "processor", "kernel", "Python", "trio", "socat")


def _growth(place: Path, runs: Sequence[str]) -> str:
    return growth.render(_steps(place))


def _held_table(place: Path, runs: Sequence[str]) -> str:
    reason = _document(place, "held")["reason"]
    table = held.render(_held(place))
    return table if reason is None else f"{table}\n\nHeld: {reason}."


def _goals(place: Path, runs: Sequence[str]) -> str:
    kept = ("before", "since", "connect", "stream", "fair")
    before, since, connect, stream, fair = (_record(place, run) for run in kept)
    longest = max(
        phase["longest_s"]
        for phases in _document(place, "window")["systems"].values()
        for name, phase in phases.items()
        if name != START
    )
    reason = _document(place, "held")["reason"]
    found = Found(before, since, connect, stream, fair, _held(place), reason, _admin_rows(place), longest)
    return goals.render(goals.goals(found))


def _admin(place: Path, runs: Sequence[str]) -> str:
    document = _document(place, "admin")
    calls = admin.calls_table(document["calls"])
    return f"{admin.table(_admin_rows(place))}\n\n{calls}\n\n{_size(document)}"


def _window(place: Path, runs: Sequence[str]) -> str:
    document = _document(place, "window")
    return f"{window.table(document['systems'])}\n\n{_size(document)}"


def _size(document: Mapping[str, Any]) -> str:
    load = document["machine"]["load before"]
    return f"{document['rules']} rules over {document['qubes']} qubes; load before: {load}."


_KINDS: dict[str, Callable[[Path, Sequence[str]], str]] = {
    "table": _table,
    "facts": _facts,
    "growth": _growth,
    "held": _held_table,
    "goals": _goals,
    "admin": _admin,
    "window": _window,
}


def _document(place: Path, run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / f"{run}.json").read_text(encoding="utf-8"))
    return found


def _record(place: Path, run: str) -> Record:
    return record.read(place / f"{run}.json")


def _steps(place: Path) -> list[Step]:
    return [Step(**step) for step in _document(place, "growth")["steps"]]


def _held(place: Path) -> list[Held]:
    return [Held(**step) for step in _document(place, "held")["steps"]]


def _admin_rows(place: Path) -> list[Row]:
    rows = _document(place, "admin")["rows"]
    return [Row(row["title"], [Spent(*spent) for spent in row["spent"]], row["goal_s"]) for row in rows]


def main(arguments: list[str]) -> int:
    argparse.ArgumentParser(prog="python -m bench page", description=__doc__).parse_args(arguments)
    PAGE.write_text(made(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for name, picture in pictures().items():
        (PLACE / name).write_text(picture, encoding="utf-8")
    return 0
