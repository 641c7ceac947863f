# SPDX-License-Identifier: GPL-2.0-or-later
"""The target's end of a datagram call, with a mux instead of the exposed qube, and real servers."""

import errno
import os
import socket
from collections.abc import Iterator
from ipaddress import ip_address

import pytest
from flow_bench import ORIGIN
from helpers import no_fds_left
from udpservice_bench import UdpBench, udp_port, udp_server

from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.mux import MAX_DATAGRAM_BYTES, FlowCode, Origin, ProxyVersion
from qubes_fwd_qrexec.target.proxyheader import datagram_header
from qubes_fwd_qrexec.target.udpflow import new_socket

# asm-generic/socket.h. The kernel sends no batch for a socket that leaves out checksums.
_SO_NO_CHECK = 11


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with udp_server() as sock:
        yield sock


@pytest.fixture
def bench(server: socket.socket) -> Iterator[UdpBench]:
    port = udp_port(server)
    with no_fds_left(), UdpBench(TargetPorts(port, port)) as bench:
        yield bench


def _closed_port(host: str = "127.0.0.1") -> int:
    with udp_server(host) as sock:
        return udp_port(sock)


def _bench_of(port: int) -> UdpBench:
    return UdpBench(TargetPorts(port, port))


# Flows


@pytest.mark.parametrize("length", [0, 1, 1400, MAX_DATAGRAM_BYTES])
def test_a_datagram_gets_to_the_server_and_its_answer_back(
    bench: UdpBench, server: socket.socket, length: int
) -> None:
    _, kept = bench.ask(udp_port(server), bytes(length))
    data, client = server.recvfrom(1 << 16)
    assert (data, client[0]) == (bytes(length), "127.0.0.1")
    server.sendto(bytes(length), client)
    bench.run(lambda: kept.datagrams)
    assert kept.batches == [(bytes(length), 0)]


def test_each_flow_has_a_socket_of_its_own(bench: UdpBench, server: socket.socket) -> None:
    flows = {number: bench.ask(udp_port(server), bytes([number]))[1] for number in range(10)}
    clients = set()
    for _ in flows:
        data, client = server.recvfrom(100)
        clients.add(client)
        server.sendto(data * 2, client)
    assert len(clients) == len(flows)
    for number, kept in flows.items():
        bench.run(lambda kept=kept: kept.datagrams)
        assert kept.datagrams == [bytes([number, number])]


def test_the_other_end_may_end_a_flow(bench: UdpBench, server: socket.socket) -> None:
    flow_id, _ = bench.ask(udp_port(server))
    bench.listener.end(flow_id, FlowCode.DONE)
    bench.settle()
    assert not bench.service.carries_any


def test_what_another_program_sends_gets_to_nobody(bench: UdpBench, server: socket.socket) -> None:
    _, kept = bench.ask(udp_port(server))
    _, client = server.recvfrom(100)
    with udp_server() as stranger:
        stranger.sendto(b"forged", client)
    server.sendto(b"answer", client)
    bench.run(lambda: kept.datagrams)
    assert kept.datagrams == [b"answer"]


def test_batches_stay_together_both_ways(bench: UdpBench, server: socket.socket) -> None:
    flow_id, kept = bench.ask(udp_port(server), b"aabbc", 2)
    assert [server.recvfrom(100)[0] for _ in range(3)] == [b"aa", b"bb", b"c"]
    bench.listener.send(flow_id, b"x", 0)
    bench.settle()
    _, client = server.recvfrom(100)
    server.connect(client)
    for datagram in (b"dd", b"ee", b"f"):
        server.send(datagram)
    bench.run(lambda: len(kept.datagrams) == 3)
    assert kept.batches == [(b"dd", 0), (b"eef", 2)]  # the first one does not wait for others


def test_where_the_kernel_sends_no_batch_each_datagram_goes_by_itself(server: socket.socket) -> None:
    def without_checksums(family: int) -> socket.socket:
        sock = new_socket(family)
        sock.setsockopt(socket.SOL_SOCKET, _SO_NO_CHECK, 1)
        return sock

    port = udp_port(server)
    with no_fds_left(), UdpBench(TargetPorts(port, port), new=without_checksums) as bench:
        bench.ask(port, b"aabbc", 2)
        assert [server.recvfrom(100)[0] for _ in range(3)] == [b"aa", b"bb", b"c"]


@pytest.mark.parametrize("client", ["192.0.2.1", "2001:db8::1"])
@pytest.mark.parametrize(("data", "segment", "datagrams"), [(b"", 0, [b""]), (b"aab", 2, [b"aa", b"b"])])
def test_the_server_is_told_in_each_datagram_who_sent_it(
    bench: UdpBench, server: socket.socket, client: str, data: bytes, segment: int, datagrams: list[bytes]
) -> None:
    exposed = "2001:db8::2" if ":" in client else "198.51.100.2"
    origin = Origin(ip_address(client), 40_000, ip_address(exposed), 53)
    flow_id, kept = bench.open(udp_port(server), ProxyVersion.V2, origin)
    bench.listener.send(flow_id, data, segment)
    bench.settle()
    header = datagram_header(ProxyVersion.V2, origin)
    assert header[13] == (0x22 if ":" in client else 0x12)
    for datagram in datagrams:
        received, address = server.recvfrom(200)
        assert received == header + datagram
    server.sendto(b"answer", address)
    bench.run(lambda: kept.datagrams == [b"answer"])


