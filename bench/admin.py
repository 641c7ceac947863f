# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m bench admin``: what dom0's side takes with many rules. It needs no broker and opens nothing.

Functions are timed in this process, commands from the start of the program to its end. What counts is
processor time, which other work disturbs less, and on Qubes all qubes share.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.apply import differences
from qubes_fwd_qrexec.admin.snapshot import Snapshot, read_rule, read_rules
from qubes_fwd_qrexec.common.exchange import print_lines
from qubes_fwd_qrexec.common.rules import NamedRule
from qubes_fwd_qrexec.lab.blueprint import create_lab
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.store import LabStore

from . import machine
from .admincalls import open_system
from .adminlab import Spent, command, make_lab, run

QUBES = 300
RULES = 1500
_ROUNDS = 5
# How much longer than the interpreter alone the program may take where it has nothing to do.
_HELP_MAX = 3.5
# In dom0 there is no lab, so what a disk takes for its files says nothing.
_MEMORY = "/dev/shm"  # noqa: S108
_ADD = ("add", "app-1", "900", "--from", "any", "--name", "new")
_SET = ("set", "app-1", "new", "srchosts=10.0.0.0/8")
_REMOVE = ("remove", "app-1", "new")


@dataclass(frozen=True, slots=True)
class Row:
    """What was done, what each round of it took, and how much processor time it may take in the middle."""

    title: str
    spent: Sequence[Spent]
    goal_s: float | None = None

    @property
    def seconds(self) -> float:
        return statistics.median(each.seconds for each in self.spent)

    @property
    def processor_s(self) -> float:
        return statistics.median(each.processor_s for each in self.spent)

    @property
    def is_met(self) -> bool:
        return self.goal_s is None or self.processor_s <= self.goal_s


def measure(place: Path) -> list[Row]:
    """All rows, in labs below ``place``; every rule is live."""
    empty, lab = make_lab(place / "empty", QUBES, 0), make_lab(place / "lab", QUBES, RULES)
    inventory = LabStore(lab).inventory()
    rules = [entry for entry in read_rules(inventory).values() if isinstance(entry, NamedRule)]
    document = print_lines(rules, {})
    rows = [*_starts(create_lab(place / "none")), *_functions(lab)]
    rows.append(Row("first apply", _each(_copies(lab, place), lambda copy: command(copy, "apply"))))
    command(lab, "apply")
    rows += _commands(lab, rules[0])
    imported = _each(_copies(empty, place), lambda copy: command(copy, "import", stdin=document))
    return [*rows, Row("import of all rules", imported, 2.5)]


def _starts(empty: LabDirectory) -> Iterator[Row]:
    """What a command takes where it has nothing to do, beside the interpreter alone."""
    alone = Row("start: python3 alone", _times(lambda: run("-c", "pass")))
    yield alone
    yield Row("start: --help", _times(lambda: command(empty, "--help")), _HELP_MAX * alone.processor_s)
    yield Row("start: list, no rules", _times(lambda: command(empty, "list")))


def _functions(lab: LabDirectory) -> Iterator[Row]:
    store, now = LabStore(lab), time.time()
    inventory = store.inventory()
    snapshot = Snapshot(inventory, read_rules(inventory))
    planned = snapshot.plan(now)
    if len(planned.live) != RULES:
        raise RuntimeError(f"{len(planned.live)} of {RULES} rules are live")
    installed = store.read_policy()
    yield Row("read all qubes", _within(store.inventory))
    yield Row("read all rules", _within(lambda: read_rules(inventory), before=read_rule.cache_clear))
    yield Row("plan", _within(lambda: snapshot.plan(now)))
    yield Row("plan again", _within(lambda: snapshot.plan(now, known=planned)))
    yield Row("policy", _within(lambda: policy.text(planned)))
    yield Row("find the differences", _within(lambda: differences(planned, inventory, installed)))


def _commands(lab: LabDirectory, some: NamedRule) -> Iterator[Row]:
    """Commands on a lab to which the rules were applied, which leave it as it was."""
    yield Row("list", _times(lambda: command(lab, "list")), 0.6)
    yield Row("list of one qube", _times(lambda: command(lab, "list", "sys-net")), 0.6)
    yield Row("list --json", _times(lambda: command(lab, "list", "--json")))
    yield Row("show of one forward", _times(lambda: command(lab, "show", some.target, some.name)))
    yield Row("export", _times(lambda: command(lab, "export")))
    yield Row("apply with nothing to change", _times(lambda: command(lab, "apply")), 0.9)
    rounds = [[command(lab, *argv) for argv in (_ADD, _SET, _REMOVE)] for _ in range(_ROUNDS)]
    for title, *spent in zip(("add", "set", "remove"), *rounds, strict=True):
        yield Row(str(title), [each for each in spent if isinstance(each, Spent)], 1.2)
    held = [[command(lab, argv) for argv in ("panic", "resume")] for _ in range(_ROUNDS)]
    for title, *spent in zip(("panic", "resume"), *held, strict=True):
        yield Row(str(title), [each for each in spent if isinstance(each, Spent)])


