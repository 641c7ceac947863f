# SPDX-License-Identifier: GPL-2.0-or-later
"""One mux call of the listener side that carries datagrams, in flows.

`flowpool` asks it to carry them; `muxcall` has what such a call is without them.
"""

import math
import secrets
import time
from collections import Counter
from typing import Protocol
from weakref import WeakSet

from qubes_fwd_qrexec.common.errors import LocalProtocolError
from qubes_fwd_qrexec.common.values import IPAddress, TargetPorts
from qubes_fwd_qrexec.mux import (
    FLOWS_PER_TICK,
    FlowCode,
    FlowConnection,
    FlowRequested,
    GoawayCode,
    Hello,
    Origin,
    ProxyVersion,
)
from qubes_fwd_qrexec.relay.flowmux import FlowEnd, FlowMux
from qubes_fwd_qrexec.relay.thread import RelayThread

from .bucket import Bucket
from .callqueue import Key
from .crowd import client_key
from .flowcounters import Dropped, FlowCounters
from .muxcall import MuxCall
from .qrexec import Call

# The target ends what is above FLOWS_PER_TICK in one of its seconds. With half of that at once and half in a
# second, no second has more.
FLOWS_AT_ONCE = FLOWS_PER_TICK // 2


class Carried(FlowEnd, Protocol):
    """A flow in the call; ``counters`` are those of its forward."""

    client: IPAddress
    target_port: int
    proxy: ProxyVersion

    @property
    def counters(self) -> FlowCounters: ...

    def origin(self) -> Origin: ...

    def make_room(self) -> None:
        """End it, as others need the call."""


class FlowCallOwner(Protocol):
    """Who is told about a call, in the loop's thread."""

    def call_ready(self) -> None:
        """A call takes flows from now on."""


class FlowCall(MuxCall[FlowMux]):
    """A mux call that carries datagrams.

    All but what the holder of a place is asked belongs to the loop's thread. ``moved_at``: when datagrams
    were last sent or received (`time.monotonic`).
    """

    def __init__(self, relays: RelayThread, ports: TargetPorts, owner: FlowCallOwner) -> None:
        super().__init__(relays, ports)
        self.moved_at = time.monotonic()
        self._owner = owner
        self._begins = Bucket(FLOWS_AT_ONCE, FLOWS_AT_ONCE, self.moved_at)
        self._flows: dict[int, Carried] = {}
        self._by_client: Counter[Key] = Counter()
        self._sole: Key | None = None
        self._forwards: WeakSet[FlowCounters] = WeakSet()

    # As a mux call

    @property
    def carries(self) -> int:
        return len(self._flows)

    @property
    def is_used(self) -> bool:
        return bool(self._flows)

    @property
    def sole_user(self) -> tuple[Key, float] | None:
        sole = self._sole
        return None if sole is None or self.is_opening else (sole, time.monotonic() - self.moved_at)

    def make_mux(self, call: Call) -> FlowMux:
        hello = Hello(0, secrets.token_bytes(16))
        connection = FlowConnection(hello, range(self.ports.first, self.ports.last + 1))
        return FlowMux(self.relays.loop, connection, call.stdout, call.stdin, self, hello_s=math.inf)

    def cut(self) -> None:
        for flow in list(self._flows.values()):
            flow.make_room()

    # For the pool

    @property
    def is_lost(self) -> bool:
        """Whether it has ended."""
        return self.mux is None or self.mux.is_over

    def has_room(self, now: float) -> bool:
        """Whether it takes another flow now."""
        return self._has_slot and self._begins.fill(now) >= 1

    def is_held_up(self, now: float) -> bool:
        """Whether it takes another flow in a moment, as many have begun in the last second."""
        return self._has_slot and self._begins.fill(now) < 1

    @property
    def _has_slot(self) -> bool:
        return self.is_usable and self.mux is not None and self.mux.room > 0

    def begin(self, flow: Carried) -> int:
        """Begin a flow, and return its number. Raises LocalProtocolError unless it `has_room`."""
        if self.mux is None:
            raise LocalProtocolError("there is no call")
        flow_id = self.mux.open(flow.target_port, flow.origin(), flow.proxy, flow)
        self._begins.left -= 1
        self.opened += 1
        self._flows[flow_id] = flow
        self._forwards.add(flow.counters)
        self._count(client_key(flow.client), 1)
        return flow_id

    def send(self, flow_id: int, data: bytes, segment: int, now: float) -> None:
        """Send datagrams of a flow, or drop them."""
        self.moved_at = now
        if self.mux is not None:
            self.mux.send(flow_id, data, segment)

    def end(self, flow_id: int, code: FlowCode) -> None:
        """End a flow, which hears nothing of that; what it has waiting is dropped."""
        if self.mux is not None:
            self.mux.end(flow_id, code)
        self.left(flow_id)

    def left(self, flow_id: int) -> None:
        """A flow has ended; a second call changes nothing."""
        flow = self._flows.pop(flow_id, None)
        if flow is not None:
            self._count(client_key(flow.client), -1)
            self.used_at = time.monotonic()

    def give_up(self) -> None:
        """The target drains, or should: take nothing new, and end with the last flow there is."""
        self.turn_away()
        if self.mux is not None:
            self.mux.drain(GoawayCode.SHUTDOWN)

    def _count(self, key: Key, change: int) -> None:
        self._by_client[key] += change
        if not self._by_client[key]:
            del self._by_client[key]
        self._sole = next(iter(self._by_client)) if len(self._by_client) == 1 else None

    # As the owner of the mux

    def ready(self) -> None:
        super().ready()
        self._owner.call_ready()

    def flow_requested(self, event: FlowRequested) -> None:
        """Never called: the target cannot begin flows."""

    def dropped(self, flow_id: int, datagrams: int, *, is_old: bool) -> None:
        flow = self._flows.get(flow_id)
        if flow is not None:
            flow.counters.dropped(Dropped.OLD if is_old else Dropped.FULL, datagrams)

    def lost(self, late: int, there: int) -> None:
        """Nobody knows whose these were: each forward that has had a flow here counts them."""
        for counters in self._forwards:
            counters.dropped(Dropped.LATE, late)
            counters.dropped(Dropped.TARGET, there)
