# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m bench admin``: what dom0's side takes with many rules. It needs no broker and opens nothing.

A lab of 200 qubes with 1,000 rules, most of them at one exposed qube, which is the worst for finding
conflicts. Functions are timed in this process, commands from the start of the program to its end.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.apply import differences
from qubes_fwd_qrexec.admin.snapshot import Snapshot, read_rules
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.blueprint import create_lab
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.qube import Qube
from qubes_fwd_qrexec.lab.store import LabStore

from . import machine

QUBES = 200
RULES = 1000
_ROUNDS = 7
_NETVMS = ("sys-firewall", "sys-firewall", "sys-firewall", "sys-vpn")
# A port number and a few after it for each rule, none twice: 1000 + 60 * 1000 is in range.
_FIRST_PORT, _DISTANCE = 1000, 60


class Row(NamedTuple):
    """What was done, how long it took in each round, and how long it may take."""

    title: str
    seconds: Sequence[float]
    goal: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def is_met(self) -> bool:
        return self.goal is None or self.median < self.goal


def make_lab(path: Path) -> LabDirectory:
    """The same lab each time."""
    chance = random.Random(2026)
    lab = create_lab(path)
    names = [f"app-{number}" for number in range(QUBES - len(lab.qube_names()))]
    for name in names:
        netvm = QubeName(chance.choice(_NETVMS))
        lab.write_qube(Qube(name=QubeName(name), netvm=netvm, template=QubeName("fedora-42")))
    for number in range(RULES):
        name = chance.choice(names)
        is_behind_vpn = lab.qube(name).netvm == "sys-vpn"
        chain = "sys-vpn,sys-firewall,sys-net" if is_behind_vpn else "sys-firewall,sys-net"
        first = _FIRST_PORT + number * _DISTANCE
        last = first + chance.choice((0, 0, 0, 10))
        where = "forwardtype=internal " if is_behind_vpn else chance.choice(("", "", "", "via=personal "))
        sources = f"192.168.0.0/16,10.{number % 250}.0.0/16,fd00::/8"
        lab.set_feature(
            name,
            f"forward.r{number}",
            f"action=forward {where}srcports={first}-{last} srchosts={sources} owner={name} path={chain} "
            f"comment=rule number {number}",
        )
    return lab


def measure(lab: LabDirectory) -> list[Row]:
    """All rows, each over some rounds; every rule is live."""
    store, now = LabStore(lab), time.time()
    inventory = store.inventory()
    snapshot = Snapshot(inventory, read_rules(inventory))
    planned = snapshot.plan(now)
    if len(planned.live) != RULES:
        raise RuntimeError(f"{len(planned.live)} of {RULES} rules are live")
    rows = [
        *starts(lab.root.parent / "empty"),
        Row("read all qubes and rules", _timed(lambda: read_rules(store.inventory()))),
        Row("plan", _timed(lambda: snapshot.plan(now))),
        Row("policy", _timed(lambda: policy.text(planned))),
        Row("plan and policy", _timed(lambda: policy.text(snapshot.plan(now))), 1.0),
        Row("first apply", [command(lab, "apply")]),
        Row("list", _timed(lambda: command(lab, "list")), 2.0),
        Row("list of one qube", _timed(lambda: command(lab, "list", "sys-net")), 2.0),
        Row("list --json", _timed(lambda: command(lab, "list", "--json")), 2.0),
        Row("show of one forward", _timed(lambda: command(lab, "show", *_one(snapshot)))),
        Row("export", _timed(lambda: command(lab, "export"))),
        Row("apply with nothing to change", _timed(lambda: command(lab, "apply"))),
    ]
    inventory, installed = store.inventory(), store.read_policy()
    rows.append(Row("find the differences", _timed(lambda: differences(planned, inventory, installed))))
    rows.append(Row("panic", [command(lab, "panic")]))
    return rows


def starts(path: Path) -> list[Row]:
    """What a command takes where it has nothing to do, beside the interpreter alone."""
    empty = create_lab(path)
    return [
        Row("start: python3 alone", _timed(lambda: run("-c", "pass"))),
        Row("start: --help", _timed(lambda: command(empty, "--help")), 0.1),
        Row("start: list, no rules", _timed(lambda: command(empty, "list")), 0.1),
    ]


def _one(snapshot: Snapshot) -> tuple[str, str]:
    return next(iter(snapshot.stored))


def _timed(action: Callable[[], object]) -> list[float]:
    found = []
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        action()
        found.append(time.perf_counter() - begun)
    return found


def command(lab: LabDirectory, *argv: str) -> float:
    """Run qvm-forward; returns the seconds from its start to its end."""
    return run("-m", "qubes_fwd_qrexec.admin.views.cli", "--lab", str(lab.root), *argv)


def run(*argv: str) -> float:
    """Run python3; returns the seconds from its start to its end. Raises `RuntimeError` if it fails."""
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, *argv], env=dict(os.environ), capture_output=True, timeout=120)
    took_s = time.perf_counter() - begun
    if done.returncode != 0:
        raise RuntimeError(f"python3 {' '.join(argv)}: {done.stderr.decode(errors='replace')}")
    return took_s


def table(rows: Sequence[Row]) -> str:
    """A Markdown table that is also readable as it is."""
    width = max(len(row.title) for row in rows)
    lines = [
        f"| {'':{width}} |   median |  slowest | goal    |",
        f"| {'-' * width} | -------: | -------: | ------- |",
    ]
    for row in rows:
        goal = "" if row.goal is None else f"< {row.goal:g} s"
        goal = goal if row.is_met else f"{goal} MISSED"
        lines.append(f"| {row.title:{width}} | {row.median:6.3f} s | {max(row.seconds):6.3f} s | {goal:7} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Exit status 1 if a goal was missed."""
    argparse.ArgumentParser(prog="python -m bench admin", description=__doc__.split("\n")[0]).parse_args(argv)
    about = machine.describe()
    with tempfile.TemporaryDirectory(prefix="bench-admin-") as place:
        rows = measure(make_lab(Path(place, "lab")))
    print(table(rows))
    print(f"\n{RULES} rules over {QUBES} qubes; {_ROUNDS} rounds, but once for what changes the lab.")
    print("; ".join(f"{name}: {fact}" for name, fact in about.items()) + ".")
    return 0 if all(row.is_met for row in rows) else 1