def _copies(lab: LabDirectory, place: Path) -> Iterator[LabDirectory]:
    """As many copies as there are rounds, each gone when the next one comes."""
    for _ in range(_ROUNDS):
        with tempfile.TemporaryDirectory(dir=place) as copy:
            yield LabDirectory.open(shutil.copytree(lab.root, Path(copy, "lab"), symlinks=True))


def _each(labs: Iterator[LabDirectory], action: Callable[[LabDirectory], Spent]) -> list[Spent]:
    return [action(lab) for lab in labs]


def _times(action: Callable[[], Spent]) -> list[Spent]:
    return [action() for _ in range(_ROUNDS)]


def _within(action: Callable[[], object], *, before: Callable[[], object] = lambda: None) -> list[Spent]:
    """What a function takes in this process."""
    found = []
    for _ in range(_ROUNDS):
        before()
        begun, used = time.perf_counter(), time.process_time()
        action()
        found.append(Spent(time.perf_counter() - begun, time.process_time() - used))
    return found


def calls(place: Path) -> dict[str, Mapping[str, int]]:
    """How many calls each command makes on a Qubes system of the same size, by whom it asks."""
    lab = make_lab(place / "qubes", QUBES, RULES)
    with open_system(lab, place / "root") as system:
        todo = [("apply",), ("apply",), ("list",), _ADD, _SET, _REMOVE]
        titles = ["first apply", "apply with nothing to change", "list", "add", "set", "remove"]
        found = {title: system.calls(*argv) for title, argv in zip(titles, todo, strict=True)}
        found["import with nothing new"] = system.calls("import", stdin=_document(lab))
    return found


def _document(lab: LabDirectory) -> str:
    stored = read_rules(LabStore(lab).inventory()).values()
    return print_lines([entry for entry in stored if isinstance(entry, NamedRule)], {})


def table(rows: Sequence[Row]) -> str:
    """A Markdown table that is also readable as it is."""
    width = max(len(row.title) for row in rows)
    lines = [
        f"| {'':{width}} |  elapsed | processor | at most |",
        f"| {'-' * width} | -------: | --------: | ------- |",
    ]
    for row in rows:
        goal = "" if row.goal_s is None else f"{row.goal_s:.3g} s{'' if row.is_met else ' MISSED'}"
        lines.append(f"| {row.title:{width}} | {row.seconds:6.3f} s | {row.processor_s:7.3f} s | {goal:7} |")
    return "\n".join(lines)


def calls_table(found: Mapping[str, Mapping[str, int]]) -> str:
    """The same for calls."""
    width = max(map(len, found))
    lines = [f"| {'':{width}} | qubesd | policy API |", f"| {'-' * width} | -----: | ---------: |"]
    for title, each in found.items():
        lines.append(f"| {title:{width}} | {each['qubesd']:6} | {each['policy']:10} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Exit status 1 if a goal was missed."""
    parser = argparse.ArgumentParser(prog="python -m bench admin", description=__doc__.split("\n")[0])
    parser.add_argument("--calls", action="store_true", help="count the calls on the Admin API too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    args, about = parser.parse_args(argv), machine.describe()
    counted: dict[str, Mapping[str, int]] = {}
    with tempfile.TemporaryDirectory(
        prefix="bench-admin-", dir=_MEMORY if os.path.isdir(_MEMORY) else None
    ) as place:
        rows = measure(Path(place))
        print(table(rows))
        print(f"\n{RULES} rules over {QUBES} qubes; medians of {_ROUNDS} rounds.")
        if args.calls:
            counted = calls(Path(place))
            print(f"\n{calls_table(counted)}")
    print("; ".join(f"{name}: {fact}" for name, fact in about.items()) + ".")
    if args.json is not None:
        document = {"machine": about, "qubes": QUBES, "rules": RULES, "calls": counted}
        document["rows"] = [asdict(row) for row in rows]
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0 if all(row.is_met for row in rows) else 1
