# SPDX-License-Identifier: GPL-2.0-or-later
"""Flows over the mux calls to one target: each gets the first call with room, and a new one after that ends.

All this happens in the loop's thread; only a call is made in trio's. While there is no call, a few datagrams
wait for one, in number and time bounded: most clients send the first one only once, or again after seconds.
"""

import time
from collections.abc import Collection

import trio

from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.relay.loop import Timer
from qubes_fwd_qrexec.relay.thread import RelayThread
from qubes_fwd_qrexec.system.datagrams import count

from .callbudget import CallBudget
from .callqueue import Key
from .flow import Flow
from .flowcall import FlowCall
from .flowcounters import Dropped
from .flowwaiting import Batch, WaitingFlows
from .muxpool import LINGER_S, MuxPool

# docs/behaviours.md, 56: for how long datagrams wait for a call. A target that runs answers one well within
# this time; one that must start first does not, and then its clients write again.
WAIT_S = 2.0
# How many of the flows that wait begin in one turn of the loop, so that flows which are there have theirs.
BURST = 64
# How often to look whether one has waited for too long, or a call has room again.
_LOOK_S = 0.1


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
        self._waiting = WaitingFlows()
        self._is_asking = False
        self._timer: Timer | None = None

    # As a pool, in trio's thread

    def make_call(self) -> FlowCall:
        return FlowCall(self.relays, self.ports, self)

    def users(self) -> Collection[Key]:
        return frozenset(self._waiting.clients)  # in one step, while the loop's thread may change it

    async def opened(self) -> FlowCall:
        """A call that is ready, made for this if there is none; or one that could not be made."""
        ready = next((one for one in self.mux_calls if one.is_usable), None)
        if ready is None:
            ready = self.opening()
            await ready.settled.wait()
        return ready

    # Flows, in the loop's thread

    def carry(self, flow: Flow, data: bytes, segment: int, now: float) -> None:
        """Send datagrams of a flow over its call, or have them wait for one."""
        if flow.call is None and not self._waiting and (call := self._with_room(now)) is not None:
            _begin(flow, call)
        if flow.call is not None:
            flow.call.send(flow.flow_id, data, segment, now)
            return
        self._waiting.add(flow, data, segment, now)
        self._look_later(_LOOK_S)
        self._want_call(now)

    def _with_room(self, now: float) -> FlowCall | None:
        """The first call that takes another flow now."""
        return next((call for call in tuple(self.mux_calls) if call.has_room(now)), None)

    def _want_call(self, now: float) -> None:
        """Have one more call made, unless that is under way, or one has room in a moment."""
        if not self._is_asking and not any(call.is_held_up(now) for call in tuple(self.mux_calls)):
            self._is_asking = True
            self.relays.tell(self._ask)

    def _serve(self, now: float) -> None:
        """Begin flows that wait, in turn, as far as there is room."""
        for _ in range(BURST):
            if not self._waiting:
                return
            call = self._with_room(now)
            if call is None:
                self._want_call(now)
                return
            flow, batches = self._waiting.take()
            if not self._has(flow):
                _drop(flow, batches)
                continue
            _begin(flow, call)
            for data, segment in batches:
                call.send(flow.flow_id, data, segment, now)
        self._look_later(0.0)

    def _look_later(self, delay_s: float) -> None:
        if self._timer is not None and delay_s:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.relays.loop.after(delay_s, self._look, self._forget_all)

    def _look(self) -> None:
        """Drop what has waited for too long; and serve what may begin now."""
        self._timer = None
        now = time.monotonic()
        self._waiting.drop_old(now - WAIT_S)
        self._serve(now)
        if self._waiting:
            self._look_later(_LOOK_S)

    def _settled(self, kind: Refusal, problem: str | None) -> None:
        """A call that was asked for is ready, or will never be."""
        self._is_asking = False
        if problem is None:
            self._serve(time.monotonic())
            return
        while self._waiting:
            flow, batches = self._waiting.take()
            _drop(flow, batches)
            if self._has(flow):
                flow.owner.not_carried(flow, kind, f"no mux call to {self.target}: {problem}")

    def _has(self, flow: Flow) -> bool:
        """Whether a flow that has waited still wants a call of this pool: its forward may have other ports
        now, and so another pool."""
        return not flow.is_over and flow.carrier is self

    def _stop_asking(self) -> None:
        """There was a bug when a call was settled."""
        self._is_asking = False
        self._forget_all()

    def _forget_all(self) -> None:
        while self._waiting:
            _drop(*self._waiting.take())

    # As the owner of the calls

    def call_ready(self) -> None:
        self._serve(time.monotonic())


def _begin(flow: Flow, call: FlowCall) -> None:
    """Have a call with room carry the flow."""
    flow.flow_id = call.begin(flow)
    flow.call = call


def _drop(flow: Flow, batches: list[Batch]) -> None:
    for data, segment in batches:
        flow.counters.dropped(Dropped.NO_CALL, count(len(data), segment))
