# SPDX-License-Identifier: GPL-2.0-or-later
"""A datagram call at work: the protocol's state, the qrexec call's two sockets, and what each flow is joined
with.

What comes is passed on at once, and nobody is waited for: what the call does not take within 50 ms is
dropped and counted (`flowqueue`). The owner (`FlowMuxOwner`) hears what happens to the call as a whole.
"""

import math
import socket
import time
from collections.abc import Iterator
from functools import partial
from typing import Protocol

from qubes_fwd_qrexec.mux import (
    MAX_DATAGRAM_BYTES,
    DatagramsReceived,
    FlowCode,
    FlowConnection,
    FlowEnded,
    FlowEvent,
    FlowRequested,
    GoawayCode,
    GoawayReceived,
    HelloReceived,
    LostReported,
    Origin,
    ProxyVersion,
)
from qubes_fwd_qrexec.system.datagrams import count

from .callwriter import CallWriter
from .flowqueue import FlowQueue
from .loop import Loop
from .muxbase import TURN_FRAMES, MuxBase
from .muxowner import CallOwner
from .patience import HELLO_S

# How much is given to the call at once: what it has taken cannot be dropped any more.
_WRITE_BYTES = 64 << 10
# Before any time: nothing has waited for too long then.
_NEVER = -math.inf
# Why the flows of a call have ended, by why the call has.
_ENDS = {
    GoawayCode.LEASE_OVER: FlowCode.LEASE_OVER,
    GoawayCode.REVOKED: FlowCode.REVOKED,
    GoawayCode.SHUTDOWN: FlowCode.SHUTDOWN,
    GoawayCode.DONE: FlowCode.DONE,
    GoawayCode.IDS_USED_UP: FlowCode.SHUTDOWN,
}


class FlowEnd(Protocol):
    """What a flow of a mux is joined with; called in the loop's thread."""

    def deliver(self, data: memoryview, segment: int) -> None:
        """Datagrams have come: one (``segment`` 0), or several of so many bytes each, of which the last may
        be shorter. The data is not there any more after the call.
        """

    def ended(self, code: FlowCode) -> None:
        """The other end has ended the flow, or the call is over. Nothing more comes."""

    def fail(self) -> None:
        """There was a bug in `deliver` or `ended`: end the flow."""


class FlowMuxOwner(CallOwner, Protocol):
    """The maker of one `FlowMux`."""

    def flow_requested(self, event: FlowRequested) -> None:
        """The peer begins a flow; answer with `FlowMux.join` or `FlowMux.end` at once."""

    def dropped(self, flow_id: int, datagrams: int, *, is_old: bool) -> None:
        """So many datagrams of a flow were dropped here: they had waited for too long, or had no room."""

    def lost(self, late: int, there: int) -> None:
        """So many datagrams came for flows that had ended here, and the target side has dropped so many,
        since the last call of this."""


