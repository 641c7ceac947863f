# SPDX-License-Identifier: GPL-2.0-or-later
"""A path of qubes joined by IP as in Qubes, and probes that tell what becomes of a packet on it.

A probe is one packet. Each qube has a tap, which sees packets come and go beside all rules; so a packet that
is dropped is seen to come and not to go, and nobody waits to learn that it is not answered. That is exact
because all packets of a CPU wait in one queue between two qubes, in whatever namespace that is. Once a packet
of our own has come through it, those before it have each gone on to the next qube, or to their end.
"""

import errno
import itertools
import os
import secrets
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from bounds import BOUND_S
from settled import settle
from taps import READ_MAX, Trace, of_datagram, of_syn, read

from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab import netns
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.netns import LAN, PROVIDER, Namespaces
from qubes_fwd_qrexec.lab.qube import Qube, QubeState
from qubes_fwd_qrexec.lab.stockrules import Shape
from qubes_fwd_qrexec.lab.wires import Wires

# A full queue drops a packet.
_AGAIN_S = 1.0

PROBLEM = netns.why_unavailable() or netns.why_no_firewall()
"""Why there can be no such path on this machine, or None."""

NET, FIREWALL, WORK = "sys-net", "sys-firewall", "work"
BESIDE_FIREWALL = "beside-firewall"
"""Behind sys-net, as sys-firewall is."""
BESIDE_WORK = "beside-work"
"""Behind sys-firewall, as work is."""

VPN = "sys-vpn"
"""Behind sys-firewall; its tunnel, tun0, ends at `PROVIDER`."""
BEHIND_VPN = "behind-vpn"

_NUMBERS = {NET: 5, FIREWALL: 6, VPN: 7, WORK: 10, BESIDE_WORK: 11, BESIDE_FIREWALL: 12, BEHIND_VPN: 13}
_NETVMS = {
    FIREWALL: NET,
    WORK: FIREWALL,
    BESIDE_WORK: FIREWALL,
    BESIDE_FIREWALL: NET,
    VPN: FIREWALL,
    BEHIND_VPN: VPN,
}
_ETH_P_ALL = 0x0003
_IP_TRANSPARENT = 19
_IPV6_TRANSPARENT = 75
_IP_RECVERR = 11
_IPV6_RECVERR = 25
_TOKEN_BYTES = 16


class Addresses(NamedTuple):
    """Who is where, in one family."""

    version: int
    lan: str
    """The client on the LAN that rules allow; ``lan_network`` is its network."""
    lan_refused: str
    lan_network: str
    net: str
    """sys-net on the LAN."""
    net_refused: str
    net_gateway: str
    """sys-net for the qubes behind it."""
    firewall: str
    work: str
    beside_firewall: str
    beside_work: str
    vpn: str
    behind_vpn: str
    provider: str
    """A host that the VPN leads to."""
    vpn_outside: str
    """sys-vpn in its tunnel, where it has one."""

    @property
    def nft(self) -> str:
        """The family's name in nftables."""
        return "ip" if self.version == 4 else "ip6"


def _ip(name: str) -> str:
    return f"10.137.0.{_NUMBERS[name]}"


def _ip6(name: str) -> str:
    return f"fd09:24ef:4179::a89:{_NUMBERS[name]:x}"


_QUBES = (NET, FIREWALL, WORK, BESIDE_FIREWALL, BESIDE_WORK, VPN, BEHIND_VPN)
V4 = Addresses(
    4,
    *(netns.LAN_HOST, netns.LAN_HOST_REFUSED, "192.168.77.0/24"),
    *(netns.EDGE_ADDRESS, netns.EDGE_ADDRESS_REFUSED, *map(_ip, _QUBES)),
    *(netns.PROVIDER_HOST, "10.8.0.2"),
)
V6 = Addresses(
    6,
    *(netns.LAN_HOST_IPV6, netns.LAN_HOST_REFUSED_IPV6, "fd77::/64"),
    *(netns.EDGE_ADDRESS_IPV6, netns.EDGE_ADDRESS_REFUSED_IPV6, *map(_ip6, _QUBES)),
    *(netns.PROVIDER_HOST_IPV6, "fd08:0::2"),
)
FAMILIES = (V4, V6)


