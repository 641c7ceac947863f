# SPDX-License-Identifier: GPL-2.0-or-later
"""The path of a forward by nft in network namespaces: LAN, sys-net, sys-firewall, work, a qube beside each.

They are joined and have the firewalls of stock Qubes, as in the lab (`qubes_fwd_qrexec.lab.wires`).
"""

import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.common.nftconfig import NftConfig, Role
from qubes_fwd_qrexec.common.values import ListenPorts, Proto, QubeName, RuleName, Sources, TargetPorts
from qubes_fwd_qrexec.lab import netns
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.netns import LAN, Namespaces
from qubes_fwd_qrexec.lab.qube import Qube, QubeState
from qubes_fwd_qrexec.lab.stockrules import Shape
from qubes_fwd_qrexec.lab.wires import Wires

NET, FIREWALL, WORK = "sys-net", "sys-firewall", "work"
PATH = (NET, FIREWALL, WORK)
BESIDE_FIREWALL, BESIDE_WORK = "beside-firewall", "beside-work"
_NUMBERS = {NET: 5, FIREWALL: 6, WORK: 10, BESIDE_WORK: 11, BESIDE_FIREWALL: 12}
_NETVMS = {FIREWALL: NET, WORK: FIREWALL, BESIDE_WORK: FIREWALL, BESIDE_FIREWALL: NET}
_PREFIXES = {4: "10.137.0.", 6: "fd09:24ef:4179::a89:"}


@dataclass(frozen=True, slots=True)
class Edge:
    """Addresses on the LAN, in one family."""

    version: int
    net: str
    lan: str
    """The client that rules allow; ``refused`` is that of another network."""
    refused: str
    network: str


EDGES = (
    Edge(4, netns.EDGE_ADDRESS, netns.LAN_HOST, netns.LAN_HOST_REFUSED, "192.168.77.0/24"),
    Edge(6, netns.EDGE_ADDRESS_IPV6, netns.LAN_HOST_IPV6, netns.LAN_HOST_REFUSED_IPV6, "fd77::/64"),
)
ALLOWED = Sources.parse(",".join(edge.network for edge in EDGES))
EVERYBODY = Sources.parse(f"{ALLOWED},192.168.88.0/24,fd88::/64")


def why_unavailable() -> str | None:
    """Why there can be no such path on this machine; None if there can."""
    if (problem := netns.why_unavailable() or netns.why_no_firewall()) is not None:
        return problem
    return None if netns.has_ipv6() else "this machine has no IPv6"


def address(qube: str, version: int = 4) -> str:
    """The address by which its netvm reaches a qube."""
    number = _NUMBERS[qube]
    return _PREFIXES[version] + (str(number) if version == 4 else f"{number:x}")


def told(
    name: str, proto: Proto, port: int, target_port: int, sources: Sources, expire: int | None = None
) -> dict[str, NftConfig]:
    """What each qube of the path is told of a forward from sys-net to work."""
    exposed = NftConfig(
        target=QubeName(WORK),
        name=RuleName(name),
        role=Role.HOP,
        side=Side.OUTER,
        proto=proto,
        listen_ports=ListenPorts(port, port),
        target_ports=TargetPorts(port, port),
        sources=sources,
        to4=IPv4Address(address(FIREWALL, 4)),
        to6=IPv6Address(address(FIREWALL, 6)),
        expire=expire,
    )
    last = replace(
        exposed,
        side=Side.UPLINK,
        target_ports=TargetPorts(target_port, target_port),
        to4=IPv4Address(address(WORK, 4)),
        to6=IPv6Address(address(WORK, 6)),
    )
    listen = ListenPorts(target_port, target_port)
    return {
        NET: exposed,
        FIREWALL: last,
        WORK: replace(last, role=Role.TARGET, listen_ports=listen, to4=None, to6=None),
    }


class Road:
    """The path, as `open_road` has made it. Each method but `socket` starts programs and waits for them."""

    def __init__(self, places: Namespaces, wires: Wires, qubes: dict[str, Qube]) -> None:
        self.places = places
        self.wires = wires
        self._qubes = qubes

    def within(self, qube: str) -> AbstractContextManager[None]:
        """What this thread opens or starts within the block is in that qube's network."""
        return self.places.entering(qube)()

    def socket(self, qube: str, version: int, kind: socket.SocketKind) -> socket.socket:
        """A socket in a qube; those of IPv6 are for that alone."""
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with self.within(qube):
            sock = socket.socket(family, kind)
        if version == 6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        return sock

    def replug(self, *names: str) -> None:
        """Shut these qubes down and start them: their interfaces, and those that lead to them, are new."""
        for state in (QubeState.HALTED, QubeState.RUNNING):
            for name in names:
                self._qubes[name] = replace(self._qubes[name], state=state)
            self.wires.follow(self._qubes.values())


@contextmanager
def open_road(directory: Path, shape: Shape = Shape.R4_3, without: Sequence[str] = ()) -> Iterator[Road]:
    """The path in a directory that is new, perhaps without some qubes. It is gone with the block.

    It needs root. Raises `StoreError`.
    """
    lab = LabDirectory(directory)
    lab.qubes_dir.mkdir(parents=True)
    qubes = {
        name: Qube(
            name=QubeName(name),
            netvm=None if name == NET else QubeName(_NETVMS[name]),
            ip=address(name, 4),
            ip6=address(name, 6),
            provides_network=name in (NET, FIREWALL),
        )
        for name in _NUMBERS
        if name not in without
    }
    for qube in qubes.values():
        lab.write_qube(qube)
    places = Namespaces(lab)
    places.create()
    try:
        wires = Wires(places, shape)
        wires.follow(qubes.values())
        yield Road(places, wires, qubes)
    finally:
        places.destroy()


__all__ = [
    "ALLOWED",
    "BESIDE_FIREWALL",
    "BESIDE_WORK",
    "EDGES",
    "EVERYBODY",
    "FIREWALL",
    "LAN",
    "NET",
    "PATH",
    "WORK",
    "Edge",
    "Road",
    "address",
    "open_road",
    "told",
    "why_unavailable",
]
