# SPDX-License-Identifier: GPL-2.0-or-later
"""An exposed qube with a firewall in the shape of Qubes' own, and a LAN beside it, in namespaces of a lab.

The firewall counts what it drops: that a packet is not answered for a while proves nothing.
"""

import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bounds import BOUND_S
from settled import settle

from qubes_fwd_qrexec.lab import netns

# Between two looks at whether a packet was answered, or else dropped.
_LOOK_S = 0.02
PORT = 8080
# linux/in6.h; the socket module lacks it.
_IPV6_TRANSPARENT = 75
# Of no user that this machine has.
LISTENER_UID = 54321

# A qube's chain for what comes in drops, and asks the user's chain first: docs/facts.md, F2.
QUBES_TABLE = """
table {family} qubes {{
    chain input {{
        type filter hook input priority filter; policy drop;
        jump custom-input
        ct state invalid counter drop
        ct state established,related accept
        iif lo accept
        {neighbours}
        tcp flags syn counter drop comment "dropped"
        meta l4proto udp counter drop comment "dropped"
        counter
    }}
    chain custom-input {{ }}
}}
"""
IPV4 = QUBES_TABLE.format(family="ip", neighbours="")
IPV6 = QUBES_TABLE.format(family="ip6", neighbours="meta l4proto ipv6-icmp accept")
# Without IPv6: the table is for antispoofing alone, and another one drops everything.
NO_IPV6 = """
table ip6 qubes {
    chain antispoof {
        counter drop
    }
}
table ip6 qbs-filter {
    chain input {
        type filter hook input priority filter; policy drop;
        iif lo accept
    }
}
"""
USERS = """
add rule ip qubes custom-input tcp dport 22 counter accept comment "mine"
add rule ip qubes custom-input udp dport 53 accept
"""


class Edge:
    """sys-net, with its firewall and the programs that listen there, and the LAN beside it."""

    def __init__(self, places: netns.Namespaces, directory: Path, opened: ExitStack) -> None:
        self._places = places
        self._opened = opened
        self.config = directory / "config"
        self.config.mkdir()
        settle(places.entering(name) for name in (netns.EDGE, netns.LAN))

    def listen(self, port: int, *addresses: str, uid: int = LISTENER_UID) -> list[socket.socket]:
        """A program of this user listens there, by default the listener."""
        return [self._listen(port, address, uid) for address in addresses]

    def _listen(self, port: int, address: str, uid: int) -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with self._places.entering(netns.EDGE)():
            sock = self._opened.enter_context(socket.create_server((address, port), family=family))
        os.fchown(sock.fileno(), uid, -1)  # as if that user had made it
        return sock

    def receive(self, port: int = PORT, address: str = "0.0.0.0", uid: int = LISTENER_UID) -> socket.socket:
        """A program of this user takes datagrams there."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with self._places.entering(netns.EDGE)():
            sock = self._opened.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        sock.setblocking(False)
        os.fchown(sock.fileno(), uid, -1)
        return sock

    def sender(self, source: str = netns.LAN_HOST) -> socket.socket:
        """A client's socket on the LAN."""
        family = socket.AF_INET6 if ":" in source else socket.AF_INET
        with self._places.entering(netns.LAN)():
            sock = self._opened.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        sock.bind((source, 0))
        sock.setblocking(False)
        return sock

    def liar(self, claimed: str) -> socket.socket:
        """One on the LAN that sends from an address of IPv6 which is not its own."""
        with self._places.entering(netns.LAN)():
            sock = self._opened.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
        sock.bind((claimed, 0))
        sock.setblocking(False)
        return sock

    def takes(
        self, client: socket.socket, server: socket.socket, address: str = "", port: int = PORT
    ) -> bool:
        """Whether a datagram of the client comes to the server, or else is dropped, which is counted."""
        is_ipv6 = client.family == socket.AF_INET6
        before = self._dropped()
        client.sendto(b"?", (address or (netns.EDGE_ADDRESS_IPV6 if is_ipv6 else netns.EDGE_ADDRESS), port))
        until_s = time.monotonic() + BOUND_S
        while not select.select([server], [], [], _LOOK_S)[0]:
            if self._dropped() > before:
                return False
            assert time.monotonic() < until_s
        server.recv(64)
        return True

    def run(
        self, *command: str, text: str = "", is_checked: bool = True
    ) -> "subprocess.CompletedProcess[str]":
        with self._places.entering(netns.EDGE)():
            return subprocess.run(
                command, input=text, capture_output=True, text=True, timeout=BOUND_S, check=is_checked
            )

    def nft(self, text: str) -> None:
        self.run("nft", "-f", "-", text=text)

    def ruleset(self) -> str:
        """All rules with their handles; ``counter`` without its numbers."""
        return self.run("nft", "-s", "-a", "list", "ruleset").stdout

    def handles(self) -> list[str]:
        """Everything that has one: tables, chains and rules, in their order."""
        return [line for line in self.ruleset().splitlines() if "# handle" in line]

    def reaches(
        self, port: int = PORT, address: str = netns.EDGE_ADDRESS, source: str = netns.LAN_HOST
    ) -> bool:
        """Whether a packet from the LAN arrives and is answered, by a connection or by a refusal.

        Or else it was dropped, which the firewall has counted: not to be answered for a while proves nothing.
        """
        with self._places.entering(netns.LAN)():
            client = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        with client:
            client.setblocking(False)
            client.bind((source, 0))
            before = self._dropped()
            assert client.connect_ex((address, port)) == errno.EINPROGRESS
            until_s = time.monotonic() + BOUND_S
            while not select.select([], [client], [], _LOOK_S)[1]:
                if self._dropped() > before:
                    return False
                assert time.monotonic() < until_s
            assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) in (0, errno.ECONNREFUSED)
        return True

    def _dropped(self) -> int:
        """What those rules have dropped that say so of themselves."""
        listing = json.loads(self.run("nft", "-j", "list", "ruleset").stdout)["nftables"]
        drops = [entry["rule"] for entry in listing if entry.get("rule", {}).get("comment") == "dropped"]
        return sum(part["counter"]["packets"] for rule in drops for part in rule["expr"] if "counter" in part)

    def reaches_by_ipv6(self) -> bool:
        return self.reaches(address=netns.EDGE_ADDRESS_IPV6, source=netns.LAN_HOST_IPV6)

    def closes(self) -> bool:
        return not self.reaches()


def becomes(condition: Callable[[], bool]) -> bool:
    """Whether it comes true, which takes as long as it takes, within the bound."""
    until_s = time.monotonic() + BOUND_S
    while not (is_true := condition()) and time.monotonic() < until_s:
        pass  # each look is a packet and its answer
    return is_true


class Program:
    """The program in sys-net, and what it tells systemd."""

    def __init__(
        self,
        edge: Edge,
        places: netns.Namespaces,
        told: socket.socket,
        before: tuple[str, ...],
        uid: int | None,
    ) -> None:
        command = [
            *before,
            sys.executable,
            "-m",
            "qubes_fwd_qrexec.firewall.keeper",
            "--config",
            str(edge.config),
        ]
        command += [] if uid is None else [f"--listener-uid={uid}"]
        with places.entering(netns.EDGE)():
            self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self._told = told
        self.first = ""

    def status(self, containing: str) -> str:
        """The next status that contains this, perhaps after others."""
        while containing not in (told := self._told.recv(4096).decode()):
            assert self.process.poll() is None, told
        return told

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        _, stderr = self.process.communicate(timeout=BOUND_S)
        return self.process.returncode, stderr
