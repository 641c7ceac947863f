# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is let in, and who is one too many: counting, without a socket and with a clock that is given.

A forward asks its `Account` about every connection and tells it when one is over. A refusal is an RST at
once and changes nothing for anybody else. What may be held is bounded for a rule, for each source of a rule
and for the process; what may come in a second for a rule.
"""

import time
from collections.abc import Callable
from enum import StrEnum
from ipaddress import IPv4Address

from .budget import STREAMS_MAX
from .rules import Limits
from .values import IPAddress, unmapped

# As many as `budget` has floors for. Ten thousand were held in docs/numbers.md, with 9 KiB for each.
PROCESS_MAX = STREAMS_MAX
# An ordinary program may have 1024 files open (the soft limit that systemd gives, DefaultLimitNOFILE), so
# that no honest client needs more, nor a proxy with a whole office behind it; sixteen sources fill a process.
PER_SOURCE = 1024
# relay-behaviours 35: it is more than a tunnel carries (docs/numbers.md), and refusing costs less than
# carrying. Design, section 12: a server by itself was seen to take 4,900.
RATE = 5000


class Refusal(StrEnum):
    """Why a connection is not let in. The values are the rule's own words where it has any."""

    STRANGER = "srchosts"
    PER_SOURCE = "per-source"
    CONNECTIONS = "connections"
    PROCESS = "process"
    RATE = "rate"


def process_max(descriptors: int) -> int:
    """How many connections a process takes that may have so many files open; below 0 means any number.

    A quarter stays for listening sockets and calls.
    """
    return PROCESS_MAX if descriptors < 0 else max(1, min(PROCESS_MAX, descriptors * 3 // 4))


class Process:
    """All connections of a process, of whatever forward."""

    def __init__(self, connections_max: int = PROCESS_MAX) -> None:
        self.connections_max = connections_max
        self.connections = 0

    @property
    def rule_max(self) -> int:
        """What a rule has that says nothing: three quarters, so that no rule alone keeps out all others."""
        return max(1, self.connections_max * 3 // 4)


class _Bucket:
    """So many in a second, and at most a second's worth at once."""

    def __init__(self, rate: int, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._clock = clock
        self._left = float(rate)
        self._at = clock()

    def take(self) -> bool:
        now = self._clock()
        self._left = min(self._rate, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Account:
    """The connections of one forward."""

    def __init__(self, limits: Limits, process: Process, clock: Callable[[], float] = time.monotonic) -> None:
        self.connections = 0
        self._process = process
        self._clock = clock
        self._by_source: dict[IPv4Address | int, int] = {}
        self._limits = limits
        self._bucket = _Bucket(self._rate, clock)

    @property
    def _rate(self) -> int:
        return self._limits.rate or RATE

    @property
    def _per_source(self) -> int:
        return self._limits.per_source or PER_SOURCE

    @property
    def _connections(self) -> int:
        return self._limits.connections or self._process.rule_max

    @property
    def sources(self) -> int:
        """How many sources have a connection."""
        return len(self._by_source)

    def change(self, limits: Limits) -> None:
        """From now on; who is in stays in."""
        rate = self._rate
        self._limits = limits
        if self._rate != rate:
            self._bucket = _Bucket(self._rate, self._clock)

    def admit(self, source: IPAddress) -> Refusal | None:
        """Count a connection, or say why not. Every one that is let in must `leave`, once."""
        counted = _counted(source)
        held = self._by_source.get(counted, 0)
        if held >= self._per_source:
            return Refusal.PER_SOURCE
        if self.connections >= self._connections:
            return Refusal.CONNECTIONS
        if self._process.connections >= self._process.connections_max:
            return Refusal.PROCESS
        if not self._bucket.take():
            return Refusal.RATE
        self._by_source[counted] = held + 1
        self.connections += 1
        self._process.connections += 1
        return None

    def leave(self, source: IPAddress) -> None:
        """A connection that was let in is over."""
        counted = _counted(source)
        left = self._by_source[counted] - 1
        if left:
            self._by_source[counted] = left
        else:
            del self._by_source[counted]
        self.connections -= 1
        self._process.connections -= 1

    def words(self, refusal: Refusal) -> str:
        """For the log: which limit it was, and how high that is."""
        match refusal:
            case Refusal.PER_SOURCE:
                return f"its source has {self._per_source} connections, the limit per-source"
            case Refusal.CONNECTIONS:
                return f"there are {self._connections} connections, the limit connections"
            case Refusal.PROCESS:
                return f"all forwards together have {self._process.connections_max} connections"
            case Refusal.RATE:
                return f"more than {self._rate} new connections in a second, the limit rate"
            case Refusal.STRANGER:
                return "it is in none of the networks of srchosts"


def _counted(source: IPAddress) -> IPv4Address | int:
    """What counts as one source: an IPv4 address, or an IPv6 network of 64 bits, which is what one host
    may choose its addresses from (RFC 4862)."""
    plain = unmapped(source)
    return plain if isinstance(plain, IPv4Address) else int(plain) >> 64
