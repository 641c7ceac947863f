# SPDX-License-Identifier: GPL-2.0-or-later
"""Both ends of a datagram call in one loop, over a pair of sockets, with a clock of their own."""

import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from ipaddress import ip_address
from typing import Self

from helpers import BOUND_S, is_ready, unix_pair
from loop_time import LoopClock

from qubes_fwd_qrexec.mux import (
    FlowCode,
    FlowConnection,
    FlowRequested,
    GoawayCode,
    Hello,
    Origin,
    ProxyVersion,
)
from qubes_fwd_qrexec.relay.flowmux import FlowMux
from qubes_fwd_qrexec.relay.loop import Loop

PORTS = range(53, 55)
FLOWS_MAX = 100
ORIGIN = Origin(ip_address("192.0.2.1"), 40_000, ip_address("10.137.0.5"), 5300)


class Kept:
    """The end of a flow that keeps what comes."""

    def __init__(self) -> None:
        self.batches: list[tuple[bytes, int]] = []
        self.code: FlowCode | None = None
        self.has_failed = False

    @property
    def datagrams(self) -> list[bytes]:
        found: list[bytes] = []
        for data, segment in self.batches:
            step = segment or len(data) or 1
            found += [data[start : start + step] for start in range(0, len(data), step)] or [b""]
        return found

    def deliver(self, data: memoryview, segment: int) -> None:
        self.batches.append((bytes(data), segment))

    def ended(self, code: FlowCode) -> None:
        self.code = code

    def fail(self) -> None:
        self.has_failed = True


class Owner:
    """Of either end. As the target it joins each flow with a `Kept`, or refuses it with ``refuses``."""

    def __init__(self) -> None:
        self.mux: FlowMux
        self.kept: dict[int, Kept] = {}
        self.requests: list[FlowRequested] = []
        self.refuses: FlowCode | None = None
        self.is_ready = False
        self.drained: GoawayCode | None = None
        self.problems: list[str | None] = []
        self.drops: Counter[tuple[int, bool]] = Counter()
        """How many datagrams were dropped of each flow, and whether for their age."""
        self.late = self.there = 0

    def ready(self) -> None:
        self.is_ready = True

    def flow_requested(self, event: FlowRequested) -> None:
        self.requests.append(event)
        if self.refuses is not None:
            self.mux.end(event.flow_id, self.refuses)
        else:
            self.kept[event.flow_id] = Kept()
            self.mux.join(event.flow_id, self.kept[event.flow_id])

    def dropped(self, flow_id: int, datagrams: int, *, is_old: bool) -> None:
        self.drops[flow_id, is_old] += datagrams

    def lost(self, late: int, there: int) -> None:
        self.late += late
        self.there += there

    def draining(self, code: GoawayCode) -> None:
        self.drained = code

    def over(self, problem: str | None) -> None:
        self.problems.append(problem)


class FlowBench(ExitStack):
    """A datagram call between `listener` and `target`, each in a loop of its own, so that one can rest.

    Their time is the test's: it passes where the test says so.
    """

    def __init__(self, flows_max: int = FLOWS_MAX) -> None:
        super().__init__()
        self.clock = LoopClock()
        self.callback(self.clock.let_go)
        self.calls = tuple(map(self.enter_context, unix_pair()))
        self.listener_owner, self.target_owner = Owner(), Owner()
        hello = Hello(0, bytes(16))
        self.listener = self._mux(hello, self.calls[0], self.listener_owner)
        hello = Hello(0, bytes(16), max_streams=flows_max, lease_s=300)
        self.target = self._mux(hello, self.calls[1], self.target_owner)

    def _mux(self, hello: Hello, call: socket.socket, owner: Owner) -> FlowMux:
        loop = Loop()
        self.callback(loop.close)
        sink = self.enter_context(call.dup())
        owner.mux = FlowMux(loop, FlowConnection(hello, PORTS), call, sink, owner)
        self.callback(owner.mux.abandon)
        return owner.mux

    def __enter__(self) -> Self:
        self.run(lambda: self.listener_owner.is_ready and self.target_owner.is_ready)
        return self

    def run(self, until: Callable[[], object]) -> None:
        """Turn both loops until something is so."""
        deadline = time.monotonic() + BOUND_S
        while not until():
            assert time.monotonic() < deadline, "it does not come"
            for mux in (self.listener, self.target):
                mux.loop.run_once(0.0)

    def settle(self, *muxes: FlowMux) -> None:
        """Turn the loops of these ends, or of both, until nothing is left that they could do at once."""
        loops = [mux.loop for mux in muxes or (self.listener, self.target)]
        for loop in loops:
            loop.run_once(0.0)
        while ready := [loop for loop in loops if is_ready(loop)]:
            for loop in ready:
                loop.run_once(0.0)

    def second(self) -> None:
        """Let a second pass."""
        self.clock.advance(1.0)
        self.settle()

    def stop_reading(self, flow_id: int) -> int:
        """Have the target's end read nothing until it is turned again, and datagrams of a flow wait for it.

        Returns how many wait.
        """
        while not self.listener.bytes_waiting:
            self.listener.send(flow_id, bytes(60_000), 0)
            self.settle(self.listener)
        more = 20
        for _ in range(more):
            self.listener.send(flow_id, bytes(1000), 0)
        assert self.listener.dropped_full == 0
        return 1 + more

    def open(self, port: int = 53, proxy: ProxyVersion = ProxyVersion.OFF) -> tuple[int, Kept]:
        """A flow that the listener side begins."""
        kept = Kept()
        return self.listener.open(port, ORIGIN, proxy, kept), kept

    def joined(self) -> tuple[int, Kept, Kept]:
        """A flow that both ends have: its number, and its ends in the exposed qube and in the target."""
        flow_id, here = self.open()
        self.run(lambda: flow_id in self.target_owner.kept)
        return flow_id, here, self.target_owner.kept[flow_id]
