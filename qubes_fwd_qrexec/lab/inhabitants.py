# SPDX-License-Identifier: GPL-2.0-or-later
"""The processes of a qube, known by a variable of their environment, and how they end with the qube.

The variable is set for what ``qvm-forward-lab run`` runs and for every service. Whatever those start
inherits it, even if it detaches itself.
"""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

# Names the directory of the process's qube.
VARIABLE = "QUBES_LAB_QUBE"
_GRACE_S = 2.0
_END_TIMEOUT_S = 60.0
_POLL_S = 0.02


def inhabitants(place: Path) -> list[int]:
    """The processes of the qube, or of every qube of the lab, whose directory is ``place``."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        lives_in = setting(int(process.name), VARIABLE)
        if lives_in is not None and (lives_in == str(place) or lives_in.startswith(f"{place}/")):
            found.append(int(process.name))
    return found


def setting(pid: int, variable: str) -> str | None:
    """What a process found in its environment; None where it has ended, or is another user's."""
    begin = f"{variable}=".encode()
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if line.startswith(begin):
                return os.fsdecode(line.removeprefix(begin))
    return None


def end_inhabitants(place: Path) -> None:
    """Ask them to end, kill after 2 s what has not, and return when none is left, or after 10 s."""
    begun = time.monotonic()
    asked: set[int] = set()
    while (left := inhabitants(place)) and time.monotonic() < begun + _END_TIMEOUT_S:
        is_patient = time.monotonic() < begun + _GRACE_S
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                if not is_patient:
                    os.kill(pid, signal.SIGKILL)
                elif pid not in asked:
                    os.kill(pid, signal.SIGTERM)
        asked.update(left)
        time.sleep(_POLL_S)
