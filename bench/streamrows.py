# SPDX-License-Identifier: GPL-2.0-or-later
"""The rows of how payload and company change a stream: larger payloads, more streams, stalled streams."""

import statistics
from collections.abc import Callable

from .effort import Effort
from .lines import Line, Result, collect, p99
from .peers import Peer
from .processor import Usage
from .stage import Stage

PAYLOADS = (1, 64, 1024, 4096, 16_384, 65_536)
STREAMS = (1, 4, 16, 64)
WAYS = {"upload": "client to server", "download": "server to client"}
_MOST_BY_CALL = 16
_MIB = 1 << 20


def counted(count: int, what: str) -> str:
    """1 stream, 4 streams."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def payload(stage: Stage, effort: Effort) -> Result:
    """So many bytes there and back on a connection that is open. The median of all rounds."""
    lines, notes = [], []
    for size in PAYLOADS:

        def sample(peer: Peer, size: int = size) -> list[float]:
            answer = stage.ask(peer, "round_trips", count=effort.payload_round_trips, size=size)
            return [1000 * seconds for seconds in answer["seconds"]]

        found, failed = collect(stage.peers, effort.long_rounds, sample)
        line = Line(f"payload-{size}", f"round trip of {counted(size, 'byte')}, median", "ms")
        lines.append(line.fill(found, statistics.median))
        notes += failed
    return Result(f"{effort.long_rounds} x {effort.payload_round_trips} round trips", lines, notes)


def streams(stage: Stage, effort: Effort) -> Result:
    """All streams together, each way, and the processor time for a MiB of all that is between.

    The medians of the rounds.
    """
    lines, notes = [], []
    size = effort.streams_bytes
    mib = size / _MIB
    for way, whither in WAYS.items():
        for count in STREAMS:

            def sample(peer: Peer, way: str = way, count: int = count) -> tuple[float, Usage]:
                answer, used = stage.meter(peer, "transfer", count, way=way, size=size)
                return float(answer["seconds"]), used

            peers = [peer for peer in stage.peers if count <= _MOST_BY_CALL or not peer.is_call_each]
            found, failed = collect(peers, effort.long_rounds, sample)
            notes += failed
            rates = {name: [[mib / seconds] for seconds, _ in rounds] for name, rounds in found.items()}
            used = {
                name: [[1e3 * used.between / mib] for _, used in rounds] for name, rounds in found.items()
            }
            title = f"{counted(count, 'stream')}, {whither}"
            rate = Line(f"streams-{way}-{count}", title, "MiB/s", is_less_better=False)
            each = Line(f"streams-{way}-{count}-processor", "  processor time for a MiB", "ms")
            lines += [rate.fill(rates, statistics.median), each.fill(used, statistics.median)]
    return Result(f"{effort.long_rounds} x {mib:.0f} MiB each way", lines, notes)


def fair(stage: Stage, effort: Effort) -> Result:
    """Round trips of one byte alone, beside a stream that is always full, and beside many that nobody reads.

    The 99th percentile of each round, and of these the worst. Then a stream's rate beside those that nobody
    reads, in parts of its rate alone: the median of the rounds, and the worst.
    """
    can_stall = [peer for peer in stage.peers if not peer.is_call_each]
    stalled = f"beside {effort.stalled} that nobody reads"

    def p99_ms(peer: Peer) -> list[float]:
        answer = stage.ask(peer, "round_trips", count=effort.fair_round_trips)
        return [1000 * p99(answer["seconds"])]

    def beside_stream(way: str) -> Callable[[Peer], list[float]]:
        def sample(peer: Peer) -> list[float]:
            with stage.beside(peer, "flood", way=way):
                return p99_ms(peer)

        return sample

    def beside_stalled(peer: Peer) -> list[float]:
        with stage.beside(peer, "stall", effort.stalled):
            return p99_ms(peer)

    lines, notes = [], []
    title = "round trip, 99th percentile of the worst round"
    for key, where, peers, sample in (
        ("alone", "alone", stage.peers, p99_ms),
        ("upload", "beside a stream to the server", stage.peers, beside_stream("upload")),
        ("download", "beside a stream to the client", stage.peers, beside_stream("download")),
        ("stalled", stalled, can_stall, beside_stalled),
    ):
        found, failed = collect(peers, effort.long_rounds, sample)
        notes += failed
        lines.append(Line(f"fair-{key}", f"{title}, {where}", "ms").fill(found, max))
    for way, whither in WAYS.items():

        def part(peer: Peer, way: str = way) -> list[float]:
            alone = float(stage.ask(peer, way, size=effort.streams_bytes)["seconds"])
            with stage.beside(peer, "stall", effort.stalled):
                return [100 * alone / float(stage.ask(peer, way, size=effort.streams_bytes)["seconds"])]

        found, failed = collect(can_stall, effort.long_rounds, part)
        notes += failed
        line = Line(f"fair-{way}-rate", f"one stream {stalled}, {whither}: of its rate alone", "%", False)
        worst = Line(f"fair-{way}-rate-worst", "  in the worst round", "%", False)
        lines += [line.fill(found, statistics.median), worst.fill(found, min)]
    return Result(f"{effort.long_rounds} x {effort.fair_round_trips} round trips", lines, notes)
