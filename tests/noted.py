# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes with a note, as the tunnels of a target are, and the place where their notes lie."""

import subprocess
import sys
from pathlib import Path

from qubes_fwd_qrexec.values import QubeName, TargetPorts

PORTS, SOURCE = TargetPorts(8080, 8090), QubeName("sys-net")
BOUND_S = 60.0
_TUNNEL = """\
import sys
from pathlib import Path
from qubes_fwd_qrexec.revocation import noted
from qubes_fwd_qrexec.values import TargetPorts
with noted(TargetPorts.parse(sys.argv[1]), sys.argv[2], Path(sys.argv[3])):
    print("noted", flush=True)
    sys.stdin.read()
"""


class Tunnel:
    """A process with a note, which ends when its stdin does."""

    def __init__(self, place: Path, ports: TargetPorts = PORTS, source: str = SOURCE) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _TUNNEL, str(ports), source, str(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"noted\n"
        self.note = place / f"{ports}+{source}+{self.process.pid}"

    def __enter__(self) -> "Tunnel":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    @property
    def status(self) -> int:
        return self.process.wait(BOUND_S)

    @property
    def lives(self) -> bool:
        return self.process.poll() is None


def names(place: Path) -> list[str]:
    """All that lies there but the marks of what was revoked and allowed."""
    return sorted(p.name for p in place.iterdir() if not p.name.startswith(("revoked+", "allowed+")))


def spoil_mode(place: Path) -> None:
    place.mkdir()
    place.chmod(0o770)