class Server:
    """Listens in one qube. A datagram is sent back in reverse."""

    def __init__(self, qube: str, sock: socket.socket, opened: ExitStack) -> None:
        self.qube = qube
        self.sock = sock
        self._opened = opened
        self.peers: list[str] = []
        """The addresses of those whose datagrams it has answered."""

    def answer(self) -> bool:
        """Send back the datagrams that are there; whether there was one."""
        took = False
        while True:
            try:
                data, peer = self.sock.recvfrom(READ_MAX)
            except BlockingIOError:
                return took
            took = True
            self.peers.append(peer[0])
            self.sock.sendto(data[::-1], peer)

    def accept(self) -> tuple[socket.socket, str]:
        """The next connection, open until the test is over, and its client's address."""
        assert select.select([self.sock], [], [], BOUND_S)[0]
        sock, peer = self.sock.accept()
        self._opened.enter_context(sock)
        sock.settimeout(BOUND_S)
        return sock, peer[0]


class _Queue:
    """The kernel's queue for the packets of the CPU that this process is on."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.bind(("127.0.0.1", 0))
        self._sock.connect(self._sock.getsockname())
        self._numbers = itertools.count()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def pass_through(self) -> None:
        """Wait until what was in it has left it."""
        mark = b"%d" % next(self._numbers)
        until_s = time.monotonic() + BOUND_S
        while time.monotonic() < until_s:
            self._sock.send(mark)
            while select.select([self._sock], [], [], _AGAIN_S)[0]:
                if self._sock.recv(READ_MAX) == mark:
                    return
        raise TimeoutError


class Wired:
    """sys-net, sys-firewall and work, a qube beside each of the latter, and the LAN."""

    def __init__(self, places: Namespaces, wires: Wires, opened: ExitStack, qubes: dict[str, Qube]) -> None:
        self.places = places
        self.wires = wires
        self._opened = opened
        self._qubes = qubes
        self._servers: list[Server] = []
        self._taps: dict[str, socket.socket] = {}
        self._queue = opened.enter_context(_Queue())
        for name in (LAN, *([PROVIDER] if VPN in qubes else []), *qubes):
            self._open_tap(name)
        self._settle()

    def run(
        self, qube: str, *command: str, text: str = "", is_checked: bool = True
    ) -> "subprocess.CompletedProcess[str]":
        """A program in a qube, to its end."""
        with self.places.entering(qube)():
            return subprocess.run(
                command, input=text, capture_output=True, text=True, timeout=BOUND_S, check=is_checked
            )

    def nft(self, qube: str, text: str) -> None:
        """Load rules."""
        self.places.nft(qube, text)

    def ruleset(self, qube: str) -> str:
        """All rules of a qube, without the numbers of counters."""
        return self.run(qube, "nft", "-s", "list", "ruleset").stdout

    def change(self, name: str, **properties: Any) -> None:
        """Change a qube as dom0 does: its ``netvm``, ``state``, ``ip``, and rewire."""
        self._qubes[name] = replace(self._qubes[name], **properties)
        self.wires.follow(self._qubes.values())
        self._settle()

    def _settle(self) -> None:
        settle(self.places.entering(qube) for qube in self._taps)

    def pass_through(self) -> None:
        """Wait until whatever packets are on their way between qubes have come to its end."""
        for _ in self._taps:  # as many steps as a way can have
            for cpu in os.sched_getaffinity(0):
                with _on_cpu(cpu):
                    self._queue.pass_through()

    def halt(self, name: str) -> None:
        self.change(name, state=QubeState.HALTED)

    def start(self, name: str) -> None:
        self.change(name, state=QubeState.RUNNING)

    def serve(self, proto: str, qube: str, port: int, address: str = "") -> Server:
        """Listen in a qube until the test is over; without an address on all, of both families."""
        family = socket.AF_INET if "." in address else socket.AF_INET6
        sock = self._socket(qube, family, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family is socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(bool(address)))
        sock.bind((address, port))
        if proto == "tcp":
            sock.listen()
        server = Server(qube, sock, self._opened)
        self._servers.append(server)
        return server

    def connect(self, qube: str, address: str, port: int, source: str = "") -> socket.socket:
        """A TCP connection, which must come about."""
        sock = self._client("tcp", qube, address, source, 0)
        assert sock.connect_ex((address, port)) == errno.EINPROGRESS
        assert select.select([], [sock], [], BOUND_S)[1]
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        sock.settimeout(BOUND_S)
        return sock

    def send(
        self, proto: str, qube: str, address: str, port: int, source: str = "", source_port: int = 0
    ) -> str:
        """Send one packet from a qube, a TCP SYN or a datagram, and tell what becomes of it.

        That is ``answered by QUBE``; ``refused by QUBE``, by a RST or an ICMP message; ``dropped in QUBE``;
        or ``answer dropped in QUBE``. ``source`` may be any address, also another qube's.
        """
        with (
            self._client(proto, qube, address, source, source_port) as sock,
            _on_cpu(min(os.sched_getaffinity(0))),
        ):
            for tap in self._taps.values():
                read(tap)
            return self._outcome(proto, qube, sock, (address, port))

    def _outcome(self, proto: str, qube: str, sock: socket.socket, to: tuple[str, int]) -> str:
        token = secrets.token_bytes(_TOKEN_BYTES)
        try:
            code = sock.connect_ex(to)
            assert code in (0, errno.EINPROGRESS), os.strerror(code)
            if proto == "udp":
                sock.send(token)
        except PermissionError:
            return f"dropped in {qube}"  # as a rule of the qube itself tells the program at once
        trace = Trace(self._taps)
        trace.read()
        probe = of_datagram(token) if proto == "udp" else of_syn(trace.sights[qube], sock.getsockname()[1])
        if probe is None:
            return f"dropped in {qube}"
        until_s = time.monotonic() + BOUND_S
        while True:
            # Whatever was at its end here has told the client of it, if it ever will.
            ended, lost = trace.end(probe.packet), trace.end(probe.answer)
            took = [server.answer() for server in self._servers if server.sock.type is socket.SOCK_DGRAM]
            if any(took):
                lost = None
            said = _said(proto, sock)
            if said and ended:
                return f"{said} by {ended}"
            is_dropped = ended and lost is not None
            assert time.monotonic() < until_s
            self._queue.pass_through()
            if not trace.read() and is_dropped:
                return f"answer dropped in {lost}" if lost else f"dropped in {ended}"

    def _client(self, proto: str, qube: str, address: str, source: str, port: int) -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = self._socket(qube, family, proto)
        if family is socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
            sock.setsockopt(socket.IPPROTO_IP, _IP_RECVERR, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVERR, 1)
        if source or port:
            sock.bind((source, port))
        return sock

    def _socket(self, qube: str, family: int, proto: str) -> socket.socket:
        kind = socket.SOCK_STREAM if proto == "tcp" else socket.SOCK_DGRAM
        with self.places.entering(qube)():
            sock = self._opened.enter_context(socket.socket(family, kind))
        sock.setblocking(False)
        return sock

    def _open_tap(self, name: str) -> None:
        with self.places.entering(name)():
            tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
        self._taps[name] = self._opened.enter_context(tap)
        tap.setblocking(False)


def _said(proto: str, sock: socket.socket) -> str:
    """What the client has learned: that it was answered, or refused, or nothing yet."""
    if proto == "udp":
        try:
            sock.recv(READ_MAX)
        except BlockingIOError:
            return ""
        except OSError:
            return "refused"
        return "answered"
    if not select.select([], [sock], [], 0)[1]:
        return ""
    return "refused" if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) else "answered"


@contextmanager
def _on_cpu(cpu: int) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def open_wired(
    directory: Path, shape: Shape = Shape.R4_3, *, has_ipv6: bool = True, has_vpn: bool = False
) -> Iterator[Wired]:
    """The path in a directory that is new; without IPv6 no qube has an address of that family.

    With a VPN there are `VPN`, `BEHIND_VPN` and `PROVIDER` besides.
    """
    lab = LabDirectory(directory)
    lab.qubes_dir.mkdir(parents=True)
    qubes = {
        name: Qube(
            name=QubeName(name),
            netvm=None if name == NET else QubeName(_NETVMS[name]),
            ip=_ip(name),
            ip6=_ip6(name) if has_ipv6 else None,
            provides_network=name in (NET, FIREWALL, VPN),
        )
        for name in _QUBES
        if has_vpn or name not in (VPN, BEHIND_VPN)
    }
    for qube in qubes.values():
        lab.write_qube(qube)
    places = Namespaces(lab)
    with ExitStack() as opened:
        places.create()
        opened.callback(places.destroy)
        wires = Wires(places, shape, lambda name: name == VPN)
        wires.follow(qubes.values())
        yield Wired(places, wires, opened, qubes)
