# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m bench window``: how long the window's main loop is held up, with 1,000 rules over 200 qubes.

Over a lab, and over the Admin API of the tests, which has the same rules. A person notices 100 ms; no turn
may take more than 50.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qubes_fwd_qrexec.common.clientreport import CLIENTS
from qubes_fwd_qrexec.common.services import STATUS_SERVICE
from qubes_fwd_qrexec.lab.directory import LabDirectory

from . import machine
from .adminlab import command, make_lab
from .windowturns import START

_TESTS = Path(__file__).parents[1] / "tests"
_LIMIT_S = 600.0
_GOAL_MS = 50
_TITLE = f"longest turn in ms (turns over {_GOAL_MS})"
QUBES = 200
RULES = 1000
_CHANGES = 8
_CLIENTS = 500
# Another program that changes the rules, each second one at another qube.
_CHANGE = """\
import sys, time
from qubes_fwd_qrexec.lab.directory import LabDirectory
lab = LabDirectory.open(sys.argv[1])
features = [(qube, *feature) for qube in lab.qube_names() for feature in lab.features(qube).items()]
rules = [found for found in features if "srcports" in found[2]]
for number, (qube, key, line) in enumerate(rules[:: len(rules) // int(sys.argv[2])]):
    lab.set_feature(qube, key, f"{line} changed {number}")
    time.sleep(1)
"""


def measure(place: Path, kind: str, *, finds: bool) -> dict[str, dict[str, Any]]:
    """The phases of one run, each with its longest turn. Raises `RuntimeError` if the window fails."""
    sys.path[:0] = [str(_TESTS), str(_TESTS / "window")]
    from desktop import open_desktop

    lab = make_lab(place / "lab", QUBES, RULES)
    command(lab, "apply")
    _answer(lab, place / "answers")
    variable = "QVM_FORWARD_LAB" if kind == "lab" else "PLAYED_DOM0"
    played = str(_TESTS / "window" / "playeddom0")
    environ = {variable: str(lab.root), "PYTHONPATH": os.pathsep.join((played, str(_TESTS.parent)))}
    out, said = place / "phases.json", place / "stderr"
    change = [sys.executable, "-c", _CHANGE, str(lab.root), str(_CHANGES)]
    words = ["-m", "bench.windowturns", str(out), str(RULES), "finds" if finds else "", *change]
    with open_desktop() as desktop:
        status = desktop.start([sys.executable, *words], environ, said).wait(_LIMIT_S)
    if status != 0 or not out.exists():
        raise RuntimeError(f"the window ended with exit status {status}: {said.read_text()}")
    found: dict[str, dict[str, Any]] = json.loads(out.read_text())
    return found


def _answer(lab: LabDirectory, place: Path) -> None:
    """What the listeners say where the Admin API is that of the tests: each has clients. A lab is asked in
    vain, as it is down.
    """
    from listenersays import status

    now = int(time.time())
    for qube in lab.qube_names():
        keys = [key.split(".")[2:] for key in lab.features(qube) if key.startswith("vm-config.fwd.")]
        if not keys:
            continue
        said = status(now)
        listener = said["listener"]
        (*_, busy), clients = listener["forwards"], listener["clients"]
        names = [{"target": target, "name": name} for target, name in keys]
        listener["forwards"] = [busy | name for name in names]
        listener["clients"] = [client | name for name in names for client in clients][:_CLIENTS]
        path = place / qube / f"{STATUS_SERVICE}+{CLIENTS}"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(said))


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """A Markdown table that is also readable as it is: for each system the longest turn, and how many were
    longer than the goal.
    """
    phases = list(next(iter(found.values())))
    width = max(map(len, [*phases, _TITLE]))
    lines = [
        f"| {_TITLE:{width}} | {' | '.join(f'{kind:>14}' for kind in found)} |",
        f"| {'-' * width} | {' | '.join('-' * 13 + ':' for _ in found)} |",
    ]
    for phase in phases:
        cells = [f"{1000 * each[phase]['longest_s']:.0f} ({each[phase]['slow']})" for each in found.values()]
        lines.append(f"| {phase:{width}} | {' | '.join(f'{cell:>14}' for cell in cells)} |")
    return "\n".join(lines)


def _spent(values: Mapping[str, Any]) -> str:
    """What the longest turn of a phase was spent for."""
    whole, own, queued = (1000 * values[key] for key in ("longest_s", "own_s", "queued_s"))
    rest = max(0, whole - own - queued)
    return (
        f"of {whole:.0f} ms the main thread ran for {own:.0f} and waited {queued:.0f} for a processor, "
        f"{rest:.0f} for Python's lock or the X server"
    )


def main(argv: Sequence[str]) -> int:
    """Exit status 1 if a turn took longer than the goal."""
    parser = argparse.ArgumentParser(prog="python -m bench window", description=__doc__.split("\n")[0])
    parser.add_argument("--where", action="store_true", help="say also what ran in turns that were long")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    args = parser.parse_args(argv)
    about = machine.describe()
    found = {}
    for kind in ("lab", "Admin API"):
        with tempfile.TemporaryDirectory(prefix="bench-window-") as place:
            found[kind] = measure(Path(place), kind, finds=args.where)
    print(table(found))
    print(f"\n{RULES} rules over {QUBES} qubes. The start counts for no goal.")
    print("; ".join(f"{name}: {fact}" for name, fact in about.items()) + ".")
    for kind, phases in found.items():
        for phase, values in phases.items():
            if 1000 * values["longest_s"] > _GOAL_MS:
                print(f"{kind}, {phase}: {_spent(values)}")
    if args.where:
        for kind, phases in found.items():
            for phase, values in phases.items():
                for place, count in values["where"].items():
                    print(f"{kind}, {phase}: {count:4} times in {place}")
    if args.json is not None:
        document = {"machine": about, "rules": RULES, "qubes": QUBES, "goal_ms": _GOAL_MS, "systems": found}
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    counted = [v for phases in found.values() for phase, v in phases.items() if phase != START]
    return 1 if any(1000 * values["longest_s"] > _GOAL_MS for values in counted) else 0
