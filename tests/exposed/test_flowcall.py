# SPDX-License-Identifier: GPL-2.0-or-later
"""One datagram call in the exposed qube: whose figures are the target's."""

from ipaddress import ip_address

from flow_bench import ORIGIN, FlowBench, Kept

from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.exposed.flowcall import FlowCall
from qubes_fwd_qrexec.exposed.flowcounters import FlowCounters
from qubes_fwd_qrexec.mux import FlowCode, Origin, ProxyVersion
from qubes_fwd_qrexec.relay.thread import open_relay_thread


class Flow(Kept):
    """A flow of a forward that has these counters."""

    def __init__(self, counters: FlowCounters) -> None:
        super().__init__()
        self.client = ip_address("192.0.2.1")
        self.target_port, self.proxy, self.counters = 53, ProxyVersion.OFF, counters

    def origin(self) -> Origin:
        return ORIGIN

    def make_room(self) -> None: ...


class Nobody:
    """The owner of a call, which does nothing."""

    def call_ready(self) -> None: ...


async def test_what_a_target_drops_counts_for_each_forward_that_has_had_a_flow_in_the_call() -> None:
    """The target says how many, not whose. A forward that is gone costs nothing any more."""
    async with open_relay_thread() as relays:
        with FlowBench() as bench:
            call = FlowCall(relays, TargetPorts.parse("53"), Nobody())
            call.mux = bench.listener
            forwards = [FlowCounters() for _ in range(3)]
            for counters in forwards[:2]:
                call.begin(Flow(counters))
                call.end(call.begin(Flow(counters)), FlowCode.DONE)
            call.lost(0, 2)
            call.lost(3, 1)
            assert [counters.drops for counters in forwards] == [{"late": 3, "target": 3}] * 2 + [{}]
            call.mux = None


async def test_a_flow_that_its_forward_ends_sends_nothing_more() -> None:
    """docs/behaviours.md, 62."""
    async with open_relay_thread() as relays:
        with FlowBench() as bench:
            call = FlowCall(relays, TargetPorts.parse("53"), Nobody())
            call.mux = bench.listener
            flow_id = call.begin(Flow(FlowCounters()))
            bench.settle()
            call.send(flow_id, b"late", 2, 0.0)
            call.end(flow_id, FlowCode.DONE)
            there = bench.target_owner.kept[flow_id]
            bench.run(lambda: there.code)
            assert there.datagrams == []
            call.mux = None
