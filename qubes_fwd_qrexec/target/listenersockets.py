# SPDX-License-Identifier: GPL-2.0-or-later
"""How services that dom0 calls ask the listener of this qube, at its UNIX sockets."""

import os
from pathlib import Path

from qubes_fwd_qrexec.common.document import REPORT_MAX_BYTES
from qubes_fwd_qrexec.system import unixsockets

# RuntimeDirectory= of the listener's unit; a lab sets another one.
LISTENER_DIRECTORY = "/run/qubes-forward-listener"
LISTENER_DIRECTORY_VARIABLE = "QUBES_FORWARD_LISTENER_DIR"
STATUS, CLIENTS, TRY, CUT = "status.sock", "clients.sock", "try.sock", "cut.sock"
NONE_RUNS = "no listener is running"
# A trial takes at most 3 s.
LISTENER_TIMEOUT_S = 4.0


def listener_directory() -> Path:
    return Path(os.environ.get(LISTENER_DIRECTORY_VARIABLE, LISTENER_DIRECTORY))


def ask(path: Path, request: bytes = b"") -> bytes:
    """What the listener says at one of its sockets. Raises OSError."""
    return unixsockets.ask(path, request, LISTENER_TIMEOUT_S, REPORT_MAX_BYTES)
