# SPDX-License-Identifier: GPL-2.0-or-later
"""What `growth` measures and `plot` draws."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Memory:
    """What ``held`` connections have added, in KiB: to the listener (or socat) itself, to all processes of
    the peer, services among them, and to the lab's broker."""

    first: float
    own: float
    broker: float


@dataclass(frozen=True, slots=True)
class Step:
    """What was measured beside ``held`` connections."""

    peer: str
    held: int
    rate: float
    failed: int
    connect_ms: float
    round_trip_ms: float
    upload_mib_s: float
    download_mib_s: float
    memory: Memory

    @property
    def each_kib(self) -> float:
        return self.memory.own / self.held
