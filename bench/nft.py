# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m bench nft``: forwards by nft beside the ways that a packet may go otherwise.

Each way has a path of its own, of network namespaces joined and firewalled as on stock Qubes (`road`): a
client on the LAN, sys-net, sys-firewall, and work, where the server is. They take turns in many short rounds,
over IPv4. It needs root.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qubes_fwd_qrexec.common.errors import StoreError

from . import machine, nftplot, road
from .effort import FULL, QUICK, Effort
from .lines import Line, Result, each, turns
from .names import names
from .nftapply import apply
from .processes import BenchError, Child
from .road import BESIDE_FIREWALL, BESIDE_WORK, LAN, WORK
from .rows import bulk, connect, round_trip
from .table import render
from .ways import COMPARED, PORT, WAYS, ByMux, Way

_READY_S = 30.0
_WITHIN_S = 120.0
# Ways that differ by a few percent take many turns.
_FULL = replace(FULL, rounds=60, long_rounds=80, bulk_bytes=16 << 20, round_trips=500)
_QUICK = replace(QUICK, rounds=4, long_rounds=2, bulk_bytes=16 << 20)
_DATAGRAMS = 4000


@dataclass(slots=True)
class Stage:
    """All ways, each with its path, server and load."""

    peers: tuple[Way, ...]
    servers: dict[str, Child]
    loads: dict[str, Child]

    def ask(self, peer: Way, order: str, within_s: float = _WITHIN_S, **details: Any) -> dict[str, Any]:
        """Have the load of a way measure it. Raises `BenchError`."""
        return self.loads[peer.name].ask({"order": order, "address": peer.address, **details}, within_s)


@contextmanager
def open_stage(kinds: Sequence[type[Way]]) -> Iterator[Stage]:
    """Make the ways, and end it all with the block. Raises `BenchError`."""
    with ExitStack() as undo:
        place = Path(undo.enter_context(TemporaryDirectory(prefix="fwd-bench-")))
        ways: list[Way] = []
        servers: dict[str, Child] = {}
        loads: dict[str, Child] = {}
        for kind in kinds:
            directory = place / kind.name
            directory.mkdir()
            path = undo.enter_context(
                road.open_road(directory / "road", without=(BESIDE_FIREWALL, BESIDE_WORK))
            )
            server, load = (f"bench.{module}" for module in kind.ends)
            for qube, module, arguments, found in (
                (WORK, server, ["", str(PORT)], servers),
                (LAN, load, [], loads),
            ):
                with path.within(qube):
                    child = found[kind.name] = Child.of_module(module, arguments, directory)
                undo.callback(child.end)
            servers[kind.name].answer(_READY_S)
            way = kind(path, directory)
            undo.callback(way.close)
            way.open()
            ways.append(way)
        stage = Stage(tuple(ways), servers, loads)
        for way in ways:
            _wait_until_ready(stage, way)
        yield stage


def _wait_until_ready(stage: Stage, way: Way) -> None:
    """Until something gets its echo. Raises `BenchError`."""
    deadline = time.monotonic() + _READY_S
    while True:
        try:
            stage.ask(way, "round_trips", count=1)
            return
        except BenchError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def datagrams(stage: Stage, effort: Effort) -> Result:
    """Datagrams of 64 bytes, of which every 32nd is answered, and the answer waited for.

    The processor time is the sender's, in which the kernel also carries each packet along the whole path.
    """
    rates: dict[str, list[float]] = defaultdict(list)
    used: dict[str, list[float]] = defaultdict(list)
    for way in turns([way for way in stage.peers if not isinstance(way, ByMux)], effort.rounds):
        answer = stage.ask(way, "datagrams", count=_DATAGRAMS)
        rates[way.name].append(_DATAGRAMS / answer["seconds"])
        used[way.name].append(1e6 * answer["used"] / _DATAGRAMS)
    rate = Line("datagrams", "UDP, datagrams of 64 bytes", "/s", is_less_better=False)
    rate.values = each(rates, statistics.median)
    time_each = Line(
        "datagrams-used", "  processor time for each", "us", values=each(used, statistics.median)
    )
    return Result(f"{effort.rounds} x {_DATAGRAMS} datagrams", [rate, time_each])


def tell(
    results: Mapping[str, Result],
    ways: Sequence[type[Way]],
    compared: Sequence[tuple[type[Way], type[Way]]],
    facts: Mapping[str, str],
    file: Path | None,
) -> None:
    """Print the table and what is to be known of it; write the numbers to the file as well."""
    lines = [line for result in results.values() for line in result.lines]
    print(render(lines, ways, compared))
    print("\n'x to y': how many times better x is than y; below 1 is worse.")
    for row, result in results.items():
        print("; ".join((f"{row}: {result.samples} for each way", *result.notes)))
    print("; ".join(f"{name}: {fact}" for name, fact in facts.items()) + ".")
    if file is not None:
        values = [{"key": line.key, "title": line.title, "unit": line.unit, **line.values} for line in lines]
        document = {"machine": facts, "lines": values}
        file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


_ROWS: dict[str, Callable[[Stage, Effort], Result]] = {
    "connect": connect,
    "round-trip": round_trip,
    "bulk": bulk,
    "datagrams": datagrams,
    "apply": apply,
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench nft", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a short look; too few samples to quote")
    rows = ", ".join(_ROWS)
    parser.add_argument(
        "--rows", type=names(list(_ROWS), "row"), default=list(_ROWS), help=rows, metavar="NAME,..."
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    args = parser.parse_args(arguments)
    if args.plot is not None and set(args.rows) != set(_ROWS):
        parser.error("a picture needs all rows; leave out --rows or --plot")
    if (problem := road.why_unavailable()) is not None:
        print(f"forwards by nft cannot be measured: {problem}", file=sys.stderr)
        return 0
    facts = machine.describe()
    begun = time.monotonic()
    results: dict[str, Result] = {}
    try:
        with open_stage(WAYS) as stage:
            for row in args.rows:
                print(f"measuring {row} ...", file=sys.stderr)
                results[row] = _ROWS[row](stage, _QUICK if args.quick else _FULL)
    except (BenchError, StoreError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; everything that was started has been ended", file=sys.stderr)
        return 130
    facts["took"] = f"{time.monotonic() - begun:.0f} s"
    facts["again with"] = shlex.join(["python", "-m", "bench", "nft", *arguments])
    tell(results, WAYS, COMPARED, facts, args.json)
    lines = [line for result in results.values() for line in result.lines]
    if args.plot is not None:
        picture = nftplot.picture({line.key: line for line in lines}, WAYS)
        args.plot.write_text(picture, encoding="utf-8")
    return 0
