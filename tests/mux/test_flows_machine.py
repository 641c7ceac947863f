# SPDX-License-Identifier: GPL-2.0-or-later
"""Two ends of a datagram call wired together, against a model, with every byte late in any way and with loss.

Whatever two ends do that they may do: neither calls the other's frames wrong; datagrams arrive whole, in
order and in their own flow, or not at all, and only those are missing that an end dropped and counted; there
are never more flows than slots; what waits to be written is bounded; and at last no slot is left.
"""

from typing import NamedTuple

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from qubes_fwd_qrexec.mux import (
    DatagramsReceived,
    FlowCode,
    FlowConnection,
    FlowEnded,
    FlowRequested,
    GoawayReceived,
    HelloReceived,
    LostReported,
    PongReceived,
    ProxyVersion,
)
from qubes_fwd_qrexec.mux.messages import GoawayCode

from .flow_helpers import ORIGIN, PORTS, hello
from .two_ends import ENDS, LISTENER, PICK, TARGET, TwoEnds

CODES = st.sampled_from(FlowCode)
# What waits of HELLO, one PING, one PONG, two GOAWAY and one LOST.
FEW_FRAMES = 48 + 16 + 16 + 2 * 16 + 24


class Batch(NamedTuple):
    """Datagrams as they are given to an end, and as they arrive. No two batches are alike."""

    segment: int
    data: bytes

    @property
    def count(self):
        return -(-len(self.data) // self.segment) if self.segment else 1


class Side:
    """What one end has done and heard on one flow."""

    def __init__(self):
        self.is_known = False  # it may be used here
        self.sent: list[Batch] = []
        self.got: list[Batch] = []
        self.ended: FlowCode | None = None
        self.heard: FlowCode | None = None

    @property
    def is_live(self):
        return self.is_known and self.ended is None and self.heard is None


class DatagramCall(TwoEnds):
    def __init__(self):
        super().__init__()
        self.flows = {}
        self.queued = [0, 0]  # bytes of DATAGRAMS that wait
        self.lost = (0, 0)  # what the target side's caller could not pass on
        self.heard = (0, 0)  # what the listener side knows of that
        self.sent_datagrams = [0, 0]  # those that each end has queued
        self.number = 0
        self.drain_code = None
        self.closed = None

    @initialize(max_streams=st.integers(1, 5), is_begun=st.booleans())
    def connect(self, max_streams, is_begun):
        self.max_streams = max_streams
        self.ends = [
            FlowConnection(hello("listener"), PORTS),
            FlowConnection(hello("target", max_streams=max_streams), PORTS),
        ]
        self.deliver_all()
        if is_begun:
            self.open(ProxyVersion.OFF, 5)
            self.deliver_all()

    def pick(self, number, condition):
        found = [i for i, sides in self.flows.items() if condition(sides)]
        return found[number % len(found)] if found else None

    def flush(self, end):
        super().flush(end)
        self.queued[end] = 0

    def hear(self, end, event):
        match event:
            case HelloReceived() | PongReceived():
                pass
            case GoawayReceived():
                assert self.closed is not None or not event.goaway.is_final
            case LostReported(to_server, to_listener):
                assert end == LISTENER
                assert self.heard != (to_server, to_listener)
                assert self.heard[0] <= to_server <= self.lost[0]
                assert self.heard[1] <= to_listener <= self.lost[1]
                self.heard = to_server, to_listener
            case FlowRequested(flow_id, port, origin, proxy):
                assert end == TARGET
                assert (port, origin) == (5300, ORIGIN)
                assert self.flows[flow_id][LISTENER].proxy is proxy
                self.flows[flow_id][TARGET].is_known = True
            case DatagramsReceived(flow_id, segment, data):
                side, other = self.flows[flow_id][end], self.flows[flow_id][1 - end]
                assert side.is_live
                side.got.append(Batch(segment, bytes(data)))
                assert side.got == other.sent[: len(side.got)]
            case FlowEnded(flow_id, code):
                side, other = self.flows[flow_id][end], self.flows[flow_id][1 - end]
                assert side.is_live
                side.heard = code
                if other.ended is None:
                    # The target side itself, since the flow crossed its GOAWAY.
                    assert end == LISTENER
                    assert not other.is_known
                    assert code == self.drain_code
                else:
                    assert code is other.ended
                    assert side.got == other.sent

    @rule(proxy=st.sampled_from((ProxyVersion.OFF, ProxyVersion.V2)), size=st.sampled_from((0, 5, 5000)))
    def open(self, proxy, size):
        listener = self.ends[LISTENER]
        if not listener.open_room:
            return
        flow_id = listener.open_flow(5300, ORIGIN, proxy)
        assert flow_id == len(self.flows) + 1
        self.flows[flow_id] = (Side(), Side())
        self.flows[flow_id][LISTENER].is_known = True
        self.flows[flow_id][LISTENER].proxy = proxy
        self.send_on(LISTENER, flow_id, 0, size)

    @rule(end=ENDS, number=PICK, segment=st.sampled_from((0, 0, 4, 700)), size=st.integers(0, 6000))
    def send(self, end, number, segment, size):
        flow_id = self.pick(number, lambda sides: sides[end].is_known)
        if flow_id:
            if segment:
                size = max(segment + 1, min(size, segment * 64))
            self.send_on(end, flow_id, segment, size)

    def send_on(self, end, flow_id, segment, size):
        self.number += 1
        data = f"{flow_id} {end} {self.number} ".encode().ljust(size, b".")[:size] if size else b""
        side = self.flows[flow_id][end]
        batch = Batch(segment, data)
        is_queued = self.ends[end].send_datagrams(flow_id, data, segment)
        assert is_queued == (side.is_live and self.closed is None)
        if is_queued:
            side.sent.append(batch)
            self.queued[end] += 10 + len(data)
            self.sent_datagrams[end] += batch.count

    @rule(to_server=st.integers(0, 3), to_listener=st.integers(0, 3))
    def lose(self, to_server, to_listener):
        self.lost = self.lost[0] + to_server, self.lost[1] + to_listener
        self.ends[TARGET].report_lost(*self.lost)

    @rule(end=ENDS, number=PICK, code=CODES)
    def end_flow(self, end, number, code):
        flow_id = self.pick(number, lambda sides: sides[end].is_known)
        if flow_id:
            side = self.flows[flow_id][end]
            before = self.ends[end].bytes_queued
            self.ends[end].end_flow(flow_id, code)
            is_ended = side.is_live and self.closed is None
            assert self.ends[end].bytes_queued == before + 12 * is_ended
            if is_ended:
                side.ended = code

    @precondition(lambda self: len(self.flows) > 3)
    @rule(end=ENDS, code=st.sampled_from((GoawayCode.LEASE_OVER, GoawayCode.REVOKED, GoawayCode.SHUTDOWN)))
    def drain(self, end, code):
        if end == TARGET and self.drain_code is None and self.closed is None:
            self.drain_code = FlowCode(code)
        self.ends[end].drain(code)

    @precondition(lambda self: len(self.flows) > 5)
    @rule(end=ENDS)
    def close(self, end):
        self.ends[end].close()
        self.closed = end

    @invariant()
    def what_waits_is_bounded(self):
        for end, connection in enumerate(self.ends):
            waiting = connection.bytes_queued - self.queued[end]
            assert waiting <= self.max_streams * (47 + 12) + FEW_FRAMES
            assert waiting <= connection.control_bound_bytes

    @invariant()
    def no_end_has_more_flows_than_there_are_slots(self):
        for connection in self.ends:
            assert connection.slots_taken <= self.max_streams

    @invariant()
    def what_is_live_is_what_the_model_says(self):
        if self.closed is None:
            for end, connection in enumerate(self.ends):
                live = sum(sides[end].is_live for sides in self.flows.values())
                assert live <= connection.slots_taken <= self.max_streams

    @invariant()
    def the_ends_agree_when_nothing_is_under_way(self):
        if not any(self.wires) and not any(end.bytes_queued for end in self.ends):
            assert len({end.slots_taken for end in self.ends}) <= 1

    def teardown(self):
        if not self.ends:
            return
        self.deliver_all()
        if self.closed is None:
            for end, there in ((LISTENER, TARGET), (TARGET, LISTENER)):
                got = sum(batch.count for sides in self.flows.values() for batch in sides[end].got)
                assert got + self.ends[end].late_datagrams == self.sent_datagrams[there]
            for flow_id, sides in self.flows.items():
                assert sides[LISTENER].is_live == sides[TARGET].is_live
                if sides[LISTENER].is_live:
                    assert sides[LISTENER].got == sides[TARGET].sent
                    assert sides[TARGET].got == sides[LISTENER].sent
                    end = flow_id % 2
                    self.ends[end].end_flow(flow_id, FlowCode.DONE)
                    sides[end].ended = FlowCode.DONE
            self.ends[TARGET].tick()
            self.deliver_all()
            assert self.heard == self.lost
            assert self.ends[LISTENER].slots_taken == self.ends[TARGET].slots_taken == 0
            self.closed = LISTENER
            self.ends[LISTENER].close()
        self.deliver_all()
        for connection in self.ends:
            assert connection.slots_taken == 0
            connection.receive_eof()


@pytest.mark.hypothesis
def test_datagrams_arrive_whole_and_in_order_or_are_counted_whatever_two_ends_do():
    run_state_machine_as_test(
        DatagramCall,
        settings=settings(max_examples=100, stateful_step_count=50, deadline=None, derandomize=True),
    )
