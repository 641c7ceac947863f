# SPDX-License-Identifier: GPL-2.0-or-later
"""Datagrams to the listener through the firewall of its qube, and flows that end with their forward."""

import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from ipaddress import ip_address
from pathlib import Path

import pytest
from exposed_qube import BOUND_S, IPV4, IPV6, LISTENER_UID, PORT, Edge, Program, becomes
from helpers import write_config
from spaces import Spaces

from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.common.values import PortRange, Proto, Sources
from qubes_fwd_qrexec.firewall.cutting import end
from qubes_fwd_qrexec.firewall.openings import Opening
from qubes_fwd_qrexec.lab import netns
from qubes_fwd_qrexec.lab.blueprint import create_lab
from qubes_fwd_qrexec.system.addresses import local_addresses

UDP = {"service": "qubes.ForwardUDP", "transport": "mux", "key": "udp.work.dns"}
ALLOWED = {"listen": "0.0.0.0,::", "srchosts": "192.168.77.0/24,fd77::/64"}
EVERYBODY = {"listen": "0.0.0.0,::", "srchosts": "192.168.77.0/24,192.168.88.0/24,fd77::/64"}
BROADCAST = "192.168.77.255"
PROBLEM = netns.why_unavailable() or (None if shutil.which("nft") else "the program 'nft' is missing")
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))


class Firewall:
    """sys-net's firewall with the program that keeps it, and a LAN beside it."""

    def __init__(self, edge: Edge, places: netns.Namespaces, told: socket.socket, opened: ExitStack) -> None:
        self.edge = edge
        self._places = places
        self._told = told
        self._opened = opened
        self.program: Program

    def start(self) -> None:
        self.program = Program(self.edge, self._places, self._told, (), LISTENER_UID)
        self._opened.callback(self.program.process.communicate)
        self._opened.callback(self.program.process.kill)
        self.program.status("READY=1")

    def configure(self, **options: str) -> None:
        write_config(self.edge.config, PORT, 53, **{**UDP, **ALLOWED, **options})

    def remove(self) -> None:
        (self.edge.config / UDP["key"]).unlink()

    def flow(self, server: socket.socket, source: str = netns.LAN_HOST) -> socket.socket:
        """A client to whom the listener has answered: the kernel knows the flow."""
        client = self.edge.sender(source)
        assert becomes(lambda: self.edge.takes(client, server))
        client.sendto(b"?", (netns.EDGE_ADDRESS_IPV6 if ":" in source else netns.EDGE_ADDRESS, PORT))
        client.setblocking(True)
        client.settimeout(BOUND_S)
        server.settimeout(BOUND_S)
        _, peer = server.recvfrom(64)
        server.sendto(b"!", peer)
        assert client.recv(64) == b"!"
        server.setblocking(False)
        return client


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def firewall(tmp_path: Path, opened: ExitStack, monkeypatch: pytest.MonkeyPatch) -> Firewall:
    places = netns.Namespaces(create_lab(tmp_path / "lab"))
    places.create()
    opened.callback(places.destroy)
    edge = Edge(places, tmp_path, opened)
    edge.nft(IPV4 + IPV6)
    told = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    told.bind(str(tmp_path / "notify"))
    told.settimeout(BOUND_S)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))
    return Firewall(edge, places, told, opened)


def test_datagrams_of_the_sources_alone_come_to_the_listener_and_to_no_other_program(
    firewall: Firewall,
) -> None:
    """Nor does a forward of TCP let in a datagram, or the other way round."""
    edge = firewall.edge
    write_config(edge.config, PORT + 1, 53, **ALLOWED)
    firewall.configure()
    other = edge.receive(uid=0)
    of_tcp = edge.receive(PORT + 1)
    firewall.start()
    allowed, stranger = edge.sender(), edge.sender(netns.LAN_HOST_REFUSED)
    assert not edge.takes(allowed, other)
    other.close()
    server, server6 = edge.receive(), edge.receive(address="::")
    assert becomes(lambda: edge.takes(allowed, server))
    assert becomes(lambda: edge.takes(edge.sender(netns.LAN_HOST_IPV6), server6))
    assert not edge.takes(stranger, server, netns.EDGE_ADDRESS_REFUSED)
    assert not edge.takes(stranger, server)
    assert not edge.takes(edge.sender(), of_tcp, port=PORT + 1)
    assert not edge.reaches(PORT)
    server.close()
    taken = edge.receive(uid=0)
    assert becomes(lambda: not edge.takes(edge.sender(), taken))
    assert firewall.program.end()[0] == 0


def test_what_is_sent_to_everybody_is_let_in_to_nobody(firewall: Firewall) -> None:
    firewall.configure()
    firewall.start()
    edge = firewall.edge
    server, client = edge.receive(), edge.sender()
    assert becomes(lambda: edge.takes(client, server))
    for address in (BROADCAST, "255.255.255.255", "224.0.0.1"):
        crier = edge.sender()
        crier.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        crier.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(netns.LAN_HOST))
        crier.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")
        assert not edge.takes(crier, server, address)


def test_what_claims_to_come_from_this_qube_is_let_in_to_nobody(firewall: Firewall) -> None:
    """Its answer would be taken for another client's datagram, and be answered, without an end."""
    firewall.configure(listen="::", srchosts="fd77::/64")
    firewall.start()
    edge = firewall.edge
    server = edge.receive(address="::")
    assert becomes(lambda: edge.takes(edge.sender(netns.LAN_HOST_IPV6), server))
    assert not edge.takes(edge.liar(netns.EDGE_ADDRESS_IPV6), server)


