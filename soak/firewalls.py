# SPDX-License-Identifier: GPL-2.0-or-later
"""The firewall's program in each qube of a path, and what it is told; it is asked as dom0 asks it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.memory import descendants, open_files, pss_kib
from bench.processes import BenchError, Child
from bench.road import Road
from qubes_fwd_qrexec.common.nftconfig import NftConfig
from qubes_fwd_qrexec.common.nftreport import NftReport
from qubes_fwd_qrexec.firewall.ask import ask
from qubes_fwd_qrexec.firewall.asked import ASK
from qubes_fwd_qrexec.firewall.cutting import HELD_FLOWS_S
from qubes_fwd_qrexec.firewall.inforce import IN_FORCE
from qubes_fwd_qrexec.firewall.tables import OWN
from qubes_fwd_qrexec.system import conntrack
from qubes_fwd_qrexec.system.conntrack import Connection

_MODULE = "qubes_fwd_qrexec.firewall.keeper"
# Far more than it takes on a machine that is not busy.
_READY_S = 120.0
_LOOK_S = 0.02
_ANSWER_S = 120.0
_PROGRAM_S = 120.0
# How far the end of a guard may be ahead; it is rounded up to a whole hour.
_GUARD_S = HELD_FLOWS_S + 3600


class Firewall:
    """One qube's. Each method blocks, until what it says is done."""

    def __init__(self, road: Road, qube: str, directory: Path) -> None:
        self.qube = qube
        self._road = road
        self._config = directory / f"{qube}.config"
        self._place = directory / f"{qube}.run"
        self._hidden = directory / f"{qube}.hidden"
        self._log = directory / f"{qube}.log"
        self._config.mkdir()
        self._place.mkdir()
        self._child: Child | None = None

    def start(self) -> None:
        """Start the program, and wait until it answers. Raises `BenchError`."""
        command = [sys.executable, "-m", _MODULE, "--config", str(self._config)]
        with self._road.within(self.qube):
            self._child = Child(
                f"firewall of {self.qube}", ["env", f"RUNTIME_DIRECTORY={self._place}", *command], self._log
            )
        deadline = time.monotonic() + _READY_S
        while True:
            try:
                ask(self._place / ASK, _ANSWER_S)
                return
            except OSError as error:
                if time.monotonic() > deadline or self._child.has_ended(_LOOK_S):
                    raise self._child.failure(f"not ready: {error}") from error

    def end(self, number: int = signal.SIGTERM) -> None:
        """End it by a signal. Raises `BenchError` if it does not end."""
        child, self._child = self._child, None
        if child is None:
            return
        os.kill(child.pid, number)
        has_ended = child.has_ended(_READY_S)
        child.end()
        if not has_ended:
            raise child.failure("does not end")

    def put(self, config: NftConfig) -> None:
        """Tell it of a forward, at once and whole, as QubesDB does."""
        self._hidden.write_text(f"{config}\n", encoding="ascii")
        self._hidden.rename(self._config / config.key)

    def remove(self, config: NftConfig) -> None:
        (self._config / config.key).unlink(missing_ok=True)

    def report(self) -> NftReport:
        """What it says is in force. Raises OSError."""
        return NftReport.parse(ask(self._place / ASK, _ANSWER_S))

    def size(self) -> tuple[int, float]:
        """The program's open files, and its memory in KiB, when no ``nft`` works for it: pipes do not count.

        Raises `BenchError` if that does not end.
        """
        if self._child is None:
            return 0, 0.0
        pid, deadline = self._child.pid, time.monotonic() + _PROGRAM_S
        while time.monotonic() < deadline:
            if not descendants((pid,)):
                found = open_files(pid), pss_kib(pid)
                # Pipes are made before the program that uses them.
                if not descendants((pid,)):
                    return found
            time.sleep(_LOOK_S)
        raise self._child.failure("does not end its nft")

    def failures(self) -> list[str]:
        """What a program that works would not have written."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return [f"{self.qube}: {line}" for line in lines if "Traceback" in line or "Error:" in line]

    # What is left over

    def left_rules(self) -> list[str]:
        """What the firewall has of ours, but for guards that will be over."""
        now = time.time()
        return [
            f"{self.qube}: {entry}"
            for entry in self._listed()
            if not _is_guards(entry, now) and (entry.get("table") == OWN or OWN in json.dumps(entry))
        ]

    def left_connections(self, first: int, last: int) -> int:
        """How many connections to one of our ports the kernel has that were sent on; they are gone then."""

        def is_ours(connection: Connection) -> bool:
            return first <= connection.destination_port <= last

        with self._road.within(self.qube):
            return sum(conntrack.delete(version, is_ours, sent_on=True) for version in (4, 6))

    def left_files(self) -> list[str]:
        """Files that should not be there, or have something in them that should not."""
        left = [str(path) for path in self._config.iterdir()]
        for path in self._place.iterdir():
            if path.name.startswith(".") or path.name == ASK:
                left.append(str(path))
        remembered = self._place / IN_FORCE
        if remembered.exists() and remembered.read_text(encoding="ascii"):
            left.append(str(remembered))
        return left

    def _listed(self) -> list[dict[str, Any]]:
        listing = json.loads(self._run("nft", "-j", "-s", "list", "ruleset"))["nftables"]
        return [{"what": what, **entry} for one in listing for what, entry in one.items()]

    def _run(self, *command: str) -> str:
        with self._road.within(self.qube):
            done = subprocess.run(command, capture_output=True, text=True, timeout=_PROGRAM_S, check=False)
        if done.returncode != 0:
            raise BenchError(f"{self.qube}: {' '.join(command)}: {done.stderr}")
        return done.stdout


def _guard_until(entry: dict[str, Any]) -> float | None:
    """When a rule of a guard is over; None for anything else."""
    word, until, *_ = [*str(entry.get("comment", "")).split(), "", ""]
    return float(until) if entry["what"] == "rule" and word == "until" else None


def _is_guards(entry: dict[str, Any], now_s: float) -> bool:
    """Whether it is a guard, or what a guard needs: its table, chains, and the set of flows it holds."""
    if entry.get("table", entry.get("name")) != OWN:
        return False
    if entry["what"] != "rule":
        return entry["what"] in ("table", "chain", "set")
    until = _guard_until(entry)
    is_jump = entry.get("comment", "").split()[:1] == [OWN] and "jump" in json.dumps(entry)
    return is_jump or (until is not None and until <= now_s + _GUARD_S)
