# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes with a note, as the mux calls of a target are, and the place where their notes lie."""

import os
import subprocess
import sys
import time
from pathlib import Path

from bounds import BOUND_S

from qubes_fwd_qrexec.common.allowance import Calls
from qubes_fwd_qrexec.common.values import QubeName, TargetPorts
from qubes_fwd_qrexec.target.callnotes import Kind, Note, living
from qubes_fwd_qrexec.target.callstart import CallStart, boot_ticks

PORTS, SOURCE = TargetPorts(8080, 8090), QubeName("sys-net")
MINE = Calls(PORTS, SOURCE)
OTHER_PORTS = Calls(TargetPorts(8080, 8089), SOURCE)
OTHER_SOURCE = Calls(PORTS, QubeName("work"))
_CALL = """\
import signal, sys
from pathlib import Path
from qubes_fwd_qrexec.common.allowance import Calls
from qubes_fwd_qrexec.target.callnotes import Kind
from qubes_fwd_qrexec.target.callstart import CallStart, boot_ticks
from qubes_fwd_qrexec.relay.loop import READ, Loop
from qubes_fwd_qrexec.target.permissionwatch import PermissionWatch, called_on_signals
from qubes_fwd_qrexec.target.revocation import LOOK, permitted
import time
kind, calls, place, obeys = sys.argv[1:]
loop = Loop()
if obeys != "yes":
    signal.signal(LOOK, signal.SIG_IGN)
start = CallStart(boot_ticks(), time.monotonic())
with permitted(Kind(kind), Calls.parse(calls), start, Path(place)) as held:
    watch = PermissionWatch(loop, held, lambda: sys.exit(7), end=lambda: sys.exit(8))
    with called_on_signals(loop, {LOOK: watch.look} if obeys == "yes" else {}, lambda: sys.exit(8)):
        print("noted", flush=True)
        loop.watch(0, READ, lambda _: sys.exit(0), lambda: sys.exit(8))
        while True:
            loop.run_once()
"""
ENDED = 7


class Call:
    """A process with a note, which ends when its stdin does, or when dom0 does not allow it any more."""

    def __init__(
        self, place: Path, calls: Calls = MINE, kind: Kind = Kind.MUX, *, obeys: bool = True
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CALL, kind, str(calls), str(place), "yes" if obeys else "no"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"noted\n"
        self.calls, self.place = calls, place

    def __enter__(self) -> "Call":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    @property
    def note(self) -> Note:
        (note,) = [note for note in living(self.place) if note.pid == self.process.pid]
        return note

    @property
    def status(self) -> int:
        return self.process.wait(BOUND_S)

    @property
    def lives(self) -> bool:
        return self.process.poll() is None


def just_now() -> CallStart:
    return CallStart(boot_ticks(), time.monotonic())


def after_a_tick() -> None:
    """Until what begins now is later than what was before, as the kernel counts."""
    ticks = boot_ticks()
    while boot_ticks() == ticks:
        os.sched_yield()


def names(place: Path) -> list[str]:
    """All that lies there but the marks of what was allowed, and the list."""
    return sorted(p.name for p in place.iterdir() if not p.name.startswith("allow"))


def spoil_mode(place: Path) -> None:
    place.mkdir()
    place.chmod(0o770)
