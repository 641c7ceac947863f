# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m bench growth``: how rate and latency go from 1 connection that is held to 10,000.

Each peer has a stage of its own and goes up to what it can hold. At every step the held connections are
idle and alive, each has moved some bytes each way when it was new, and others are measured beside them. What
they cost in memory is what `held` measures.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from . import machine
from .heldrows import bulk_rate, hold_crowd
from .peers import USUAL, Peer
from .processes import BenchError
from .rows import CLIENTS
from .stage import Stage, open_stage
from .step import Step
from .table import markdown, number

STEPS = (1, 100, 1000, 10_000)
# A call is one of 30, and up to 16 more are needed to measure beside those that are held.
_STEPS_BY_CALL = (1, 10)
_ROUNDS = 5
_CONNECTIONS = 25
_ROUND_TRIPS = 600
_MANY = 400
_MANY_BY_CALL = 50
_BULK_BYTES = 64 << 20
_MOVED_BYTES = 1 << 16
_LIMIT_S = 300.0


def steps(kind: type[Peer], counts: Sequence[int]) -> Iterator[Step]:
    """One peer's steps. Raises `BenchError` where it cannot hold what it should."""
    with open_stage([kind]) as stage:
        for count in counts:
            hold_crowd(stage, count, _MOVED_BYTES, _LIMIT_S)
            yield _measured(stage, count)


def _measured(stage: Stage, held: int) -> Step:
    peer = stage.peers[0]
    count = _MANY_BY_CALL if peer.is_call_each else _MANY
    rates: list[float] = []
    connects: list[float] = []
    round_trips: list[float] = []
    bulk: dict[str, list[float]] = {"upload": [], "download": []}
    failed = 0
    for _ in range(_ROUNDS):
        connects += stage.ask(peer, "connections", count=_CONNECTIONS)["seconds"]
        round_trips += stage.ask(peer, "round_trips", count=_ROUND_TRIPS)["seconds"]
        many = stage.ask(peer, "many", clients=CLIENTS, count=count, limit_s=_LIMIT_S)
        rates.append(many["done"] / many["seconds"])
        failed += many["failed"] + many["hung"]
        for order, found in bulk.items():
            found.append(bulk_rate(stage, order, _BULK_BYTES))
    return Step(
        peer=peer.name,
        held=held,
        rate=statistics.median(rates),
        failed=failed,
        connect_ms=statistics.median(connects) * 1000,
        round_trip_ms=statistics.median(round_trips) * 1000,
        upload_mib_s=statistics.median(bulk["upload"]),
        download_mib_s=statistics.median(bulk["download"]),
    )


_COLUMNS = ("", "held", "16 clients", "failed", "new connection", "round trip", "stream up", "and down")


def render(found: Sequence[Step]) -> str:
    """A Markdown table."""
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for step in found:
        rows.append(
            (
                step.peer,
                str(step.held),
                f"{number(step.rate)} /s",
                str(step.failed),
                f"{number(step.connect_ms)} ms",
                f"{number(step.round_trip_ms)} ms",
                f"{number(step.upload_mib_s)} MiB/s",
                f"{number(step.download_mib_s)} MiB/s",
            )
        )
    return markdown(rows)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench growth", description=__doc__)
    parser.add_argument("--most", type=int, default=STEPS[-1], metavar="N", help="no step above that")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    args = parser.parse_args(arguments)
    facts = machine.describe()
    found: list[Step] = []
    for kind in USUAL:
        if (missing := kind.missing()) is not None:
            print(f"{missing}; measured without it", file=sys.stderr)
            continue
        try:
            counts = _STEPS_BY_CALL if kind.is_call_each else STEPS
            for step in steps(kind, [count for count in counts if count <= args.most]):
                print(f"{step.peer} beside {step.held} ...", file=sys.stderr)
                found.append(step)
        except BenchError as error:
            print(error, file=sys.stderr)
    print(render(found))
    print("\n" + "; ".join(f"{name}: {fact}" for name, fact in facts.items()) + ".")
    if args.json is not None:
        document = {"machine": facts, "steps": [asdict(step) for step in found]}
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0
