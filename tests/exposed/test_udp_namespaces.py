# SPDX-License-Identifier: GPL-2.0-or-later
"""Datagrams from a network to an exposed qube: several addresses on one interface, scopes, and sides."""

import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from bounds import BOUND_S
from spaces import Spaces, needs_namespaces
from udp_bench import FlowBench, echo, udp_config

from qubes_fwd_qrexec.exposed.flowcounters import Dropped
from qubes_fwd_qrexec.exposed.limits import CLIENTS_PER_NETWORK
from qubes_fwd_qrexec.system.ingress import KNOWN_S, Sides

pytestmark = needs_namespaces
# linux/in6.h
_IPV6_FREEBIND = 78
ADDRESSES = ["192.0.2.1", "192.0.2.3", "198.51.100.1", "fd00::1", "fd00::3", "fe80::1"]


@pytest.fixture
def spaces() -> Iterator[Spaces]:
    """The exposed qube ``edge``, with several addresses on its interface, and a client in ``lan``."""
    with Spaces("edge", "lan") as spaces:
        spaces.join(
            *("edge", "lan"),
            *(("192.0.2.1/24", "192.0.2.2/24"), ("192.0.2.3/24", "192.0.2.4/24")),
            *(("198.51.100.1/24", "198.51.100.2/24"), ("fd00::1/64", "fd00::2/64")),
            *(("fd00::3/64", "fd00::4/64"), ("fe80::1/64", "fe80::2/64")),
        )
        yield spaces


def client_in(spaces: Spaces, address: str, port: int) -> socket.socket:
    """A socket of the LAN, which hears nobody but this address and port."""
    with spaces.within("lan"):
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        scope = socket.if_nametoindex("edge") if address.startswith("fe80") else 0
        sock.connect((address, port, 0, scope) if ":" in address else (address, port))
        sock.settimeout(0)
        return sock


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_reply_leaves_from_the_address_that_a_client_of_the_network_wrote_to(
    spaces: Spaces, address: str
) -> None:
    with spaces.within("edge"), FlowBench(udp_config("0.0.0.0,::")) as bench:
        bench.carried.then = echo
        with client_in(spaces, address, bench.port) as client:
            for data in (b"one", b"two"):
                client.send(data)
                bench.turn()
                assert client.recv(10) == data
            (flow,) = bench.flows
            assert str(flow.client) == client.getsockname()[0].partition("%")[0]
            assert "%" not in str(flow.origin())


def test_a_client_with_a_wider_address_may_write_to_a_link_local_one(spaces: Spaces) -> None:
    """The reply has no scope but that of the interface."""
    with spaces.within("edge"), FlowBench(udp_config("::")) as bench:
        bench.carried.then = echo
        with spaces.within("lan"):
            client = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
            client.bind(("fd00::2", 0))
            client.setblocking(False)
            scope = socket.if_nametoindex("edge")
        with client:
            client.sendto(b"x", ("fe80::1", bench.port, 0, scope))
            bench.turn()
            data, sender = client.recvfrom(10)
            assert (data, sender[0].partition("%")[0]) == (b"x", "fe80::1")


@pytest.mark.parametrize("listen", ADDRESSES[:-1])
def test_a_forward_at_one_address_hears_nothing_at_another(spaces: Spaces, listen: str) -> None:
    with spaces.within("edge"), FlowBench(udp_config(listen)) as bench:
        for address in ADDRESSES:
            with client_in(spaces, address, bench.port) as client:
                client.send(b"x")
                bench.turn()
        assert [str(flow.local_address) for flow, _, _ in bench.carried.sent] == [listen]


@pytest.mark.parametrize("address", ["192.0.2.1", "fd00::1", "fe80::1"])
@pytest.mark.parametrize(("side", "group"), [("outer", 0), ("uplink", 1), ("vifs", 2)])
def test_who_comes_by_another_side_begins_nothing(
    spaces: Spaces, address: str, side: str, group: int
) -> None:
    for own in range(3):
        spaces.ip_in("edge", "link", "set", "lan", "group", str(own))
        with spaces.within("edge"), FlowBench(udp_config("0.0.0.0,::", side=side)) as bench:
            with client_in(spaces, address, bench.port) as client:
                client.send(b"x")
                bench.turn()
            assert len(bench.flows) == (1 if own == group else 0)
            assert bench.table.counters.refusals == ({} if own == group else {"side": 1})


