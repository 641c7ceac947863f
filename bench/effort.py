# SPDX-License-Identifier: GPL-2.0-or-later
"""How much is measured."""

from dataclasses import dataclass, replace

_MIB = 1 << 20


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
    processor_bytes: int
    processor_connections: int
    streams_bytes: int
    payload_round_trips: int
    fair_round_trips: int
    stalled: int
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
    rounds=10,
    connections=20,
    round_trips=1000,
    long_rounds=5,
    many=200,
    many_limit_s=30.0,
    bulk_bytes=128 * _MIB,
    processor_bytes=64 * _MIB,
    processor_connections=100,
    streams_bytes=64 * _MIB,
    payload_round_trips=60,
    fair_round_trips=300,
    stalled=63,
    memory_rounds=3,
    memory_connections=100,
    hold_max=10_000,
    hold_limit_s=60.0,
    crowd=5000,
    crowd_bytes=2 * _MIB,
    crowd_limit_s=600.0,
    stock_each=5,
)
QUICK = Effort(
    rounds=4,
    connections=8,
    round_trips=200,
    long_rounds=1,
    many=100,
    many_limit_s=5.0,
    bulk_bytes=32 * _MIB,
    processor_bytes=32 * _MIB,
    processor_connections=50,
    streams_bytes=16 * _MIB,
    payload_round_trips=50,
    fair_round_trips=100,
    stalled=63,
    memory_rounds=1,
    memory_connections=100,
    hold_max=200,
    hold_limit_s=5.0,
    crowd=100,
    crowd_bytes=_MIB // 2,
    crowd_limit_s=30.0,
    stock_each=2,
)
# What `make bench-quick` takes to see what has changed, in well under a minute.
GUARD = replace(
    FULL,
    connections=12,
    round_trips=400,
    many=100,
    many_limit_s=5.0,
    bulk_bytes=64 * _MIB,
    processor_connections=60,
)
