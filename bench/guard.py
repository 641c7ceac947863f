# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m bench guard``: has something become slower? Under a minute, beside a run that is stored.

Compared are ratios of one peer to another in the same round, since machines differ, and so does a machine
from hour to hour. What became worse is measured a second time, and told if it is so again.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import machine, record
from .effort import GUARD
from .lines import Line
from .peers import COMPARED, USUAL, usable
from .processes import BenchError
from .record import Record
from .rows import ROWS
from .stage import open_stage

STORED = Path(__file__).parents[1] / "docs" / "numbers" / "guard.json"
_ROWS = ("connect", "many", "round-trip", "bulk", "processor")
_MOVED = 1.25
_ADVICE = """\
If it is meant, say so in the commit, and store this state: make bench-quick ARGS=--store
If not, run this on the state before as well, on a machine that does nothing else; python -m bench --rows
processor tells whose processor time grew."""


@dataclass(frozen=True, slots=True)
class Move:
    """A ratio that moved: how many times better ``peer`` is than ``base``, then and now."""

    key: str
    title: str
    peer: str
    base: str
    before: float
    now: float

    @property
    def is_worse(self) -> bool:
        return self.now < self.before

    def __str__(self) -> str:
        times = self.before / self.now if self.is_worse else self.now / self.before
        word = "worse" if self.is_worse else "better"
        pair = f"{self.peer} to {self.base}"
        ratios = f"{self.before:.2f}x, now {self.now:.2f}x"
        return f"{word} by {100 * (times - 1):.0f} %: {self.title}, {pair}: {ratios}"


def moves(stored: Record, now: Record) -> list[Move]:
    """What moved by more than a quarter, and is in both runs; the worst first."""
    found = []
    for title, line, peer, base in _compared(now):
        try:
            before, after = _ratio(stored.line(line.key), peer, base), _ratio(line, peer, base)
        except KeyError:
            continue
        if before and after and not 1 / _MOVED <= after / before <= _MOVED:
            found.append(Move(line.key, title, peer, base, before, after))
    return sorted(found, key=lambda move: move.now / move.before)


def _compared(run: Record) -> Iterator[tuple[str, Line, str, str]]:
    """Each line that tells something here, with the pairs of its peers. The slowest hundredth is chance."""
    first = ""
    for result in run.results.values():
        for line in result.lines:
            first = line.title.partition(":")[0] if not line.title.startswith(" ") else first
            if line.is_compared and line.rounds and not line.key.endswith("-p99"):
                title = line.title if not line.title.startswith(" ") else f"{first}: {line.title.strip()}"
                yield from ((title, line, peer.name, base.name) for peer, base in COMPARED)


def _ratio(line: Line, peer: str, base: str) -> float:
    """The median of the rounds. Raises KeyError if one of both was not measured."""
    pairs = zip(line.rounds[peer], line.rounds[base], strict=True)
    ratios = [
        (other / mine if line.is_less_better else mine / other) for mine, other in pairs if mine and other
    ]
    return statistics.median(ratios) if ratios else 0.0


def judge(stored: Record, now: Record, again: Callable[[Sequence[str]], Record]) -> list[Move]:
    """What moved. Rows in which something became worse are measured again, and that counts if it stays so."""
    found = moves(stored, now)
    worse = {move.key for move in found if move.is_worse}
    rows = [row for row, result in now.results.items() if worse & {line.key for line in result.lines}]
    if rows:
        kept = {(move.key, move.peer, move.base) for move in moves(stored, again(rows)) if move.is_worse}
        found = [move for move in found if not move.is_worse or (move.key, move.peer, move.base) in kept]
    return found


def measure(rows: Sequence[str]) -> Record:
    """Raises `BenchError`."""
    facts = machine.describe()
    results = {}
    with open_stage(usable([peer.name for peer in USUAL])) as stage:
        for row in rows:
            print(f"measuring {row} ...", file=sys.stderr)
            results[row] = ROWS[row](stage, GUARD)
    return Record(facts, results)


def main(arguments: list[str]) -> int:
    """Exit status 1 if something became worse, or failed."""
    parser = argparse.ArgumentParser(prog="python -m bench guard", description=__doc__)
    parser.add_argument("--store", action="store_true", help="store this run instead of comparing with it")
    parser.add_argument("--json", type=Path, default=STORED, metavar="FILE", help="the run that is stored")
    args = parser.parse_args(arguments)
    try:
        now = measure(_ROWS)
        if args.store:
            record.write(args.json, now)
            return 0
        stored = record.read(args.json)
        found = judge(stored, now, measure)
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1
    for text in (*(problems := _problems(now)), *found):
        print(text)
    if stored.machine["processor"] != now.machine["processor"]:
        print(f"The stored run is of another machine: {stored.machine['processor']}.")
    if problems or any(move.is_worse for move in found):
        print(_ADVICE)
        return 1
    print("Nothing became worse.")
    return 0


def _problems(now: Record) -> list[str]:
    """What failed, in words."""
    lost = now.line("many-lost")
    hung = [f"{lost.title}: {count:.0f} of {name}" for name, count in lost.values.items() if count]
    return [note for result in now.results.values() for note in result.notes] + hung