def test_a_datagram_that_the_header_makes_too_long_is_dropped_and_counted(
    bench: UdpBench, server: socket.socket
) -> None:
    flow_id, _ = bench.open(udp_port(server), ProxyVersion.V2)
    header = len(datagram_header(ProxyVersion.V2, ORIGIN))
    bench.listener.send(flow_id, bytes(MAX_DATAGRAM_BYTES - header + 1), 0)
    bench.listener.send(flow_id, bytes(MAX_DATAGRAM_BYTES - header), 0)
    bench.settle()
    assert len(server.recv(1 << 16)) == MAX_DATAGRAM_BYTES
    bench.pass_s(2)
    assert bench.listener.lost_there == (1, 0)


# Where the server is


def test_ipv6_is_tried_when_ipv4_refuses_and_gets_the_first_datagrams() -> None:
    with udp_server("::1") as server:
        port = udp_port(server)
        with no_fds_left(), _bench_of(port) as bench:
            flow_id, kept = bench.open(port)
            for data in (b"one", b"two", b"three"):
                bench.listener.send(flow_id, data, 0)
            bench.settle()
            received = [server.recvfrom(100) for _ in range(3)]
            assert [data for data, _ in received] == [b"one", b"two", b"three"]
            bench.listener.send(flow_id, b"four", 0)
            bench.settle()
            assert server.recv(100) == b"four"
            server.sendto(b"answer", received[0][1])
            bench.run(lambda: kept.datagrams == [b"answer"])


def test_where_nobody_is_the_flow_is_refused_and_a_later_one_finds_who_came() -> None:
    port = _closed_port()
    with no_fds_left(), _bench_of(port) as bench:
        _, kept = bench.ask(port)
        bench.run(lambda: kept.code)
        assert kept.code is FlowCode.REFUSED
        with udp_server(port=port) as server:
            _, kept = bench.ask(port)
            data, client = server.recvfrom(100)
            server.sendto(data, client)
            bench.run(lambda: kept.datagrams == [b"ask"])


def test_what_a_server_sent_before_it_closed_its_port_arrives_before_the_end() -> None:
    with udp_server() as server, _bench_of(udp_port(server)) as bench:
        flow_id, kept = bench.ask(udp_port(server))
        _, client = server.recvfrom(100)
        for answer in (b"a", b"bb", b"ccc"):
            server.sendto(answer, client)
        server.close()
        bench.listener.send(flow_id, b"x", 0)
        bench.run(lambda: kept.code)
        assert (kept.code, kept.datagrams) == (FlowCode.REFUSED, [b"a", b"bb", b"ccc"])


def test_a_batch_to_a_closed_port_is_refused_too() -> None:
    port = _closed_port()
    with no_fds_left(), _bench_of(port) as bench:
        _, kept = bench.ask(port, b"aabbc", 2)
        bench.run(lambda: kept.code)
        assert kept.code is FlowCode.REFUSED


def test_a_server_that_goes_ends_the_flow_after_what_it_has_sent() -> None:
    with udp_server() as server:
        port = udp_port(server)
        bench = _bench_of(port)
        with no_fds_left(), bench:
            flow_id, kept = bench.ask(port)
            _, client = server.recvfrom(100)
            server.sendto(b"last", client)
            server.close()
            bench.listener.send(flow_id, b"anybody", 0)
            bench.run(lambda: kept.code)
            assert kept.code is FlowCode.REFUSED
            assert kept.datagrams == [b"last"]


def test_a_port_that_nobody_is_at_never_answers_itself() -> None:
    port = _closed_port()
    made: list[socket.socket] = []

    def unlucky(family: int) -> socket.socket:
        sock = new_socket(family)
        if family == socket.AF_INET and not made:
            sock.bind(("127.0.0.1", port))
        made.append(sock)
        return sock

    with no_fds_left(), UdpBench(TargetPorts(port, port), new=unlucky) as bench:
        _, kept = bench.ask(port)
        bench.run(lambda: kept.code)
        assert kept.code is FlowCode.REFUSED
        assert kept.datagrams == []
        assert len(made) > 2


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EMFILE, FlowCode.OVER_LIMIT), (errno.EAFNOSUPPORT, FlowCode.UNREACHABLE)],
)
def test_without_a_socket_the_flow_is_refused(server: socket.socket, number: int, code: FlowCode) -> None:
    def refuse(_family: int) -> socket.socket:
        raise OSError(number, os.strerror(number))

    port = udp_port(server)
    with no_fds_left(), UdpBench(TargetPorts(port, port), new=refuse) as bench:
        _, kept = bench.ask(port)
        bench.run(lambda: kept.code)
        assert kept.code is code
        assert not bench.service.carries_any


def test_every_port_of_the_range_is_reached_and_no_other() -> None:
    with udp_server() as one, udp_server() as other, udp_server() as outside:
        low, high = sorted((udp_port(one), udp_port(other)))
        with UdpBench(TargetPorts(low, high)) as bench:
            for server in (one, other):
                bench.ask(udp_port(server))
                assert server.recv(100) == b"ask"
        port = udp_port(one)
        # A listener that lies about the ports of its call: the whole call ends.
        with UdpBench(TargetPorts(port, port), asked=TargetPorts(1, 65535)) as bench:
            _, kept = bench.ask(udp_port(outside))
            bench.run(lambda: kept.code and bench.service.is_over)
            assert (
                bench.service.problem
                == f"FLOW to port {udp_port(outside)}, which is none of this call's ports"
            )
            outside.setblocking(False)
            with pytest.raises(BlockingIOError):
                outside.recv(100)
