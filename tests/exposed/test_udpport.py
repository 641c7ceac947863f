# SPDX-License-Identifier: GPL-2.0-or-later
"""The socket of one exposed port: what it takes, how much in a turn, and where replies leave from."""

import errno
import socket
from ipaddress import ip_address

import pytest
from udp_bench import FlowBench, echo, udp_config

from qubes_fwd_qrexec.exposed import udpport
from qubes_fwd_qrexec.exposed.flow import Flow
from qubes_fwd_qrexec.exposed.flowcounters import Dropped
from qubes_fwd_qrexec.exposed.udpport import REFUSED_S, open_udp
from qubes_fwd_qrexec.relay.acceptloop import BindError
from qubes_fwd_qrexec.system.datagrams import READ_MAX_BYTES, READS_MAX

# linux/udp.h
_UDP_SEGMENT = 103


@pytest.mark.parametrize(
    ("listen", "hosts"),
    [
        ("127.0.0.1", ["127.0.0.1"]),
        ("0.0.0.0", ["127.0.0.1", "127.0.0.2", "127.9.9.9"]),
        ("::1", ["::1"]),
        ("::", ["::1"]),
        ("0.0.0.0,::", ["127.0.0.1", "::1"]),
    ],
)
def test_a_reply_leaves_from_the_address_that_was_written_to(listen: str, hosts: list[str]) -> None:
    """A client's socket is connected: it hears nobody but that address and port."""
    with FlowBench(udp_config(listen)) as bench:
        bench.carried.then = echo
        for host in hosts:
            client = bench.client(host)
            bench.send(client, b"who?")
            assert client.sock.recv(10) == b"who?"
        assert [str(flow.local_address) for flow, _, _ in bench.carried.sent] == hosts


def test_one_client_that_writes_to_two_addresses_has_two_flows() -> None:
    with FlowBench(udp_config("0.0.0.0")) as bench:
        sock = bench.client().sock
        sock.connect(("127.0.0.1", bench.port))
        sock.send(b"x")
        sock.connect(("127.0.0.2", bench.port))
        sock.send(b"x")
        bench.turn(2)
        assert len(bench.flows) == 2


def test_a_reply_with_several_datagrams_is_several_datagrams() -> None:
    with FlowBench() as bench:
        client = bench.client()
        bench.send(client)
        (flow,) = bench.flows
        flow.deliver(b"aaabbbc", 3)
        assert [client.sock.recv(10) for _ in range(3)] == [b"aaa", b"bbb", b"c"]
        assert (flow.received, flow.datagrams_received) == (7, 3)


def test_what_was_sent_to_many_is_dropped() -> None:
    with FlowBench(udp_config("0.0.0.0")) as bench:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sock.sendto(b"x", ("127.255.255.255", bench.port))
            bench.turn()
        assert bench.flows == []
        assert bench.table.counters.drops == {Dropped.TO_MANY: 1}


def test_only_so_much_is_read_in_one_turn() -> None:
    with FlowBench() as bench:
        client = bench.client()
        for _ in range(READS_MAX + 6):
            client.send(b"x")
        for read in (1, READS_MAX + 1, READS_MAX + 6):  # after a pause one is looked for, and then all
            bench.turn()
            assert len(bench.carried.sent) == read
        bench.carried.sent.clear()
        for _ in range(8):
            client.send(bytes(45_000))
        bench.turn()
        read = sum(map(len, bench.carried.data))
        assert READ_MAX_BYTES <= read < READ_MAX_BYTES + 45_000
        bench.turn(2)
        assert sum(map(len, bench.carried.data)) == 8 * 45_000


def test_the_more_ports_have_something_the_less_is_read_of_each() -> None:
    """So that a flood of many ports holds up nobody for longer than one of a single port."""
    with FlowBench(udp_config("127.0.0.1,127.0.0.2,127.0.0.3,127.0.0.4")) as bench:
        for last in range(1, 5):
            client = bench.client(f"127.0.0.{last}")
            for _ in range(READS_MAX):
                client.send(b"x")
        bench.turn()
        assert len(bench.carried.sent) == 4
        bench.turn()
        assert len(bench.carried.sent) == 4 + READS_MAX


