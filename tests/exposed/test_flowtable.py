# SPDX-License-Identifier: GPL-2.0-or-later
"""Who has a flow and for how long; with real sockets, and calls that only keep what they are given."""

import dataclasses
import socket

import pytest
from udp_bench import FlowBench, echo, udp_config

from qubes_fwd_qrexec.common.clientreport import WhichClients
from qubes_fwd_qrexec.common.rules import OnExpire
from qubes_fwd_qrexec.common.values import Sources
from qubes_fwd_qrexec.exposed import flowtable, udpport
from qubes_fwd_qrexec.exposed.flow import Flow
from qubes_fwd_qrexec.exposed.flowtable import ANSWERED_S, UNANSWERED_S, FlowMeans
from qubes_fwd_qrexec.exposed.limits import Process
from qubes_fwd_qrexec.mux import ProxyVersion

# Who has one


def test_each_client_and_port_of_it_has_a_flow_of_its_own() -> None:
    with FlowBench() as bench:
        one, other = bench.client(), bench.client()
        for client, data in ((one, b"1"), (other, b"2"), (one, b"3")):
            bench.send(client, data)
        assert bench.carried.data == [b"1", b"2", b"3"]
        flows = [flow for flow, _, _ in bench.carried.sent]
        assert flows[0] is flows[2] is not flows[1]
        assert set(bench.flows) == set(flows)
        assert (bench.table.counters.total, bench.table.account.connections) == (2, 2)
        assert {flow.sender for flow in flows} == {one.sock.getsockname(), other.sock.getsockname()}


def test_the_target_is_told_who_writes_to_what_and_which_port_is_meant() -> None:
    with FlowBench(udp_config(dstports="5353-5353", proxy="v2")) as bench:
        client = bench.client()
        bench.send(client)
        (flow,) = bench.flows
        origin = flow.origin()
        assert (str(origin.client), origin.client_port) == client.sock.getsockname()
        assert (str(origin.exposed), origin.exposed_port) == ("127.0.0.1", bench.port)
        assert (flow.target_port, flow.proxy) == (5353, ProxyVersion.V2)


def test_a_strangers_datagram_begins_nothing_and_is_answered_by_nothing() -> None:
    with FlowBench(udp_config(srchosts="127.0.0.2/32,192.0.2.0/24")) as bench:
        stranger, friend = bench.client(), bench.client(own="127.0.0.2")
        for _ in range(3):
            bench.send(stranger)
        assert (bench.carried.sent, bench.flows) == ([], [])
        assert bench.table.counters.refusals == {"srchosts": 3}
        assert bench.table.account.clients_remembered == 0
        assert (bench.table.counters.sent, bench.table.counters.total) == (0, 0)
        with pytest.raises(BlockingIOError):
            stranger.sock.recv(1)
        bench.send(friend)
        assert bench.carried.data == [b"x"]


def test_no_more_flows_than_a_client_or_the_rule_may_have() -> None:
    with FlowBench(udp_config(limits="per-source:2,connections:3")) as bench:
        own = [bench.client() for _ in range(3)]
        others = [bench.client(own=f"127.0.0.{number}") for number in range(2, 4)]
        for client in own:
            bench.send(client)
        assert bench.table.counters.refusals == {"per-source": 1}
        bench.send(others[0])
        bench.send(others[1])  # it holds none, and the first client two
        assert bench.table.account.connections == 3
        assert bench.table.counters.refusals == {"per-source": 1, "made-room": 1}
        assert len(bench.flows) == 3
        assert sum(flow.is_over for flow, _, _ in bench.carried.sent) == 1


def test_a_client_that_has_all_it_may_gives_up_what_is_quiet() -> None:
    with FlowBench(udp_config(limits="per-source:2")) as bench:
        clients = [bench.client() for _ in range(3)]
        bench.send(clients[0])
        bench.send(clients[1])
        for flow in bench.flows[:1]:
            flow.moved_at -= 1
        bench.send(clients[2])
        assert [flow.sender for flow in bench.flows] == [c.sock.getsockname() for c in clients[1:]]


def test_new_flows_have_a_rate_and_old_ones_none() -> None:
    with FlowBench(udp_config(limits="rate:1")) as bench:
        one, other = bench.client(), bench.client()
        for _ in range(10):
            bench.send(one)
        bench.send(other)
        assert len(bench.carried.sent) == 10
        assert bench.table.counters.refusals == {"rate": 1}


def test_all_forwards_together_have_a_bound() -> None:
    means = FlowMeans(process=Process(2))
    with FlowBench(means=means) as one, FlowBench(means=means) as other:
        for bench in (one, one, other):
            bench.send(bench.client(own="127.0.0.9"))
        assert means.process.connections == 2
    assert means.process.connections == 0


