# SPDX-License-Identifier: GPL-2.0-or-later
"""Telling the service manager how we are, by sd_notify(3): a datagram to the socket it names, if any."""

import contextlib
import os
import socket
import time

# A manager that takes nothing for so long is not told: what we do is more than what is said of it.
_PATIENCE_S = 1.0


def notify(*assignments: str) -> None:
    """Send ``READY=1``, ``STOPPING=1``, ``STATUS=...``; does nothing where nobody asked to be told."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith("@"):
        address = "\0" + address[1:]
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(_PATIENCE_S)
        sock.sendto("\n".join(assignments).encode(), address)


def reloading() -> tuple[str, str]:
    """What says that a reload has begun; ``READY=1`` then says that it is over (sd_notify(3))."""
    return "RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"
