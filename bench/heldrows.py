# SPDX-License-Identifier: GPL-2.0-or-later
"""The rows of what is held: a stream beside a crowd, memory, how many at once, and many over few calls."""

import statistics
from collections import defaultdict

from .effort import Effort
from .lines import Line, Result, Samples, each
from .memory import footprint
from .processes import BenchError
from .stage import Stage, open_stage

STOCK_CLIENTS = 200
_MIB = 1 << 20


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