def test_a_batch_of_one_client_comes_as_one() -> None:
    with FlowBench() as bench:
        client = bench.client()
        client.sock.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, 100)
        client.send(bytes(950))
        bench.turn()
        assert sum(map(len, bench.carried.data)) == 950
        (flow,) = bench.flows
        assert (flow.datagrams_sent, bench.table.counters.datagrams_sent) == (10, 10)


def test_longer_than_a_datagram_of_ipv4_is_dropped() -> None:
    with FlowBench(udp_config("::1")) as bench:
        client = bench.client("::1")
        bench.send(client, bytes(65_507))
        assert len(bench.carried.sent) == 1
        bench.send(client, bytes(65_508))
        assert len(bench.carried.sent) == 1
        assert bench.table.counters.drops == {Dropped.TOO_LONG: 1}


@pytest.mark.parametrize("is_closed", [False, True])
def test_what_the_kernel_lost_is_counted_once(*, is_closed: bool) -> None:
    """Also behind the last datagram that came."""
    with FlowBench() as bench:
        client, sent = bench.client(), 0
        for _ in range(2):
            for _ in range(1000):
                client.send(bytes(1000))
            sent += 1000
            bench.turn(1000 // READS_MAX + 1)
            lost = sent - len(bench.carried.sent)
            assert lost > 0
            if is_closed:
                bench.table.give_up(list(bench.table.ports), is_cut=True)
                break
            bench.table.count_lost()
            assert bench.table.counters.drops == {Dropped.KERNEL: lost}
        assert bench.table.counters.drops == {Dropped.KERNEL: lost}


def test_what_cannot_be_sent_to_a_client_is_counted_and_said() -> None:
    with FlowBench() as bench:
        bench.send(bench.client())
        (flow,) = bench.flows
        flow.local = ip_address("192.0.2.77").packed  # an address that has gone
        flow.deliver(b"answer", 0)
        assert bench.table.counters.drops == {Dropped.UNSENT: 1}
        assert bench.table.counters.last_error is not None
        assert "cannot send to 127.0.0.1" in bench.table.counters.last_error[0]
        assert bench.flows == [flow]


def refuse(flow: Flow, data: bytes, segment: int) -> None:
    flow.owner.not_carried(flow, "policy", "dom0 says no")


def test_behind_a_refusal_a_client_begins_no_other_flow_for_a_second() -> None:
    """It is as if nobody had been asked: a connected socket would have heard of an ICMP error."""
    with FlowBench() as bench:
        client, other = bench.client(), bench.client()
        bench.carried.then = refuse
        for _ in range(4):
            bench.send(client)
        bench.send(other)
        counters = bench.table.counters
        assert (counters.total, counters.refusals, counters.drops) == (2, {"policy": 2}, {"refused": 3})
        bench.carried.then = echo
        bench.clock.advance(REFUSED_S * 0.99)
        bench.send(client)
        assert counters.total == 2
        bench.clock.advance(REFUSED_S * 0.02)
        bench.send(client, b"again")
        assert client.sock.recv(10) == b"again"
        assert (counters.total, counters.drops) == (3, {"refused": 4})


def test_refusals_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest is forgotten."""
    monkeypatch.setattr(udpport, "REFUSED_MAX", 3)
    with FlowBench() as bench:
        clients = [bench.client() for _ in range(4)]
        bench.carried.then = refuse
        for client in clients:
            bench.send(client)
        for client in clients[1:]:
            bench.send(client)
        assert bench.table.counters.total == 4
        bench.send(clients[0])
        assert bench.table.counters.total == 5
        bench.send(clients[1])  # in whose place that is
        assert bench.table.counters.total == 6


def test_exactly_what_is_said_is_bound_and_no_other_program_shares_it() -> None:
    with open_udp(ip_address("127.0.0.1"), 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(BindError, match=rf"127.0.0.1:{port} \(udp\): .* in use by this program itself"):
            open_udp(ip_address("127.0.0.1"), port)
        with pytest.raises(BindError):
            open_udp(ip_address("0.0.0.0"), port)
        open_udp(ip_address("127.0.0.2"), port).close()
        open_udp(ip_address("::"), port).close()
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with pytest.raises(OSError, match="in use") as caught:
                other.bind(("127.0.0.1", port))
            assert caught.value.errno == errno.EADDRINUSE


def test_an_address_that_is_not_here_is_named() -> None:
    with pytest.raises(BindError, match=r"192.0.2.1:53 \(udp\): this qube does not have the address"):
        open_udp(ip_address("192.0.2.1"), 53)
