# SPDX-License-Identifier: GPL-2.0-or-later
"""The rows: what is measured, how often, and what each number means.

Peers take turns within each round, and each round begins with another of them, so that what else the
machine does meets all alike. A number is the median of its samples over all rounds unless it says other.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeVar

from .memory import footprint
from .peers import Peer
from .processes import BenchError
from .stage import Stage, open_stage

CLIENTS = 16
STOCK_CLIENTS = 200
_MIB = 1 << 20


class Named(Protocol):
    """What has a column in a table."""

    name: ClassVar[str]
    title: ClassVar[str]


class Staged(Protocol):
    """What has peers, and can have the load measure one of them."""

    @property
    def peers(self) -> Sequence[Any]: ...

    def ask(self, peer: Any, order: str, within_s: float = ..., **details: Any) -> dict[str, Any]: ...


AnyPeer = TypeVar("AnyPeer", bound=Named)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is measured. A count is for each peer and each round."""

    rounds: int
    connections: int
    round_trips: int
    long_rounds: int
    many: int
    many_limit_s: float
    bulk_bytes: int
    memory_rounds: int
    memory_connections: int
    hold_max: int
    hold_limit_s: float
    crowd: int
    crowd_bytes: int
    crowd_limit_s: float
    stock_each: int


# Many short rounds: other work of the machine lasts for seconds, and then meets every peer.
FULL = Effort(
    rounds=20,
    connections=25,
    round_trips=1000,
    long_rounds=5,
    many=400,
    many_limit_s=30.0,
    bulk_bytes=256 * _MIB,
    memory_rounds=3,
    memory_connections=100,
    hold_max=10_000,
    hold_limit_s=60.0,
    crowd=5000,
    crowd_bytes=2 * _MIB,
    crowd_limit_s=600.0,
    stock_each=20,
)
QUICK = Effort(
    rounds=4,
    connections=8,
    round_trips=200,
    long_rounds=1,
    many=100,
    many_limit_s=5.0,
    bulk_bytes=32 * _MIB,
    memory_rounds=1,
    memory_connections=100,
    hold_max=200,
    hold_limit_s=5.0,
    crowd=100,
    crowd_bytes=_MIB // 2,
    crowd_limit_s=30.0,
    stock_each=2,
)


@dataclass(slots=True)
class Line:
    """One line of the table: a value for each peer that could be measured."""

    key: str
    title: str
    unit: str
    is_less_better: bool = True
    # Whether it compares peers, or only shows what the lab adds to each of them.
    is_compared: bool = True
    values: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Result:
    """What a row found: its lines, the sizes of its samples, and what failed, in words."""

    samples: str
    lines: list[Line]
    notes: list[str] = field(default_factory=list)


Measure = Callable[[Stage, Effort], Result]
Samples = dict[str, list[float]]


def turns(peers: Sequence[AnyPeer], rounds: int) -> Iterator[AnyPeer]:
    """All peers in each round, which begins with another of them each time."""
    for number in range(rounds):
        first = number % len(peers)
        yield from (*peers[first:], *peers[:first])


def _collect(stage: Staged, rounds: int, sample: Callable[[Peer], list[float]]) -> tuple[Samples, list[str]]:
    """All samples by peer. A peer that fails is left out from then on, and its samples with it."""
    found: Samples = defaultdict(list)
    failed: dict[str, str] = {}
    for peer in turns(stage.peers, rounds):
        if peer.name not in failed:
            try:
                found[peer.name] += sample(peer)
            except BenchError as error:
                failed[peer.name] = f"{peer.title} failed: {error}"
    return {name: values for name, values in found.items() if name not in failed}, list(failed.values())


