# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory of processes and whose it is: anonymous pages, those that forks share counted by share (PSS).

Pages of program files are left out: all processes share them, so a connection adds none after the
first, and by PSS they would wander from whoever held them to each newcomer (a hundred Python clients
would make the listener seem to shrink by a megabyte). The kernel's own memory (socket buffers, page
tables, process structures) is in no process and not here.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qubes_fwd_qrexec.lab.agents import PROGRAM

AGENT_PROGRAM = str(PROGRAM)
_COUNTED = ("Pss_Anon:", "Pss_Shmem:")


@dataclass(frozen=True, slots=True)
class Footprint:
    """KiB. ``own``: the peer's processes, and services of ours that the broker started for it.

    ``client`` is the qrexec clients, and ``broker`` the broker with its agents' processes: all are the lab's
    stand-ins for small C programs of Qubes and for its daemons, and the same for every peer.
    """

    own: float
    client: float
    broker: float

    @property
    def total(self) -> float:
        return self.own + self.client + self.broker

    def growth(self, since: "Footprint", connections: int) -> "Footprint":
        """What each of the connections has added."""
        return Footprint(
            (self.own - since.own) / connections,
            (self.client - since.client) / connections,
            (self.broker - since.broker) / connections,
        )


def footprint(peer_pids: Sequence[int], broker_pid: int, client_program: str) -> Footprint:
    """What all processes of a peer and of the broker use now."""
    found = members(peer_pids, broker_pid, client_program)
    groups = ([*found.peer, *found.service], found.client, found.broker)
    return Footprint(*(sum(map(pss_kib, pids)) for pids in groups))


@dataclass(frozen=True, slots=True)
class Members:
    """The processes that carry a peer's connections, as `Footprint` tells them apart.

    Its own are ``peer``, the listener or socat, and ``service``, what the broker has started for it.
    """

    peer: list[int]
    service: list[int]
    client: list[int]
    broker: list[int]


def members(peer_pids: Sequence[int], broker_pid: int, client_program: str) -> Members:
    """The processes that there are now of a peer and of the broker."""
    found = Members([], [], [], [broker_pid])
    of_peer = [*peer_pids, *descendants(peer_pids)]
    for pid in [*of_peer, *descendants([broker_pid])]:
        arguments = _arguments(pid)
        if _is_client(arguments, client_program):
            found.client.append(pid)
        elif AGENT_PROGRAM in arguments:
            found.broker.append(pid)
        else:
            (found.peer if pid in of_peer else found.service).append(pid)
    return found


def descendants(pids: Iterable[int]) -> list[int]:
    """The processes that these have started, and that those have started in turn."""
    children: dict[int, list[int]] = defaultdict(list)
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and (parent := _parent(path)) is not None:
            children[parent].append(int(path.name))
    found: list[int] = []
    waiting = list(pids)
    while waiting:
        below = children[waiting.pop()]
        found += below
        waiting += below
    return found


def open_files(pid: int) -> int:
    """How many file descriptors a process has; 0 if it has ended."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def pss_kib(pid: int) -> float:
    """A process's share of the anonymous memory that it uses; 0 if it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return 0.0
    return sum(float(line.split()[1]) for line in text.splitlines() if line.startswith(_COUNTED))


def _parent(process: Path) -> int | None:
    try:
        text = (process / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name in parentheses may hold anything; the state and the parent follow the last one.
    return int(text.rpartition(")")[2].split()[1])


def is_agent(pid: int) -> bool:
    """Whether it is one of the lab's agents' processes, or the one that forks them."""
    return AGENT_PROGRAM in _arguments(pid)


def _arguments(pid: int) -> list[str]:
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")
    except OSError:
        return []


def _is_client(arguments: list[str], client_program: str) -> bool:
    """By its arguments, whole: socat and the listener have the client's name in theirs as well."""
    return client_program in arguments[:4] and not any(word.startswith("EXEC:") for word in arguments)
