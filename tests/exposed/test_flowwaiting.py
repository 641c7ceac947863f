# SPDX-License-Identifier: GPL-2.0-or-later
"""Flows that wait for a call: whose turn it is, and who loses where too much waits."""

from ipaddress import ip_address

from udp_bench import Carried

from qubes_fwd_qrexec.exposed.connectionlog import FlowHow
from qubes_fwd_qrexec.exposed.crowd import client_key
from qubes_fwd_qrexec.exposed.flow import Flow
from qubes_fwd_qrexec.exposed.flowcounters import FlowCounters
from qubes_fwd_qrexec.exposed.flowwaiting import WAITING_MAX_BYTES, WAITING_OF_ONE_BYTES, WaitingFlows
from qubes_fwd_qrexec.mux import Buffer, FlowCode, ProxyVersion


class Forward:
    """The owner of flows, which hears nothing."""

    port = 53

    def __init__(self) -> None:
        self.counters = FlowCounters()

    def reply(self, flow: Flow, data: Buffer, segment: int) -> None: ...

    def ended_there(self, flow: Flow, code: FlowCode) -> None: ...

    def end(self, flow: Flow, how: FlowHow) -> None: ...

    def not_carried(self, flow: Flow, kind: str, error: str) -> None: ...

    def flow(self, client: str, port: int = 1) -> Flow:
        address = ip_address(client)
        return Flow(self, Carried(), (client, port), address, b"", 1, 53, ProxyVersion.OFF, 0.0)


def taken(waiting: WaitingFlows) -> list[tuple[str, int]]:
    """All that wait, in the order of their turns: address and port of each flow."""
    order = []
    while waiting:
        flow, _ = waiting.take()
        order.append(flow.client_name())
    return order


def test_a_flow_is_taken_with_all_that_it_has_in_order() -> None:
    forward, waiting = Forward(), WaitingFlows()
    one, other = forward.flow("192.0.2.1"), forward.flow("192.0.2.2")
    waiting.add(one, b"1", 0, 0.0)
    waiting.add(other, b"x", 0, 0.0)
    waiting.add(one, b"aab", 2, 0.0)
    assert (len(waiting), len(waiting.clients)) == (2, 2)
    assert waiting.take() == (one, [(b"1", 0), (b"aab", 2)])
    assert waiting.clients == {client_key(other.client)}
    assert waiting.take() == (other, [(b"x", 0)])
    assert (bool(waiting), waiting.clients, forward.counters.drops) == (False, set(), {})


def test_networks_take_turns_and_in_each_its_addresses_and_their_flows_by_age() -> None:
    forward, waiting = Forward(), WaitingFlows()
    for port in range(1, 4):
        waiting.add(forward.flow("192.0.2.1", port), b"", 0, 0.0)
    for client in ("2001:db8::1", "2001:db8::1", "2001:db8::2"):
        waiting.add(forward.flow(client, 9), b"", 0, 0.0)
    waiting.add(forward.flow("2001:db8:0:1::1"), b"", 0, 0.0)
    assert taken(waiting) == [
        ("192.0.2.1", 1),
        ("2001:db8::1", 9),
        ("2001:db8:0:1::1", 1),
        ("192.0.2.1", 2),
        ("2001:db8::2", 9),
        ("192.0.2.1", 3),
        ("2001:db8::1", 9),
    ]


def test_who_comes_between_two_turns_waits_for_one_flow_of_each_other() -> None:
    forward, waiting = Forward(), WaitingFlows()
    for port in range(1000):
        waiting.add(forward.flow("192.0.2.1", port), b"", 0, 0.0)
    waiting.take()
    waiting.add(forward.flow("192.0.2.2"), b"", 0, 0.0)
    assert ("192.0.2.2", 1) in [waiting.take()[0].client_name() for _ in range(2)]


def test_of_one_flow_what_comes_beyond_its_bound_is_dropped() -> None:
    forward, waiting = Forward(), WaitingFlows()
    flow = forward.flow("192.0.2.1")
    waiting.add(flow, bytes(WAITING_OF_ONE_BYTES), 0, 0.0)  # whatever the first one has
    waiting.add(flow, b"x", 0, 0.0)
    waiting.add(flow, b"xxx", 2, 0.0)
    assert forward.counters.drops == {"full": 3}
    assert len(waiting.take()[1]) == 1


def test_where_all_have_too_much_the_network_with_the_most_loses_its_oldest() -> None:
    forward, others, waiting = Forward(), Forward(), WaitingFlows()
    waiting.add(others.flow("192.0.2.2"), bytes(1000), 0, 0.0)
    waiting.add(others.flow("2001:db8::1"), b"", 0, 0.0)
    size, added = 60_000, WAITING_MAX_BYTES // 60_000 + 20
    for port in range(added):
        waiting.add(forward.flow("192.0.2.1", port), bytes(size), 0, 0.0)
    assert others.counters.drops == {}
    order = taken(waiting)
    assert order[:2] == [("192.0.2.2", 1), ("2001:db8::1", 1)]
    left = [port for _, port in order[2:]]
    assert left == list(range(added - len(left), added))
    assert forward.counters.drops == {"full": added - len(left)}
    assert WAITING_MAX_BYTES - 2 * size < len(left) * size < WAITING_MAX_BYTES


def test_empty_datagrams_have_a_bound_too() -> None:
    forward, waiting = Forward(), WaitingFlows()
    for number in range(10_000):
        waiting.add(forward.flow(f"192.0.{number >> 8}.{number & 255}"), b"", 0, 0.0)
    assert len(waiting.clients) == WAITING_MAX_BYTES // 256
    assert forward.counters.drops == {"full": 10_000 - WAITING_MAX_BYTES // 256}


def test_what_is_old_or_of_a_flow_that_is_over_is_dropped() -> None:
    forward, waiting = Forward(), WaitingFlows()
    flow, over = forward.flow("192.0.2.1"), forward.flow("192.0.2.2")
    for since in (1.0, 2.0, 3.0):
        waiting.add(flow, b"%d" % since, 0, since)
        waiting.add(over, b"x", 0, since)
    over.is_over = True
    waiting.drop_old(2.0)
    assert forward.counters.drops == {"no-call": 5}
    assert waiting.take() == (flow, [(b"3", 0)])
    assert not waiting