def test_a_flow_is_not_entered_by_another_side(spaces: Spaces) -> None:
    """Somebody at another interface writes with the address and port of a client."""
    spaces.ip("netns", "list")
    with Spaces("bad") as other:
        spaces.ip(
            *("link", "add", "bad", "netns", spaces.name("edge"), "type", "veth"),
            *("peer", "name", "edge", "netns", other.name("bad")),
        )
        spaces.ip_in("edge", "link", "set", "bad", "up", "group", "2")
        for name in ("all", "bad", "lan"):
            with spaces.within("edge"):
                Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter").write_text("0")
        other.ip_in("bad", "link", "set", "edge", "up")
        other.ip_in("bad", "address", "add", "192.0.2.2/24", "dev", "edge")
        with spaces.within("edge"), FlowBench(udp_config("192.0.2.1")) as bench:
            bench.carried.then = echo
            with client_in(spaces, "192.0.2.1", bench.port) as client:
                client.send(b"x")
                bench.turn()
                assert client.recv(10) == b"x"
                with other.within("bad"):
                    thief = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                with thief:
                    thief.bind(("192.0.2.2", client.getsockname()[1]))
                    thief.sendto(b"forged", ("192.0.2.1", bench.port))
                    bench.turn()
                assert bench.carried.data == [b"x"]
                assert bench.table.counters.refusals == {"side": 1}
                client.send(b"y")
                bench.turn()
                assert client.recv(10) == b"y"


def test_what_is_sent_to_all_of_a_network_begins_nothing(spaces: Spaces) -> None:
    with spaces.within("edge"), FlowBench(udp_config("0.0.0.0,::")) as bench:
        with spaces.within("lan"):
            sock, sock6 = (socket.socket(f, socket.SOCK_DGRAM) for f in (socket.AF_INET, socket.AF_INET6))
            scope = socket.if_nametoindex("edge")
        with sock, sock6:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sock.sendto(b"x", ("192.0.2.255", bench.port))
            sock6.sendto(b"x", ("ff02::1", bench.port, 0, scope))
            bench.turn()
        assert bench.flows == []
        assert bench.table.counters.drops == {Dropped.TO_MANY: 2}


def test_a_flood_from_one_ipv6_network_has_the_flows_of_eight_clients(spaces: Spaces) -> None:
    """A host may claim each address of its network; another network is not kept out."""
    config = udp_config("::", limits="per-source:2")
    with spaces.within("edge"), FlowBench(config) as bench, ExitStack() as stack:
        for number in range(1, 41):
            with spaces.within("lan"):
                source = stack.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
                source.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
                source.bind((f"fd00:0:0:9::{number:x}", 0))
            source.sendto(b"x", ("fd00::1", bench.port))
            bench.turn()
        assert len(bench.flows) == 2 * CLIENTS_PER_NETWORK
        assert bench.table.counters.refusals == {"per-source": 40 - 2 * CLIENTS_PER_NETWORK}
        with client_in(spaces, "fd00::1", bench.port) as other:
            bench.carried.then = echo
            other.send(b"y")
            bench.turn()
            assert other.recv(10) == b"y"


def test_what_the_kernel_says_of_a_side_is_good_for_a_moment_and_no_longer(spaces: Spaces) -> None:
    now = [100.0]
    sides = Sides(lambda: now[0])
    with spaces.within("edge"):
        index = socket.if_nametoindex("lan")
        assert sides.is_by(index, 0)
        subprocess.run(["ip", "link", "set", "lan", "group", "2"], check=True, timeout=BOUND_S)
        assert sides.is_by(index, 0)
        now[0] += KNOWN_S
        assert not sides.is_by(index, 0)
        assert sides.is_by(index, 2)
        assert sides.is_by(1, 2)
        assert not sides.is_by(2**30, 2)
