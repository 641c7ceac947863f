# SPDX-License-Identifier: GPL-2.0-or-later
"""Notifying the service manager (sd_notify(3)): a datagram to the socket that it names, if any."""

import contextlib
import os
import socket
import time

# A manager that takes nothing for so long is not notified: our work is more important.
_PATIENCE_S = 1.0


def notify(*assignments: str) -> None:
    """Send ``READY=1``, ``STOPPING=1``, ``STATUS=...``; does nothing without a service manager.

    It blocks for at most a second, and ignores errors.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith("@"):
        address = "\0" + address[1:]
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(_PATIENCE_S)
        sock.sendto("\n".join(assignments).encode(), address)


def reloading() -> tuple[str, str]:
    """The assignments that announce a reload, which ``READY=1`` ends (sd_notify(3))."""
    return "RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}"
