# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is where in the demo: on namespaces, or on the loopback."""

import socket
from typing import NamedTuple

from . import netns
from .session import LabSession


class Stage(NamedTuple):
    """Addresses and ports. ``port`` is the exposed one, and ``target_port`` the server's; of each there is
    another one for UDP. ``listen`` are options of ``qvm-forward add``."""

    address: str
    port: str
    target_port: str
    udp_port: str
    udp_target_port: str
    allowed: str
    stranger: str
    network: str
    listen: tuple[str, ...]

    @classmethod
    def of(cls, session: LabSession) -> "Stage":
        if session.has_namespaces:
            ports = ("80", "8080", "53", "53")
            return cls(
                netns.EDGE_ADDRESS, *ports, netns.LAN_HOST, netns.LAN_HOST_REFUSED, "192.168.77.0/24", ()
            )
        hosts = ("127.0.0.1", "127.0.0.2", "127.0.0.1")
        return cls(
            "127.0.0.1",
            *(*_free_ports(socket.SOCK_STREAM), *_free_ports(socket.SOCK_DGRAM)),
            *hosts,
            ("--listen", "127.0.0.1"),
        )


def _free_ports(kind: socket.SocketKind) -> tuple[str, str]:
    with socket.socket(socket.AF_INET, kind) as one, socket.socket(socket.AF_INET, kind) as other:
        for sock in (one, other):
            sock.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1]), str(other.getsockname()[1])
