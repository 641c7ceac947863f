# SPDX-License-Identifier: GPL-2.0-or-later
"""The rows: what is measured, how often, and what each number means.

A number is the median of its samples over all rounds unless it says other.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from .effort import Effort
from .heldrows import crowd, held, memory, stock
from .lines import Line, Result, Staged, collect, p99
from .peers import Peer
from .processor import Usage
from .stage import Stage
from .streamrows import fair, payload, streams

CLIENTS = 16
_MIB = 1 << 20

Measure = Callable[[Stage, Effort], Result]


def _median_and_p99(key: str, title: str, seconds: Mapping[str, Sequence[list[float]]]) -> list[Line]:
    found = {
        name: [[1000 * value for value in values] for values in rounds] for name, rounds in seconds.items()
    }
    return [
        Line(f"{key}-median", f"{title}, median", "ms").fill(found, statistics.median),
        Line(f"{key}-p99", f"{title}, 99th percentile", "ms").fill(found, p99),
    ]


def connect(stage: Staged, effort: Effort) -> Result:
    """A new connection, one at a time: from connect() to the first echoed byte.

    The end of each is waited for and not counted.
    """

    def sample(peer: Peer) -> list[float]:
        seconds: list[float] = stage.ask(peer, "connections", count=effort.connections)["seconds"]
        return seconds

    found, notes = collect(stage.peers, effort.rounds, sample)
    return Result(
        f"{effort.rounds} x {effort.connections} connections",
        _median_and_p99("connect", "new connection, one at a time", found),
        notes,
    )


def many(stage: Stage, effort: Effort) -> Result:
    """16 clients at once, each connect, echo, close, again: connections that got their echo, each second.

    The median of the rounds. A failure is an error or an early end, a hang has no echo within 5 s; both
    are added up over all rounds. What a round's time limit cuts off is neither, and is noted.
    """
    lost = Line("many-lost", f"{CLIENTS} clients at once, failed or hung", "")
    cut: Counter[str] = Counter()

    def sample(peer: Peer) -> list[float]:
        answer = stage.ask(peer, "many", clients=CLIENTS, count=effort.many, limit_s=effort.many_limit_s)
        bad = answer["failed"] + answer["hung"]
        lost.values[peer.name] = lost.values.get(peer.name, 0) + bad
        cut[peer.title] += effort.many - answer["done"] - bad
        return [answer["done"] / answer["seconds"]]

    found, notes = collect(stage.peers, effort.long_rounds, sample)
    rate = Line("many-rate", f"{CLIENTS} clients at once, connections", "/s", is_less_better=False)
    notes += [f"{title}: the time limit cut off {count}" for title, count in cut.items() if count]
    samples = f"{effort.long_rounds} x {effort.many} connections"
    return Result(samples, [rate.fill(found, statistics.median), lost], notes)


def round_trip(stage: Staged, effort: Effort) -> Result:
    """One byte there and back on a connection that is open; a new connection each round."""

    def sample(peer: Peer) -> list[float]:
        seconds: list[float] = stage.ask(peer, "round_trips", count=effort.round_trips)["seconds"]
        return seconds

    found, notes = collect(stage.peers, effort.rounds, sample)
    return Result(
        f"{effort.rounds} x {effort.round_trips} round trips",
        _median_and_p99("round-trip", "round trip of one byte", found),
        notes,
    )


def bulk(stage: Staged, effort: Effort) -> Result:
    """One stream, each direction alone: until the last byte is where it belongs. The median of the rounds."""
    lines, notes = [], []
    for order, whither in (("upload", "client to server"), ("download", "server to client")):

        def sample(peer: Peer, order: str = order) -> list[float]:
            answer = stage.ask(peer, order, size=effort.bulk_bytes)
            return [effort.bulk_bytes / _MIB / float(answer["seconds"])]

        found, failed = collect(stage.peers, effort.long_rounds, sample)
        line = Line(f"bulk-{order}", f"one stream, {whither}", "MiB/s", is_less_better=False)
        lines.append(line.fill(found, statistics.median))
        notes += failed
    return Result(f"{effort.long_rounds} x {effort.bulk_bytes // _MIB} MiB each way", lines, notes)


_PARTS: dict[str, tuple[str, Callable[[Usage], float]]] = {
    "all": ("all that is between", lambda usage: usage.between),
    "own": ("listener and service, or socat", lambda usage: usage.peer + usage.service),
    "listener": ("the listener, or socat", lambda usage: usage.peer),
    "service": ("the service", lambda usage: usage.service),
    "lab": ("the lab's client, broker and agents", lambda usage: usage.client + usage.broker),
    "ended": ("programs that have ended", lambda usage: usage.ended),
    "ends": ("beside it, client and server", lambda usage: usage.ends),
}
"""What is told of processor time: a title, and whose it is."""


def processor(stage: Stage, effort: Effort) -> Result:
    """Processor time for a MiB each way and for a round trip, on an open connection, and for connections.

    The medians of the rounds. What the kernel does for a process counts as that process's.
    """

    def transfer(order: str) -> Callable[[Peer], Usage]:
        return lambda peer: stage.meter(peer, order, size=effort.processor_bytes)[1]

    def round_trips(peer: Peer) -> Usage:
        return stage.meter(peer, "round_trips", count=effort.round_trips)[1]

    def connections(peer: Peer) -> Usage:
        before, count = stage.usage(peer), effort.processor_connections
        answer = stage.ask(peer, "many", clients=CLIENTS, count=count, limit_s=effort.many_limit_s)
        return stage.usage(peer).since(before).each(answer["done"])

    between = [peer for peer in stage.peers if peer.pids]
    mib, lines, notes = effort.processor_bytes / _MIB, [], []
    for key, title, unit, scale, sample in (
        ("upload", "a MiB, client to server", "ms", 1e3 / mib, transfer("upload")),
        ("download", "a MiB, server to client", "ms", 1e3 / mib, transfer("download")),
        ("round-trip", "a round trip", "us", 1e6 / effort.round_trips, round_trips),
        ("connect", f"a connection, {CLIENTS} clients at once", "ms", 1e3, connections),
    ):
        usages, failed = collect(between, effort.long_rounds, sample)
        notes += failed
        for part, (whose, take) in _PARTS.items():
            line = Line(f"processor-{key}-{part}", f"  {whose}", unit)
            if part == "all":
                line.title = f"processor time for {title}: {whose}"
            # Of the programs for one connection most have ended.
            line.is_compared = part == "all" or (part == "own" and key != "connect")
            found = {name: [[scale * take(used)] for used in rounds] for name, rounds in usages.items()}
            lines.append(line.fill(found, statistics.median))
    samples = f"{effort.long_rounds} x {mib:.0f} MiB each way, {effort.round_trips} round trips"
    return Result(f"{samples}, {effort.processor_connections} connections", lines, notes)


ROWS: dict[str, Measure] = {
    "connect": connect,
    "many": many,
    "round-trip": round_trip,
    "bulk": bulk,
    "processor": processor,
    "payload": payload,
    "streams": streams,
    "fair": fair,
    "crowd": crowd,
    "memory": memory,
    "held": held,
    "stock": stock,
}
