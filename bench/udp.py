# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m bench udp``: UDP over qrexec beside socat over the same broker, nft, and plain routing.

As for ``nft``, each way has a path of its own from the LAN to work, and they take turns. It needs root.

A flood has three figures: what is offered each second, what the sender's kernel took of it, and what has
arrived as it was sent. Bytes are counted too, as socat makes one datagram of several.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qubes_fwd_qrexec.common.errors import StoreError

from . import machine, road
from .lines import Line, Result, each, turns
from .load import ANSWER_S
from .names import names
from .nft import Stage, open_stage, tell
from .processes import BenchError
from .udpways import COMPARED, WAYS, MuxTcp, SocatUdp, Udp, usable
from .ways import ByMux, Way

_MIB = 1 << 20
_SMALL_BYTES, _LARGE_BYTES = 64, 1400
# What one call of the kernel sends at most (UDP_SEGMENT).
_LARGE_BATCH = 65_507 // _LARGE_BYTES
# A flood is over when nothing more has arrived for so long.
_STILL_S, _LOOK_S, _SETTLE_S = 0.2, 0.05, 10.0
_HOLD_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured. ``small`` is what is offered in datagrams a second, ``large`` in MiB."""

    rounds: int
    round_trips: int
    flood_s: float
    small: tuple[int, ...]
    large: tuple[int, ...]
    alone: tuple[int, ...]
    flows: int


_FULL = Effort(
    rounds=5,
    round_trips=1000,
    flood_s=0.7,
    small=(20_000, 60_000),
    large=(100, 300, 600),
    alone=(30, 60, 120),
    flows=10_000,
)
_QUICK = Effort(rounds=1, round_trips=20, flood_s=0.05, small=(2000,), large=(10,), alone=(10,), flows=20)


@dataclass(frozen=True, slots=True)
class Flood:
    """Datagrams of ``size`` bytes in one flow, ``batch`` of them in one call of the kernel."""

    size: int
    batch: int
    is_back: bool

    def __str__(self) -> str:
        how = ", each alone" if self.size == _LARGE_BYTES and self.batch == 1 else ""
        return f"{self.size} bytes{how}, {'server to client' if self.is_back else 'client to server'}"


def round_trip(stage: Stage, effort: Effort) -> Result:
    """64 bytes there and back, one after another: in one flow, or for TCP in a new stream each round."""
    seconds: dict[str, list[float]] = defaultdict(list)
    lost: dict[str, int] = defaultdict(int)
    for way in turns(stage.peers, effort.rounds):
        answer = stage.ask(way, "round_trips", count=effort.round_trips, size=_SMALL_BYTES)
        seconds[way.name].append(1000 * statistics.median(answer["seconds"]))
        lost[way.title] += answer.get("lost", 0)
    line = Line("round-trip", "round trip of 64 bytes, median", "ms", values=each(seconds, statistics.median))
    notes = [f"{title}: {count} lost" for title, count in lost.items() if count]
    return Result(f"median of {effort.rounds} medians of {effort.round_trips} round trips", [line], notes)


def _flood(stage: Stage, way: Way, flood: Flood, rate: float, for_s: float) -> dict[str, float]:
    """Datagrams sent, those that arrived as sent, and MiB that arrived, each second. Raises `BenchError`."""
    client, server = stage.loads[way.name], stage.servers[way.name]
    order: dict[str, Any] = {"order": "flood", "rate": rate, "for_s": for_s}
    order |= {"size": flood.size, "batch": flood.batch}
    if flood.is_back:
        stage.ask(way, "round_trips", count=1)  # so that the server knows whom to send to
        sender, other = server, client
    else:
        sender, other = client, server
        order["address"] = way.address
    other.ask({"order": "listen_for", "size": flood.size}, ANSWER_S)
    sent = sender.ask(order, for_s + ANSWER_S)
    heard = other.ask({"order": "heard"}, ANSWER_S)
    still_since = begun = time.monotonic()
    while time.monotonic() - still_since < _STILL_S and time.monotonic() - begun < _SETTLE_S:
        time.sleep(_LOOK_S)
        before, heard = heard, other.ask({"order": "heard"}, ANSWER_S)
        if heard["bytes"] != before["bytes"]:
            still_since = time.monotonic()
    seconds = max(sent["seconds"], heard["seconds"])
    return {
        "sent": sent["sent"] / sent["seconds"],
        "whole": heard["whole"] / seconds,
        "bytes": heard["bytes"] / _MIB / seconds,
    }


def _floods(flood: Flood) -> Callable[[Stage, Effort], Result]:
    """A row that offers more and more of a flood."""

    def row(stage: Stage, effort: Effort) -> Result:
        is_small = flood.size == _SMALL_BYTES
        scale, unit = (1.0, "/s") if is_small else (flood.size / _MIB, "MiB/s")
        ways = [way for way in stage.peers if not isinstance(way, MuxTcp)]
        lines = []
        for rate in effort.small if is_small else effort.alone if flood.batch == 1 else effort.large:
            found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
            for way in turns(ways, effort.rounds):
                figures = _flood(stage, way, flood, rate / scale, effort.flood_s)
                for what in ("sent", "whole"):
                    found[what][way.name].append(figures[what] * scale)
                found["bytes"][way.name].append(figures["bytes"])
            for what, title, unit_of in (
                ("sent", f"{rate:,}{'' if is_small else ' MiB'}/s of {flood}: sent", unit),
                ("whole", "  arrived as sent", unit),
                ("bytes", "  bytes that arrived", "MiB/s"),
            ):
                values = each(found[what], statistics.median)
                key = f"{flood.size}-{flood.batch}-{'back' if flood.is_back else 'there'}-{rate}-{what}"
                lines.append(Line(key, title, unit_of, False, what != "sent", values))
        return Result(f"median of {effort.rounds} x {effort.flood_s:g} s", lines)

    return row


def held(stage: Stage, effort: Effort) -> Result:
    """Flows held at once until one has no answer, and what each adds to the memory of the way's processes.

    Each way is alone, and nothing has run in it before but one flow, which is one of those that are held.
    """
    count = Line("held", "flows held at once, all alive", "", is_less_better=False)
    size = Line("held-memory", "  memory a flow, without the lab's", "KiB")
    notes = []
    for kind in (type(way) for way in stage.peers if isinstance(way, (SocatUdp, Udp))):
        with open_stage([kind]) as own_stage:
            (way,) = own_stage.peers
            assert isinstance(way, ByMux)
            before = way.footprint()
            answer = own_stage.ask(way, "hold", count=effort.flows - 1, limit_s=_HOLD_LIMIT_S)
            count.values[way.name] = answer["alive"] + 1
            size.values[way.name] = way.footprint().growth(before, answer["alive"]).own
            notes.append(f"{way.title}: first failure: {answer['failure']}")
    return Result(f"once, up to {effort.flows}", [count, size], notes)


_ROWS: dict[str, Callable[[Stage, Effort], Result]] = {
    "round-trip": round_trip,
    "small": _floods(Flood(_SMALL_BYTES, 1, is_back=False)),
    "small-back": _floods(Flood(_SMALL_BYTES, 1, is_back=True)),
    "large": _floods(Flood(_LARGE_BYTES, _LARGE_BATCH, is_back=False)),
    "large-back": _floods(Flood(_LARGE_BYTES, _LARGE_BATCH, is_back=True)),
    "alone": _floods(Flood(_LARGE_BYTES, 1, is_back=False)),
    "alone-back": _floods(Flood(_LARGE_BYTES, 1, is_back=True)),
    "held": held,
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench udp", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a short look; too few samples to quote")
    rows = ", ".join(_ROWS)
    parser.add_argument(
        "--rows", type=names(list(_ROWS), "row"), default=list(_ROWS), help=rows, metavar="NAME,..."
    )
    ways = [way.name for way in WAYS]
    parser.add_argument(
        "--ways", type=names(ways, "way"), default=ways, help=", ".join(ways), metavar="NAME,..."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    args = parser.parse_args(arguments)
    if (problem := road.why_unavailable()) is not None:
        print(f"UDP cannot be measured: {problem}", file=sys.stderr)
        return 0
    kinds = [way for way in usable() if way.name in args.ways]
    if not kinds:
        print("nothing is left to measure", file=sys.stderr)
        return 1
    facts = machine.describe()
    begun = time.monotonic()
    results: dict[str, Result] = {}
    try:
        with open_stage(kinds) as stage:
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
    facts["again with"] = shlex.join(["python", "-m", "bench", "udp", *arguments])
    tell(results, kinds, COMPARED, facts, args.json)
    return 0
