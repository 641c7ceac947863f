# SPDX-License-Identifier: GPL-2.0-or-later
"""Flows over the mux calls to one target: each gets the first call with room, and a new one after that ends.

All this happens in the loop's thread; only a call is made in trio's. While there is no call, a few datagrams
wait for one, in number and time bounded: most clients send the first one only once, or again after seconds.
"""

import time
from collections import Counter, deque
from collections.abc import Collection
from functools import partial
from typing import NamedTuple

import trio

from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.relay.loop import Timer
from qubes_fwd_qrexec.relay.thread import RelayThread
from qubes_fwd_qrexec.system.datagrams import count

from .callbudget import CallBudget
from .callqueue import Key
from .crowd import client_key
from .flow import Flow
from .flowcall import FlowCall
from .flowcounters import Dropped
from .muxpool import LINGER_S, MuxPool

# docs/behaviours.md, 56: for how long datagrams wait for a call, and how many bytes of them in all and of one
# flow. A target that runs answers a call well within this time; one that must start first does not, and then
# its clients write again.
WAIT_S = 2.0
WAITING_MAX_BYTES = 1 << 20
WAITING_OF_ONE_BYTES = 64 << 10
# What a datagram takes here beside its bytes, so that empty ones have a bound, too.
_COST_BYTES = 256
# How often to look whether one has waited for too long, or a call has room again.
_LOOK_S = 0.1


class _Waiting(NamedTuple):
    """Datagrams that wait since ``since`` (`time.monotonic`)."""

    flow: Flow
    data: bytes
    segment: int
    since: float

    @property
    def cost_bytes(self) -> int:
        return len(self.data) + _COST_BYTES