def test_flows_without_a_call_are_logged_once_whatever_the_target_says(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A target has many words, and the log remembers what it has said."""
    with FlowBench() as bench:
        bench.carried.then = lambda flow, data, segment: flow.owner.not_carried(flow, "no-call", str(data))
        for number in range(3):
            bench.send(bench.client(), b"%d" % number)
        assert bench.table.counters.refusals == {"no-call": 3}
        assert [record.message for record in caplog.records] == ["work dns: 127.0.0.1: b'0'"]


# For how long


@pytest.mark.parametrize(("is_answered", "seconds"), [(False, UNANSWERED_S), (True, ANSWERED_S)])
def test_a_flow_in_which_nothing_moves_ends(is_answered: bool, seconds: float) -> None:
    with FlowBench() as bench:
        client = bench.client()
        if is_answered:
            bench.carried.then = echo
        bench.send(client)
        bench.pass_s(int(seconds) - 1)
        (flow,) = bench.flows
        bench.pass_s(1)
        assert (bench.flows, flow.is_over) == ([], True)
        assert bench.table.account.connections == 0
        assert bench.loop.timers_left == 0


def test_a_datagram_either_way_puts_that_off() -> None:
    with FlowBench() as bench:
        client = bench.client()
        bench.send(client)
        bench.pass_s(20)
        bench.send(client)
        bench.pass_s(20)
        (flow,) = bench.flows
        flow.deliver(b"answer", 0)
        bench.pass_s(119)
        flow.deliver(b"answer", 0)
        bench.pass_s(119)
        assert bench.flows == [flow]


def test_a_process_that_was_stopped_does_not_count_that_time() -> None:
    with FlowBench() as bench:
        bench.send(bench.client())
        bench.pass_s(10)
        bench.clock.advance(3600)
        bench.turn()
        assert len(bench.flows) == 1
        bench.pass_s(19)
        assert bench.flows == []


def test_after_its_end_the_same_client_begins_a_new_one() -> None:
    with FlowBench() as bench:
        client = bench.client()
        bench.send(client)
        bench.pass_s(30)
        bench.send(client)
        old, new = (flow for flow, _, _ in bench.carried.sent)
        assert old is not new
        assert bench.flows == [new]


# A new configuration


def test_what_is_no_longer_allowed_is_cut_and_the_rest_goes_on() -> None:
    with FlowBench() as bench:
        one, other = bench.client(), bench.client(own="127.0.0.2")
        bench.send(one)
        bench.send(other)
        narrow = dataclasses.replace(bench.config, sources=Sources.parse("127.0.0.2/32"))
        bench.table.take(narrow, "work dns", bench.carried, 3600.0)
        assert [flow.sender for flow in bench.flows] == [other.sock.getsockname()]
        gone = bench.carried.sent[0][0]
        gone.deliver(b"late", 0)
        bench.send(one)
        bench.send(other, b"y")
        with pytest.raises(BlockingIOError):
            one.sock.recv(1)
        assert bench.carried.data == [b"x", b"x", b"y"]


def test_with_drain_what_is_no_longer_allowed_has_a_while() -> None:
    with FlowBench() as bench:
        client = bench.client()
        bench.carried.then = echo
        bench.send(client)
        narrow = dataclasses.replace(
            bench.config, sources=Sources.parse("127.0.0.2/32"), on_expire=OnExpire.DRAIN
        )
        bench.table.take(narrow, "work dns", bench.carried, 60.0)
        bench.send(client, b"still")
        assert bench.carried.data == [b"x", b"still"]
        bench.send(bench.client())
        assert bench.table.counters.refusals == {"srchosts": 1}
        bench.pass_s(59)
        assert len(bench.flows) == 1
        bench.pass_s(1)
        assert bench.flows == []


@pytest.mark.parametrize("is_closed", [False, True])
def test_what_drains_ends_in_time_though_client_and_server_go_on(*, is_closed: bool) -> None:
    """Also where its port is closed, and whatever changes meanwhile."""
    with FlowBench() as bench:
        client = bench.client()
        bench.carried.then = echo
        bench.send(client)
        (flow,) = bench.flows
        narrow = dataclasses.replace(
            bench.config, sources=Sources.parse("127.0.0.2/32"), on_expire=OnExpire.DRAIN
        )
        if is_closed:
            bench.table.give_up(list(bench.table.ports), is_cut=False)
        bench.table.take(narrow, "work dns", bench.carried, 60.0)
        for _ in range(59):
            bench.pass_s(1)
            bench.send(client, b"still")
            flow.deliver(b"more", 0)
            bench.table.take(narrow, "work dns", bench.carried, 60.0)
        assert bench.flows == [flow]
        bench.pass_s(1)
        assert (bench.flows, bool(bench.table.ports)) == ([], not is_closed)


def test_clients_that_are_cut_lose_their_flows_and_a_port_that_only_drained_is_closed() -> None:
    with FlowBench() as bench:
        one, other = bench.client(), bench.client(own="127.0.0.2")
        for client in (one, one, other):
            bench.send(client)
        assert bench.table.cut_clients(WhichClients.parse("127.0.0.2:1")) == 0
        assert bench.table.cut_clients(WhichClients.parse("127.0.0.1")) == 1
        assert [flow.sender for flow in bench.flows] == [other.sock.getsockname()]
        assert bench.table.account.connections == 1
        bench.table.give_up(list(bench.table.ports), is_cut=False)
        assert bench.table.cut_clients(WhichClients()) == 1
        assert (bench.flows, bench.table.ports) == ([], {})


@pytest.mark.parametrize("change", ["dstports=54-54", "listen=127.0.0.3", "side=vifs"])
def test_another_server_or_address_or_side_is_another_flow(change: str) -> None:
    with FlowBench() as bench:
        bench.send(bench.client())
        name = change.partition("=")[0]
        options = {name: change.partition("=")[2]}
        config = bench.with_port(udp_config(**{"listen": "127.0.0.1", **options}))
        bench.table.take(config, "work dns", bench.carried, 3600.0)
        # Loopback is on every side.
        assert len(bench.flows) == (1 if name == "side" else 0)


def test_a_port_that_is_given_up_stays_for_the_flows_that_drain_and_no_longer() -> None:
    with FlowBench() as bench:
        client, new = bench.client(), bench.client()
        bench.carried.then = echo
        bench.send(client)
        bindings = list(bench.table.ports)
        bench.table.give_up(bindings, is_cut=False)
        assert (bench.table.listening, bench.table.draining) == (frozenset(), frozenset(bindings))
        bench.send(client, b"still")
        bench.send(new)
        assert bench.carried.data == [b"x", b"still"]
        assert bench.table.reopen(bindings) == frozenset(bindings)
        bench.send(new)
        assert len(bench.flows) == 2
        bench.table.give_up(bindings, is_cut=False)
        bench.pass_s(120)
        assert bench.table.ports == {}
        # Whoever asked for it could not know yet that the port was closed.
        assert bench.table.reopen(bindings) == frozenset()
        bench.table.give_up(bindings, is_cut=True)


# Bugs


@pytest.mark.usefixtures("bugs_are_wanted")
def test_a_bug_in_a_port_closes_it_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with FlowBench(udp_config("127.0.0.1,127.0.0.2")) as bench:
        one, other = bench.client(), bench.client("127.0.0.2")
        bench.send(one)
        bench.send(other)

        def fail(sock: socket.socket) -> None:
            raise ZeroDivisionError

        with monkeypatch.context() as patch:
            patch.setattr(udpport.datagrams, "receive", fail)
            bench.send(one)
        assert [str(address) for address, _ in bench.table.listening] == ["127.0.0.2"]
        bench.send(other)
        assert len(bench.carried.sent) == 3
        assert len(bench.flows) == bench.table.account.connections == 1


@pytest.mark.usefixtures("bugs_are_wanted")
def test_a_bug_when_time_passes_ends_the_flows_and_not_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    with FlowBench() as bench:
        client = bench.client()
        bench.send(client)
        with monkeypatch.context() as patch:
            patch.setattr(flowtable, "ANSWERED_S", None)
            bench.flows[0].is_answered = True
            bench.pass_s(1)
        assert bench.flows == []
        bench.send(client)
        bench.pass_s(30)
        assert (bench.flows, bench.loop.bugs.count) == ([], 1)


@pytest.mark.usefixtures("bugs_are_wanted")
def test_a_bug_in_what_is_done_for_a_flow_ends_that_flow_alone() -> None:
    with FlowBench() as bench:
        one, other = bench.client(), bench.client()

        def fail(flow: Flow, data: bytes, segment: int) -> None:
            if data == b"bug":
                raise ZeroDivisionError

        bench.carried.then = fail
        bench.send(one)
        bench.send(other)
        bench.send(one, b"bug")
        bench.send(other)
        assert [flow.sender for flow in bench.flows] == [other.sock.getsockname()]
        assert bench.loop.bugs.count == 1
        assert bench.table.account.connections == 1
