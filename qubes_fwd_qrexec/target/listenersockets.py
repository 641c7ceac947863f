# SPDX-License-Identifier: GPL-2.0-or-later
"""How services that dom0 calls ask the listener of this qube, at its UNIX sockets."""

import contextlib
import os
import socket
import time
from pathlib import Path

from qubes_fwd_qrexec.common.document import REPORT_MAX_BYTES
from qubes_fwd_qrexec.system.unixsockets import socket_address

# RuntimeDirectory= of the listener's unit; a lab sets another one.
LISTENER_DIRECTORY = "/run/qubes-forward-listener"
LISTENER_DIRECTORY_VARIABLE = "QUBES_FORWARD_LISTENER_DIR"
STATUS, CLIENTS, TRY, CUT = "status.sock", "clients.sock", "try.sock", "cut.sock"
NONE_RUNS = "no listener is running"
# A trial takes at most 3 s.
LISTENER_TIMEOUT_S = 4.0


def listener_directory() -> Path:
    return Path(os.environ.get(LISTENER_DIRECTORY_VARIABLE, LISTENER_DIRECTORY))


def ask(path: Path, request: bytes, timeout_s: float) -> bytes:
    """Send a request and read everything until the other end closes, up to just over `REPORT_MAX_BYTES`.

    Raises OSError.
    """
    deadline = time.monotonic() + timeout_s
    received = bytearray()
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as sock:
        sock.settimeout(timeout_s)
        with socket_address(path) as address:
            sock.connect(address)
        if request:  # without one the answer comes at once, and the other end may be closed already
            sock.sendall(request)
        while len(received) <= REPORT_MAX_BYTES:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            if not (more := sock.recv(65536)):
                break
            received += more
    return bytes(received)
