# SPDX-License-Identifier: GPL-2.0-or-later
"""Processor time of processes and whose it is, in seconds. Other work of the machine hardly moves it."""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

from .memory import Members

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# Of /proc/PID/stat after the name: the times of children that have ended and were waited for.
_CUTIME, _CSTIME = 13, 14


@dataclass(frozen=True, slots=True)
class Usage:
    """``peer``, ``service``, ``client`` and ``broker`` are the processes that run, as in `Members`.

    ``ended`` is what processes of all four have used that have ended, in steps of 10 ms; ``ends`` the load
    and the server.
    """

    peer: float
    service: float
    client: float
    broker: float
    ended: float
    ends: float

    @property
    def between(self) -> float:
        """All that is between load and server."""
        return self.peer + self.service + self.client + self.broker + self.ended

    def since(self, before: "Usage") -> "Usage":
        """What was used between the two."""
        return Usage(*(getattr(self, part.name) - getattr(before, part.name) for part in fields(self)))

    def each(self, count: int) -> "Usage":
        """A part of it."""
        return Usage(*(getattr(self, part.name) / count for part in fields(self)))


def usage(found: Members, ends: Iterable[int]) -> Usage:
    """What they, load and server have used until now."""
    groups = (found.peer, found.service, found.client, found.broker)
    ended = sum(_ended_s(pid) for pids in groups for pid in pids)
    peer, service, client, broker = (sum(map(used_s, pids)) for pids in groups)
    return Usage(peer, service, client, broker, ended, sum(map(used_s, ends)))


def used_s(pid: int) -> float:
    """What a process has used with all of its threads; 0 if it has ended."""
    try:
        # Its clock as clock_getcpuclockid(3) makes it, which Python does not have.
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


def _ended_s(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0.0
    after_name = text.rpartition(")")[2].split()
    return (int(after_name[_CUTIME]) + int(after_name[_CSTIME])) / _TICKS_PER_S