class FlowPool(MuxPool[FlowCall]):
    """The mux calls for datagrams to one target and one range of its ports."""

    def __init__(
        self,
        qrexec_client: tuple[str, ...],
        calls: CallBudget,
        target: str,
        service: str,
        ports: TargetPorts,
        relays: RelayThread,
        tasks: trio.Nursery,
        linger_s: float = LINGER_S,
    ) -> None:
        super().__init__(qrexec_client, calls, target, service, ports, relays, tasks, linger_s)
        self._waiting: deque[_Waiting] = deque()
        self._waiting_bytes = 0
        self._clients: set[Key] = set()
        self._is_asking = False
        self._timer: Timer | None = None
        self._past: Counter[Dropped] = Counter()

    # As a pool, in trio's thread

    def make_call(self) -> FlowCall:
        return FlowCall(self.relays, self.ports, self)

    def users(self) -> Collection[Key]:
        return frozenset(self._clients)  # in one step, while the loop's thread may change it

    def dropped(self) -> Counter[Dropped]:
        """How many datagrams the calls have dropped, at both ends, by reason."""
        found = Counter(self._past)
        for mux_call in tuple(self.mux_calls):
            found += mux_call.dropped()
        return found

    async def opened(self) -> FlowCall:
        """A call that is ready or was not to be had, opened for it if there is none."""
        ready = next((one for one in self.mux_calls if one.is_usable), None)
        if ready is None:
            ready = self.opening()
            await ready.settled.wait()
        return ready

    def _ask(self) -> None:
        if not self.is_retired:
            self._tasks.start_soon(self._open_one)
        else:
            over = f"the forward to {self.target} is over"
            self.relays.order(partial(self._settled, Refusal.NO_CALL, over), self._stop_asking)

    async def _open_one(self) -> None:
        opening = self.opening()
        await opening.settled.wait()
        kind = opening.refusal or Refusal.NO_CALL
        self.relays.order(partial(self._settled, kind, opening.problem), self._stop_asking)

    # Flows, in the loop's thread

    def carry(self, flow: Flow, data: bytes, segment: int, now: float) -> None:
        """Send datagrams of a flow over its call, or have them wait for one."""
        if flow.call is None and not self._waiting:
            self._join(flow, now)
        if flow.call is None:
            self._wait(_Waiting(flow, data, segment, now))
        else:
            flow.call.send(flow.flow_id, data, segment, now)

    def _join(self, flow: Flow, now: float) -> None:
        """Have the first call with room carry the flow, if there is one."""
        for call in tuple(self.mux_calls):
            if call.has_room(now):
                origin = flow.origin()
                flow.flow_id = call.begin(flow.target_port, origin, flow.proxy, flow)
                flow.call = call
                return

    def _wait(self, waiting: _Waiting) -> None:
        flow = waiting.flow
        if flow.waiting_bytes + waiting.cost_bytes > WAITING_OF_ONE_BYTES and flow.waiting_bytes:
            _drop(waiting, Dropped.FULL)
            return
        self._waiting.append(waiting)
        flow.waiting_bytes += waiting.cost_bytes
        self._waiting_bytes += waiting.cost_bytes
        while self._waiting_bytes > WAITING_MAX_BYTES:
            _drop(self._take(), Dropped.FULL)
        self._clients.add(client_key(flow.client))
        if self._timer is None:
            self._timer = self.relays.loop.after(_LOOK_S, self._look, self._forget_all)
        self._want_call(waiting.since)

    def _take(self) -> _Waiting:
        """Take what has waited longest."""
        waiting = self._waiting.popleft()
        waiting.flow.waiting_bytes -= waiting.cost_bytes
        self._waiting_bytes -= waiting.cost_bytes
        return waiting

    def _want_call(self, now: float) -> None:
        """Have one more call made, unless that is under way, or one has room in a moment."""
        if not self._is_asking and not any(call.is_held_up(now) for call in tuple(self.mux_calls)):
            self._is_asking = True
            self.relays.tell(self._ask)

    def _serve(self, now: float) -> None:
        """Send what waits as far as there is room, each flow's datagrams in their order."""
        for _ in range(len(self._waiting)):
            waiting = self._take()
            flow = waiting.flow
            if flow.is_over:
                _drop(waiting, Dropped.NO_CALL)
                continue
            if flow.call is None:
                self._join(flow, now)
            if flow.call is None:
                self._waiting.append(waiting)
                flow.waiting_bytes += waiting.cost_bytes
                self._waiting_bytes += waiting.cost_bytes
            else:
                flow.call.send(flow.flow_id, waiting.data, waiting.segment, now)
        if self._waiting:
            self._want_call(now)
        else:
            self._clients.clear()

    def _look(self) -> None:
        """Drop what has waited for too long; and serve what may begin now."""
        self._timer = None
        now = time.monotonic()
        while self._waiting and now - self._waiting[0].since >= WAIT_S:
            _drop(self._take(), Dropped.NO_CALL)
        self._serve(now)
        if self._waiting:
            self._timer = self.relays.loop.after(_LOOK_S, self._look, self._forget_all)

    def _settled(self, kind: str, problem: str | None) -> None:
        """A call that was asked for is ready, or will never be."""
        self._is_asking = False
        if problem is None:
            self._serve(time.monotonic())
            return
        while self._waiting:
            waiting = self._take()
            _drop(waiting, Dropped.NO_CALL)
            if not waiting.flow.is_over:
                error = f"no mux call to {self.target}: {problem}"
                waiting.flow.owner.not_carried(waiting.flow, kind, error)
        self._clients.clear()

    def _stop_asking(self) -> None:
        """There was a bug when a call was settled."""
        self._is_asking = False
        self._forget_all()

    def _forget_all(self) -> None:
        while self._waiting:
            _drop(self._take(), Dropped.NO_CALL)
        self._clients.clear()

    # As the owner of the calls

    def call_ready(self) -> None:
        self._serve(time.monotonic())

    def call_over(self, call: FlowCall) -> None:
        self._past += call.dropped()


def _drop(waiting: _Waiting, reason: Dropped) -> None:
    waiting.flow.owner.dropped(reason, count(len(waiting.data), waiting.segment))
