# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m bench``: measure, print the table, and end. For ``growth``, ``admin``, ``nft``,
``udp``, ``window``, ``guard``, ``held``, ``all`` (`runs`) and ``page`` see their files."""

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import admin, growth, guard, held, machine, nft, page, record, runs, udp, window
from .effort import FULL, QUICK
from .lines import Result
from .names import names
from .peers import PEERS, Peer, usable
from .processes import BenchError
from .record import Record
from .rows import ROWS
from .stage import open_stage
from .table import render


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure forwarding side by side, over one lab broker on loopback.",
    )
    peers = [peer.name for peer in PEERS]
    parser.add_argument(
        "--quick", action="store_true", help="a short look, under 20 s; too few samples to quote"
    )
    parser.add_argument(
        "--rows", type=names(list(ROWS), "row"), default=list(ROWS), metavar="NAME,...", help=", ".join(ROWS)
    )
    parser.add_argument(
        "--peers", type=names(peers, "peer"), default=peers, metavar="NAME,...", help=", ".join(peers)
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    return parser


def _measure(
    rows: Sequence[str], kinds: Sequence[type[Peer]], *, is_quick: bool
) -> tuple[dict[str, Result], Any]:
    results = {}
    with open_stage(kinds) as stage:
        for row in rows:
            print(f"measuring {row} ...", file=sys.stderr)
            results[row] = ROWS[row](stage, QUICK if is_quick else FULL)
        return results, stage.lab


def _report(results: dict[str, Result], kinds: Sequence[type[Peer]], facts: dict[str, str]) -> str:
    lines = [line for result in results.values() for line in result.lines]
    parts = [render(lines, kinds), ""]
    parts.append("'x to y': how many times better x is than y; below 1 is worse.")
    parts += [f"{row}: {result.samples} for each peer." for row, result in results.items()]
    parts += [f"{row}: {note}" for row, result in results.items() for note in result.notes]
    parts.append("; ".join(f"{name}: {fact}" for name, fact in facts.items()) + ".")
    return "\n".join(parts)


def _on_sigterm(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    signal.signal(signal.SIGTERM, _on_sigterm)
    others = {"growth": growth.main, "admin": admin.main, "nft": nft.main, "udp": udp.main}
    others |= {"window": window.main, "guard": guard.main, "held": held.main}
    others |= {"all": runs.main, "page": page.main}
    if sys.argv[1:2] and sys.argv[1] in others:
        return others[sys.argv[1]](sys.argv[2:])
    args = _parser().parse_args()
    begun = time.monotonic()
    about = machine.describe()
    kinds = usable(args.peers)
    if not kinds:
        print("nothing is left to measure", file=sys.stderr)
        return 1
    try:
        results, lab = _measure(args.rows, kinds, is_quick=args.quick)
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; everything that was started has been ended", file=sys.stderr)
        return 130
    facts = {
        **about,
        "policy": f"one line for the call, judged by {lab['judge']}",
        "calls at once": str(lab["calls_per_target"]),
        "took": f"{time.monotonic() - begun:.0f} s",
        "again with": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
    }
    print(_report(results, kinds, facts))
    if args.json is not None:
        record.write(args.json, Record(facts, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