def test_a_flow_ends_with_its_forward_though_the_client_goes_on_and_the_listener_still_answers(
    firewall: Firewall,
) -> None:
    firewall.configure()
    firewall.start()
    edge = firewall.edge
    server, server6 = edge.receive(), edge.receive(address="::")
    flows = [(firewall.flow(server), server), (firewall.flow(server6, netns.LAN_HOST_IPV6), server6)]
    peers = [client.getsockname() for client, _ in flows]
    firewall.remove()
    for (client, sock), peer in zip(flows, peers, strict=True):
        assert becomes(lambda client=client, sock=sock: not edge.takes(client, sock))  # type: ignore[misc]
        with suppress(PermissionError):  # as a rule tells a program at once
            sock.sendto(b"late", peer)
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(64)
        assert not edge.takes(client, sock)
    server.close()
    other = edge.receive(uid=0)
    assert not edge.takes(flows[0][0], other)


def test_a_flow_that_a_late_answer_has_begun_ends_as_the_others_do(firewall: Firewall) -> None:
    firewall.configure()
    edge = firewall.edge
    server, client = edge.receive(), edge.sender()
    firewall.start()
    server.sendto(b"late", client.getsockname())
    assert edge.takes(client, server)
    firewall.remove()
    assert becomes(lambda: not edge.takes(client, server))


def test_a_flow_ends_with_the_listeners_socket_though_the_forward_stays(firewall: Firewall) -> None:
    """Another program that takes the port next hears nothing of the client."""
    firewall.configure()
    firewall.start()
    edge = firewall.edge
    server = edge.receive()
    client = firewall.flow(server)
    server.close()
    other = edge.receive(uid=0)
    assert becomes(lambda: not edge.takes(client, other))
    other.close()
    server = edge.receive()
    assert becomes(lambda: edge.takes(client, server))


def test_a_narrower_forward_ends_the_flows_of_those_alone_whom_it_no_longer_lets_in(
    firewall: Firewall,
) -> None:
    firewall.configure(**EVERYBODY)
    firewall.start()
    edge = firewall.edge
    server = edge.receive()
    kept, cut = firewall.flow(server), firewall.flow(server, netns.LAN_HOST_REFUSED)
    firewall.configure()
    assert becomes(lambda: not edge.takes(cut, server))
    assert edge.takes(kept, server)


def test_what_drains_goes_on_without_anybody_new_while_the_listener_has_the_port(firewall: Firewall) -> None:
    firewall.configure(on_expire="drain")
    firewall.start()
    edge = firewall.edge
    server = edge.receive()
    client = firewall.flow(server)
    firewall.configure(on_expire="drain", expire=f"{int(time.time())}")
    assert becomes(lambda: not edge.takes(edge.sender(), server))
    assert edge.takes(client, server)
    firewall.remove()
    firewall.program.status("0 forwards let in")
    assert edge.takes(client, server)
    server.close()
    other = edge.receive(uid=0)
    assert becomes(lambda: not edge.takes(client, other))


@pytest.mark.parametrize("is_removed_by_the_unit", [True, False])
def test_the_flows_that_a_killed_program_had_let_in_are_ended(
    firewall: Firewall, is_removed_by_the_unit: bool
) -> None:
    firewall.configure()
    firewall.start()
    edge = firewall.edge
    server = edge.receive()
    client = firewall.flow(server)
    firewall.program.end(signal.SIGKILL)
    assert edge.takes(client, server)
    if is_removed_by_the_unit:
        edge.run(sys.executable, "-m", "qubes_fwd_qrexec.firewall.keeper", "--remove")
    else:
        firewall.remove()
        firewall.start()
    assert not edge.takes(client, server)


def test_what_a_qube_passes_on_between_others_is_not_cut_with_its_own_flows() -> None:
    with Spaces("one", "hop", "far") as spaces:
        spaces.join("one", "hop", ("10.0.1.1/24", "10.0.1.2/24"))
        spaces.join("hop", "far", ("10.0.2.2/24", "10.0.2.1/24"))
        spaces.ip_in("one", "route", "add", "10.0.2.0/24", "via", "10.0.1.2")
        spaces.ip_in("far", "route", "add", "10.0.1.0/24", "via", "10.0.2.2")
        rules = "table ip t { chain c { type filter hook prerouting priority 0; ct state new accept; }; }"
        spaces.run("hop", "nft", "-f", "-", text=rules)
        spaces.forward_packets("hop")
        with ExitStack() as opened:
            socks = []
            for name in ("one", "hop", "far"):
                with spaces.within(name):
                    sock = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
                    sock.settimeout(BOUND_S)
                    sock.bind(("0.0.0.0", 0 if name == "one" else 53))
                    socks.append(sock)
            client, ours, far = socks
            for server, address in ((ours, "10.0.1.2"), (far, "10.0.2.1")):
                client.sendto(b"?", (address, 53))
                assert server.recv(64) == b"?"
        opening = Opening(
            "udp.work.dns",
            Proto.UDP,
            Side.OUTER,
            ip_address("0.0.0.0"),
            PortRange(53, 53),
            Sources.parse("any"),
        )
        with spaces.within("hop"):
            assert {ip_address("10.0.1.2"), ip_address("10.0.2.2")} <= local_addresses(4)
            assert ip_address("::1") in local_addresses(6)
            assert end([opening], [opening]) == 0
            assert end([opening], []) == 1
            assert end([opening], []) == 0
