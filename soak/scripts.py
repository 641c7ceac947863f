# SPDX-License-Identifier: GPL-2.0-or-later
"""The scripts: random connections, each made from the run's seed and its own number alone."""

import hashlib
from dataclasses import dataclass, replace
from enum import Enum
from random import Random

# Around the sizes of a frame and a buffer, and enough for several windows.
_SIZES = (0, 0, 1, 2, 100, 5000, 32767, 32768, 32769, 65536, 65537, 200_000, 1 << 20)
_SIZE_RARELY = 4 << 20
_CHUNKS = (1000, 32768, 65536, 1 << 20)
_PAUSES_S = (0.0, 0.0, 0.0, 0.002, 0.02)
# What came before an abort is delivered for 0.8 s (docs/behaviours.md, 12), so a reader pauses for less.
_STALLS_S = (0.0, 0.0, 0.0, 0.05, 0.2)
_STALLS_LONG_S = (1.0, 2.0)


class How(Enum):
    """How a side ends its direction."""

    FIN = "FIN"
    RST = "RST"


@dataclass(frozen=True, slots=True)
class Part:
    """What one side does: it sends ``size`` bytes in pieces, and then ends.

    ``waits``: it ends only after it has seen the other side's end. ``stall_s``: it begins to read so late.
    """

    size: int
    chunk: int
    pause_s: float
    stall_s: float
    waits: bool
    how: How


@dataclass(frozen=True, slots=True)
class Script:
    """One connection. At most one side aborts, and at most one waits for the other's end."""

    number: int
    client: Part
    server: Part

    def data(self, seed: int, side: str) -> bytes:
        """What that side sends. No two sides of any scripts send the same."""
        size = self.client.size if side == "client" else self.server.size
        return hashlib.shake_128(f"{seed} {self.number} {side}".encode()).digest(size)


def make(seed: int, number: int) -> Script:
    """The script with that number in the run with that seed."""
    random = Random(f"{seed} {number}")
    client, server = _part(random), _part(random)
    aborts = random.choice((None, None, "client", "server"))
    # Abort only after the other side was heard: before that, nobody knows how much has arrived where, so what
    # was sent may be lost or not.
    if aborts == "client":
        client, server = replace(client, how=How.RST), replace(server, size=server.size or 1)
    elif aborts == "server":
        client, server = replace(client, size=client.size or 1), replace(server, how=How.RST)
    elif random.random() < 0.1:
        server = replace(server, stall_s=random.choice(_STALLS_LONG_S))
    if client.waits and server.waits:
        server = replace(server, waits=False)
    return Script(number, client, server)


def _part(random: Random) -> Part:
    size = _SIZE_RARELY if random.random() < 0.02 else random.choice(_SIZES)
    return Part(
        size=size,
        chunk=random.choice(_CHUNKS) if size > 20_000 else random.choice((1, 100, 5000)),
        pause_s=random.choice(_PAUSES_S) if size < 200_000 else 0.0,
        stall_s=random.choice(_STALLS_S),
        waits=random.random() < 0.4,
        how=How.FIN,
    )
