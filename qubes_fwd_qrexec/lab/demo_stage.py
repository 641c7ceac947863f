# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is where in the demo, on namespaces or on the loopback; and what its clients get, or why nothing."""

import socket
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from . import netns
from .session import LabSession, SessionError, output_of


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


def no_answer(client: Sequence[str]) -> str:
    """Why a client gets nothing. Raises `SessionError` if it gets something."""
    try:
        answer = output_of(client)
    except SessionError as error:
        return str(error).rpartition("no answer: ")[2]
    raise SessionError(f"a client that is to get nothing got {answer!a}")


def retried(act: Callable[[], str], timeout_s: float = 20.0) -> str:
    """What ``act`` returns, which may raise `SessionError` until the time is over."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return act()
        except SessionError:
            if time.monotonic() > deadline:
                raise