class FlowMux(MuxBase):
    """One end of a mux call that carries datagrams, between ``source`` and ``sink``; see `MuxBase`."""

    def __init__(
        self,
        loop: Loop,
        connection: FlowConnection,
        source: socket.socket,
        sink: socket.socket,
        owner: FlowMuxOwner,
        hello_s: float = HELLO_S,
    ) -> None:
        self.connection = connection
        self.flows: dict[int, FlowEnd] = {}
        self.lost_there = (0, 0)
        """How many datagrams the target side says that it has dropped: towards the server, towards here."""
        self._owner = owner
        self._queue = FlowQueue(owner.dropped)
        self._told_lost = (0, 0)
        self._sent_turn = -1
        writer = CallWriter(loop, connection, sink, self._flush_soon, self._call_broken, self.fail)
        super().__init__(loop, connection, source, writer, owner, hello_s)

    # For the owner

    @property
    def room(self) -> int:
        """How many flows may be begun now."""
        return 0 if self.is_over else self.connection.open_room

    @property
    def dropped_full(self) -> int:
        """How many datagrams were dropped because too much waited, or as they were too long."""
        return self._queue.dropped_full

    @property
    def dropped_old(self) -> int:
        """How many datagrams were dropped because they waited for too long, or their flow had ended."""
        return self._queue.dropped_old

    @property
    def dropped_late(self) -> int:
        """How many datagrams came for flows that had ended here."""
        return self.connection.late_datagrams

    @property
    def bytes_waiting(self) -> int:
        """What the datagrams that wait take."""
        return self._queue.bytes

    def open(self, port: int, origin: Origin, proxy: ProxyVersion, end: FlowEnd) -> int:
        """Begin a flow to ``port`` of the target, joined with ``end``. Returns its number.

        Raises LocalProtocolError without `room`, or for another port than the call's.
        """
        flow_id = self.connection.open_flow(port, origin, proxy)
        self.flows[flow_id] = end
        self._flush_soon()
        return flow_id

    def join(self, flow_id: int, end: FlowEnd) -> None:
        """The peer has begun the flow: what comes is for ``end``."""
        self.flows[flow_id] = end

    def send(self, flow_id: int, data: bytes, segment: int) -> None:
        """Send datagrams of a flow, one (``segment`` 0) or several of equal size, or drop them."""
        if flow_id not in self.flows:
            self._queue.drop_late(flow_id, data, segment)
            return
        if self._is_lone() and not segment and len(data) <= MAX_DATAGRAM_BYTES:
            self.connection.send_datagrams(flow_id, data)
            self._writer.send()
            return
        self._queue.add(flow_id, data, segment, time.monotonic())
        if self._queue.bytes >= _WRITE_BYTES and self._writer.is_empty:
            self._write()
        else:
            self._flush_soon()

    def _is_lone(self) -> bool:
        """Whether a datagram comes after a pause, in a turn that serves nothing else: then it does not wait
        for the turn's end. Those that follow it do, to go together.
        """
        turn, before = self.loop.turn, self._sent_turn
        self._sent_turn = turn
        return self.loop.served == 1 and turn > before + 1 and self._writer.is_empty

    def end(self, flow_id: int, code: FlowCode) -> None:
        """End a flow, whose end here hears nothing of that; does nothing if it is over.

        What it has waiting is dropped: whoever closes a forward wants nothing more to pass.
        """
        self.flows.pop(flow_id, None)
        if self.is_over:
            return
        self._queue.end(flow_id)
        self.connection.end_flow(flow_id, code)
        self._flush_soon()

    def finish(self, flow_id: int, code: FlowCode) -> None:
        """End a flow behind what it has waiting, unless the call takes nothing now."""
        if self._writer.is_empty:
            for data, segment in self._queue.rest(flow_id, _NEVER):
                self.connection.send_datagrams(flow_id, data, segment)
        self.end(flow_id, code)

    def report_lost(self, to_server: int, to_listener: int) -> None:
        """Tell the listener side, within a second, how many datagrams this target side has dropped in all.

        Raises LocalProtocolError on the listener side, or if a number is smaller than before.
        """
        if not self.is_over:
            self.connection.report_lost(to_server, to_listener)

    # From the call

    def _take(self, chunk: memoryview) -> Iterator[None]:
        flows, guarded = self.flows, self.loop.guarded
        left = TURN_FRAMES
        for event in self.connection.receive_data(chunk):
            if type(event) is DatagramsReceived:
                left -= count(len(event.data), event.segment)
                end = flows.get(event.flow_id)
                if end is not None:
                    guarded(end.fail, end.deliver, event.data, event.segment)
            else:
                left -= 1
                self._on_event(event)
            if left <= 0:
                self._tell_lost()
                yield
                left = TURN_FRAMES
        self._tell_lost()

    def _tell_lost(self) -> None:
        """Tell the owner what is lost now and was not a moment ago."""
        before, self._told_lost = self._told_lost, (self.dropped_late, sum(self.lost_there))
        if self._told_lost != before:
            self._owner.lost(self._told_lost[0] - before[0], self._told_lost[1] - before[1])

    def _on_event(self, event: FlowEvent | None) -> None:
        match event:
            case FlowRequested():
                not_begun = partial(self.end, event.flow_id, FlowCode.INTERNAL)
                self.loop.guarded(not_begun, self._owner.flow_requested, event)
            case FlowEnded():
                self._ended(event.flow_id, event.code)
            case LostReported():
                self.lost_there = event.to_server, event.to_listener
            case HelloReceived():
                self._owner.ready()
            case GoawayReceived():
                self._on_goaway(event.goaway)

    def _ended(self, flow_id: int, code: FlowCode) -> None:
        self._queue.end(flow_id)
        end = self.flows.pop(flow_id, None)
        if end is not None:
            self.loop.guarded(end.fail, end.ended, code)

    # To the call

    def _write(self) -> None:
        # What waits only for the end of this turn has not waited for the call, however long the turn takes.
        now = _NEVER if self._writer.is_empty else time.monotonic()
        self._writer.send()
        while self._queue.bytes and self._writer.is_empty and not self.connection.is_over:
            for flow_id, data, segment in self._queue.take(_WRITE_BYTES, now):
                self.connection.send_datagrams(flow_id, data, segment)
            self._writer.send()

    # Time and endings

    def _second(self) -> None:
        """Nothing to do: whoever a flow is joined with knows when it has been idle for too long."""

    @property
    def _is_empty(self) -> bool:
        return not self.flows

    def _abort_all(self, code: GoawayCode) -> None:
        for flow_id in list(self.flows):
            self._ended(flow_id, _ENDS.get(code, FlowCode.INTERNAL))
