# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is let in, and who is one too many: counting, without sockets and with a given clock.

A forward asks its `Account` about every connection, and reports when one is over. A connection that is not
admitted gets RST at once. Connections are limited for a rule, for each client of a rule and for the process;
new connections per second are limited for a rule. No client keeps more than its share while others want some:
if a rule or the process is full, the idlest connection of the client with most makes room (`crowd`), and one
client gets at most half of a rule's rate at once.
"""

import math
import time
from collections.abc import Callable
from enum import StrEnum
from ipaddress import IPv6Address

from qubes_fwd_qrexec.common.rules import Limits
from qubes_fwd_qrexec.common.values import IPAddress
from qubes_fwd_qrexec.relay.budget import FLOOR_BYTES, LENT_BYTES, Budget
from qubes_fwd_qrexec.relay.socketbuffers import HELD_BYTES, SocketMemory
from qubes_fwd_qrexec.system.memory import memory_bytes

from .bucket import Bucket
from .crowd import Crowd, Host, Member, client_key

# A listener holds at most so many, over several mux calls: as many as one address has ports.
PROCESS_MAX = 65_536
# And one for each so much of the qube's memory. An idle one takes a quarter of that: 2 KiB here, as much for
# its floor (`budget`), and 4 KiB in the kernel (docs/facts.md, L28). So a sys-net of 400 MiB holds 12,800.
MEMORY_EACH_BYTES = 32 << 10
_LOOK_S = 1.0
# What sockets may hold beside that is another quarter, if that is less than `HELD_BYTES`.
_HELD_PART = 4
# An ordinary program may have 1024 files open (systemd's soft limit, DefaultLimitNOFILE). So no honest client
# needs more, nor does a proxy with an office behind it. It takes 64 clients to fill a process.
PER_SOURCE = 1024
# The hosts of a LAN share one IPv6 network of 64 bits, and a single host has as many addresses in it as it
# likes. So each address counts as a client, and a whole network as this many clients.
CLIENTS_PER_NETWORK = 8
# docs/behaviours.md, 35: more than a mux call carries (docs/numbers.md), as refusing costs less. A server by
# itself was seen to take 4,900.
RATE = 5000
# How many connections a second are ended to make room for others: a machine with many addresses cannot turn
# over more than this, and looking for the idlest does not take all the time.
YIELDS = 50


class NotAdmitted(StrEnum):
    """Why a connection is not let in. The values are the words of a rule's options, if it has one."""

    STRANGER = "srchosts"
    SIDE = "side"
    PER_SOURCE = "per-source"
    CONNECTIONS = "connections"
    PROCESS = "process"
    RATE = "rate"