def p99(values: Sequence[float]) -> float:
    """The value that one sample in a hundred exceeds."""
    return sorted(values)[max(0, -(-len(values) * 99 // 100) - 1)]


def _median_and_p99(key: str, title: str, seconds: Samples) -> list[Line]:
    samples = {name: [1000 * value for value in values] for name, values in seconds.items()}
    return [
        Line(f"{key}-median", f"{title}, median", "ms", values=each(samples, statistics.median)),
        Line(f"{key}-p99", f"{title}, 99th percentile", "ms", values=each(samples, p99)),
    ]


def each(samples: Samples, take: Callable[[list[float]], float]) -> dict[str, float]:
    """One value for each peer that has samples."""
    return {name: take(values) for name, values in samples.items() if values}


def connect(stage: Staged, effort: Effort) -> Result:
    """A new connection, one at a time: from connect() to the first echoed byte.

    The end of each is waited for and not counted.
    """

    def sample(peer: Peer) -> list[float]:
        seconds: list[float] = stage.ask(peer, "connections", count=effort.connections)["seconds"]
        return seconds

    samples, notes = _collect(stage, effort.rounds, sample)
    return Result(
        f"{effort.rounds} x {effort.connections} connections",
        _median_and_p99("connect", "new connection, one at a time", samples),
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

    samples, notes = _collect(stage, effort.long_rounds, sample)
    rate = Line("many-rate", f"{CLIENTS} clients at once, connections", "/s", is_less_better=False)
    rate.values = each(samples, statistics.median)
    notes += [f"{title}: the time limit cut off {count}" for title, count in cut.items() if count]
    return Result(f"{effort.long_rounds} x {effort.many} connections", [rate, lost], notes)


def round_trip(stage: Staged, effort: Effort) -> Result:
    """One byte there and back on a connection that is open; a new connection each round."""

    def sample(peer: Peer) -> list[float]:
        seconds: list[float] = stage.ask(peer, "round_trips", count=effort.round_trips)["seconds"]
        return seconds

    samples, notes = _collect(stage, effort.rounds, sample)
    return Result(
        f"{effort.rounds} x {effort.round_trips} round trips",
        _median_and_p99("round-trip", "round trip of one byte", samples),
        notes,
    )


def bulk(stage: Staged, effort: Effort) -> Result:
    """One stream, each direction alone: until the last byte is where it belongs. The median of the rounds."""
    lines, notes = [], []
    for order, whither in (("upload", "client to server"), ("download", "server to client")):

        def sample(peer: Peer, order: str = order) -> list[float]:
            answer = stage.ask(peer, order, size=effort.bulk_bytes)
            return [effort.bulk_bytes / _MIB / float(answer["seconds"])]

        samples, failed = _collect(stage, effort.long_rounds, sample)
        values = each(samples, statistics.median)
        lines.append(Line(f"bulk-{order}", f"one stream, {whither}", "MiB/s", False, values=values))
        notes += failed
    return Result(f"{effort.long_rounds} x {effort.bulk_bytes // _MIB} MiB each way", lines, notes)


def crowd(stage: Stage, effort: Effort) -> Result:
    """One stream beside thousands that moved some MiB once and are idle since, as keep-alive clients are.

    In a lab of the peer's own, each direction: the median of the rounds alone, before there are others, and
    then beside them. The first connections are still idle when the last one comes.
    """
    whithers = {"upload": "client to server", "download": "server to client"}
    beside = {
        order: Line(f"crowd-{order}", f"one stream beside {effort.crowd} idle, {whither}", "MiB/s", False)
        for order, whither in whithers.items()
    }
    ratios = {
        order: Line(f"crowd-{order}-ratio", f"  of its rate alone, {whither}", "%", False)
        for order, whither in whithers.items()
    }
    notes = []
    for kind in (type(peer) for peer in stage.peers):
        try:
            with open_stage([kind]) as own_stage:
                alone = _bulk_rates(own_stage, effort)
                hold_crowd(own_stage, effort.crowd, effort.crowd_bytes, effort.crowd_limit_s)
                for order, rate in _bulk_rates(own_stage, effort).items():
                    beside[order].values[kind.name] = rate
                    ratios[order].values[kind.name] = 100 * rate / alone[order]
        except BenchError as error:
            notes.append(f"{kind.title} failed: {error}")
    size = f"{effort.long_rounds} x {effort.bulk_bytes // _MIB} MiB each way"
    lines = [line for order in whithers for line in (beside[order], ratios[order])]
    return Result(f"{size}, beside {effort.crowd} that moved {effort.crowd_bytes / _MIB:g} MiB", lines, notes)


def hold_crowd(stage: Stage, count: int, moved: int, limit_s: float) -> None:
    """Up to ``count`` connections are held, each of which has moved so many bytes. Raises `BenchError`."""
    peer = stage.peers[0]
    answer = stage.ask(peer, "hold", limit_s + 60.0, count=count, limit_s=limit_s, moved=moved)
    if answer["alive"] < count:
        raise BenchError(f"{answer['alive']} of {count} alive; {answer['failure']}")
    stage.count_at_rest()


def _bulk_rates(stage: Stage, effort: Effort) -> dict[str, float]:
    """The median of the rounds, in MiB a second, for each direction."""
    rates: dict[str, list[float]] = defaultdict(list)
    for _ in range(effort.long_rounds):
        for order in ("upload", "download"):
            rates[order].append(bulk_rate(stage, order, effort.bulk_bytes))
    return {order: statistics.median(values) for order, values in rates.items()}


def bulk_rate(stage: Stage, order: str, size: int) -> float:
    """Of one stream of the stage's only peer, in MiB a second; ``order`` is a function of `load`."""
    return size / _MIB / float(stage.ask(stage.peers[0], order, size=size)["seconds"])


def memory(stage: Stage, effort: Effort) -> Result:
    """What each held, idle connection adds to the memory of all processes, in a lab of the peer's own.

    Nothing has run in it before but one connection, so that no memory freed by other rows hides what
    is needed. The lab's stand-ins have lines of their own: they are not the peer's doing.
    """
    kinds = [type(peer) for peer in stage.peers if peer.pids]
    parts = {
        "own": Line("memory-own", "memory a connection: listener and service, or socat", "KiB"),
        "client": Line("memory-client", "  the lab's qrexec client", "KiB", is_compared=False),
        "broker": Line("memory-broker", "  the lab's broker and agents", "KiB", is_compared=False),
        "total": Line("memory-total", "  all processes together", "KiB"),
    }
    samples: dict[str, Samples] = {part: defaultdict(list) for part in parts}
    notes = []
    for number in range(effort.memory_rounds * len(kinds)):
        kind = kinds[number % len(kinds)]
        try:
            # More than Xen has room for: what each costs is measured over many.
            with open_stage([kind], vchans_per_caller=effort.memory_connections + 1) as own_stage:
                peer = own_stage.peers[0]
                before = footprint(peer.pids, own_stage.broker_pid, own_stage.client_program)
                answer = own_stage.ask(
                    peer, "hold", count=effort.memory_connections, limit_s=effort.hold_limit_s
                )
                if answer["alive"] < effort.memory_connections:
                    raise BenchError(f"{answer['alive']} alive; {answer['failure']}")
                after = footprint(peer.pids, own_stage.broker_pid, own_stage.client_program)
                own_stage.release()
        except BenchError as error:
            notes.append(f"{kind.title} failed: {error}")
            continue
        growth = after.growth(before, effort.memory_connections)
        for part, values in samples.items():
            values[kind.name].append(getattr(growth, part))
    for part, line in parts.items():
        line.values = each(samples[part], statistics.median)
    size = f"{effort.memory_rounds} x {effort.memory_connections} connections"
    return Result(size, list(parts.values()), notes)


def held(stage: Stage, effort: Effort) -> Result:
    """Connections held at once until one fails, counted if a last echo comes back when all are open.

    And what each of them adds to the memory of the peer's processes, all that ran before it being what it is.
    """
    line = Line("held", "connections held at once, all alive", "", is_less_better=False)
    size = Line("held-memory", "  memory a connection then, without the lab's", "KiB")
    notes = []
    for peer in stage.peers:
        try:
            before = footprint(peer.pids, stage.broker_pid, stage.client_program)
            answer = stage.ask(peer, "hold", count=effort.hold_max, limit_s=effort.hold_limit_s)
            line.values[peer.name] = answer["alive"]
            if peer.pids and answer["alive"]:
                after = footprint(peer.pids, stage.broker_pid, stage.client_program)
                size.values[peer.name] = after.growth(before, answer["alive"]).own
            if answer["alive"] < answer["opened"]:
                notes.append(f"{peer.title}: {answer['opened'] - answer['alive']} were dead at the end")
            notes.append(f"{peer.title}: first failure: {answer['failure']}")
        except BenchError as error:
            notes.append(f"{peer.title} failed: {error}")
        stage.release()
    return Result(f"once, up to {effort.hold_max}", [line, size], notes)


def stock(stage: Stage, effort: Effort) -> Result:
    """200 clients that open short connections over a qrexec like stock Qubes 4.3: 20 calls of 80 ms at once.

    One round in a lab of the peer's own. What the time limit cuts off, and what waited longer than 5 s, is
    not among those that succeeded.
    """
    done = Line("stock-done", f"{STOCK_CLIENTS} clients, 20 calls of 80 ms: succeeded", "%", False)
    rate = Line("stock-rate", "  connections", "/s", False)
    notes = []
    for kind in (type(peer) for peer in stage.peers):
        try:
            with open_stage([kind], latency_ms=80, calls_per_target=20) as own_stage:
                answer = own_stage.ask(
                    own_stage.peers[0],
                    "many",
                    clients=STOCK_CLIENTS,
                    count=STOCK_CLIENTS * effort.stock_each,
                    limit_s=effort.many_limit_s,
                )
        except BenchError as error:
            notes.append(f"{kind.title} failed: {error}")
            continue
        done.values[kind.name] = 100 * answer["done"] / (STOCK_CLIENTS * effort.stock_each)
        rate.values[kind.name] = answer["done"] / answer["seconds"]
        parts = (f"{answer[what]} {what}" for what in ("done", "failed", "hung"))
        notes.append(f"{kind.title}: {', '.join(parts)} in {answer['seconds']:.1f} s")
    return Result(f"{STOCK_CLIENTS} x {effort.stock_each} connections", [done, rate], notes)


ROWS: dict[str, Measure] = {
    "connect": connect,
    "many": many,
    "round-trip": round_trip,
    "bulk": bulk,
    "crowd": crowd,
    "memory": memory,
    "held": held,
    "stock": stock,
}