def process_max(descriptors: int) -> int:
    """How many connections a process takes that may have ``descriptors`` files open; below 0 is no limit.

    A quarter is left for listening sockets and calls.
    """
    return PROCESS_MAX if descriptors < 0 else max(1, min(PROCESS_MAX, descriptors * 3 // 4))


def budget(memory: int) -> Budget:
    """What the streams of a listener may make it hold, in a qube with so many bytes of ``memory``."""
    sockets = SocketMemory(held_max=min(HELD_BYTES, memory // _HELD_PART))
    return Budget(PROCESS_MAX * FLOOR_BYTES + LENT_BYTES, PROCESS_MAX, sockets)


class _Rate:
    """A rule's new connections per second, of which each client has half.

    A client that has used up its half may use what nobody else wants, as long as more than half is left.
    """

    def __init__(self, rate: int, now: float) -> None:
        self.rate = rate
        self._half = max(1.0, rate / 2)
        self._all = Bucket(rate, rate, now)
        self._by_client: dict[Host, Bucket] = {}

    @property
    def clients(self) -> int:
        return len(self._by_client)

    def take(self, client: Host, now: float) -> bool:
        """Whether one more connection of ``client`` may come; if so, it is counted."""
        if len(self._by_client) > 2 * self.rate:  # only clients of the last second are not full again
            self._by_client = {c: b for c, b in self._by_client.items() if b.fill(now) < self._half}
        own = self._by_client.get(client)
        if own is None:
            own = self._by_client[client] = Bucket(self._half, self._half, now)
        if self._all.fill(now) < 1 or (own.fill(now) < 1 and self._all.left <= self.rate / 2):
            return False
        self._all.left -= 1
        own.left = max(0.0, own.left - 1)
        return True


class Process:
    """All connections of a process, for all forwards together."""

    def __init__(
        self,
        connections_max: int = PROCESS_MAX,
        clock: Callable[[], float] = time.monotonic,
        yields: float = YIELDS,
        memory: Callable[[], int] = memory_bytes,
    ) -> None:
        """``yields``: how many connections a second are ended to make room for those of others. ``memory``:
        how many bytes the qube has now, which may be too few for ``connections_max``."""
        self._most = connections_max
        self._memory = memory
        self._room = 0
        self._look_at = -math.inf
        self.connections = 0
        self._clock = clock
        self._yields = Bucket(yields, yields, clock())
        self._accounts: set[Account] = set()

    @property
    def connections_max(self) -> int:
        """How many there may be now; once a second it asks the kernel how much memory there is."""
        now = self._clock()
        if now >= self._look_at:
            self._look_at = now + _LOOK_S
            self._room = max(1, min(self._most, self._memory() // MEMORY_EACH_BYTES))
        return self._room

    @property
    def rule_max(self) -> int:
        """The limit of a rule that sets none: three quarters, so that no rule alone keeps out all others."""
        return max(1, self.connections_max * 3 // 4)

    def join(self, account: "Account") -> None:
        """An account has connections now."""
        self._accounts.add(account)

    def leave(self, account: "Account") -> None:
        """An account has no connections any more."""
        self._accounts.discard(account)

    @property
    def may_yield(self) -> bool:
        """Whether another connection may be ended now to make room; `yielded` counts it."""
        return self._yields.fill(self._clock()) >= 1

    def yielded(self) -> None:
        """A connection was ended to make room."""
        self._yields.left -= 1

    def idlest_before(self, account: "Account", client: IPAddress) -> tuple["Account", Member] | None:
        """The connection that makes room for one of ``client`` in ``account``, and its own account."""
        largest = max(self._accounts, key=lambda one: one.connections, default=account)
        if largest.connections > account.connections:
            member = largest.crowd.idlest()
        else:
            largest, member = account, account.crowd.idlest_before(client)
        return None if member is None else (largest, member)


class Account:
    """The connections of one forward."""

    def __init__(
        self,
        limits: Limits,
        process: Process,
        clock: Callable[[], float] = time.monotonic,
        quiet_s: float = math.inf,
    ) -> None:
        """``quiet_s``: a client for which there is no room gives up what has been quiet for so long."""
        self.connections = 0
        self._quiet_s = quiet_s
        self.crowd = Crowd()
        self.yielded = 0
        """How many connections were ended to make room for others."""
        self._process = process
        self._clock = clock
        self._limits = limits
        self._rate = _Rate(limits.rate or RATE, clock())

    @property
    def _per_source(self) -> int:
        return self._limits.per_source or PER_SOURCE

    @property
    def _connections(self) -> int:
        return self._limits.connections or self._process.rule_max

    @property
    def clients(self) -> int:
        """How many addresses have a connection."""
        return self.crowd.clients

    @property
    def clients_remembered(self) -> int:
        """How many addresses the rate limit remembers."""
        return self._rate.clients

    def change(self, limits: Limits) -> None:
        """Apply new limits from now on; live connections stay."""
        self._limits = limits
        rate = limits.rate or RATE
        if self._rate.rate != rate:
            self._rate = _Rate(rate, self._clock())

    def admit(self, member: Member) -> NotAdmitted | None:
        """Count a connection, or return why it is not let in. One that is let in must `leave` in the end.

        This may call `make_room` of another connection, which it ends for this one.
        """
        client = member.client
        own: Member | None = None
        refusal, yielding = self._room(client)
        if refusal is not None:
            own = self.crowd.quiet_of(client, self._clock() - self._quiet_s)
            if own is None:
                return refusal
        if not self._rate.take(client_key(client)[1], self._clock()):
            return NotAdmitted.RATE
        if yielding is not None:
            self._process.yielded()
            yielding[0].end(yielding[1])
        elif own is not None:
            self.end(own)
        self.crowd.add(member)
        self.connections += 1
        self._process.connections += 1
        self._process.join(self)
        return None

    def end(self, member: Member) -> None:
        """End a connection, which makes room for another."""
        self.yielded += 1
        self.leave(member)
        member.make_room()

    def _is_network_full(self, client: IPAddress) -> bool:
        most = self._per_source * CLIENTS_PER_NETWORK
        return isinstance(client, IPv6Address) and self.crowd.held_in(client) >= most

    def _room(self, client: IPAddress) -> tuple[NotAdmitted | None, "tuple[Account, Member] | None"]:
        """Why there is no room; else the connection that must make room, if one must.

        Nobody is looked for where nobody may be ended: that takes longer than anything else here.
        """
        if self.crowd.held_by(client) >= self._per_source or self._is_network_full(client):
            return NotAdmitted.PER_SOURCE, None
        if self.connections >= self._connections:
            member = self.crowd.idlest_before(client) if self._process.may_yield else None
            return (NotAdmitted.CONNECTIONS, None) if member is None else (None, (self, member))
        if self._process.connections >= self._process.connections_max:
            found = self._process.idlest_before(self, client) if self._process.may_yield else None
            return (NotAdmitted.PROCESS, None) if found is None else (None, found)
        return None, None

    def leave(self, member: Member) -> None:
        """A connection that was let in is over; a second call changes nothing."""
        if self.crowd.discard(member):
            self.connections -= 1
            self._process.connections -= 1
            if not self.connections:
                self._process.leave(self)

    def words(self, refusal: NotAdmitted) -> str:
        """For the log: which limit it is, and how high."""
        match refusal:
            case NotAdmitted.PER_SOURCE:
                return (
                    f"its address has {self._per_source} connections, the limit per-source, "
                    f"or its IPv6 network {self._per_source * CLIENTS_PER_NETWORK}"
                )
            case NotAdmitted.CONNECTIONS:
                return f"there are {self._connections} connections, the limit connections"
            case NotAdmitted.PROCESS:
                return f"all forwards together have {self._process.connections_max} connections"
            case NotAdmitted.RATE:
                return f"more than {self._rate.rate} new connections in a second, the limit rate"
            case NotAdmitted.SIDE:
                return "it came in through an interface that is not on the forward's side"
            case NotAdmitted.STRANGER:
                return "it is in none of the networks of srchosts"
