# SPDX-License-Identifier: GPL-2.0-or-later
"""When dom0 said yes to a call, as its target knows it: when the agent's process for the call began.

That the service of the call starts says little: before the agent starts it, it shakes hands with the
calling qube, which may take as long as it likes (qubes-core-qrexec agent/qrexec-agent-data.c). The agent's
process is forked when dom0's word comes. ``QREXEC_AGENT_PID`` names it to an executable service, and the
kernel to a socket service, as the peer of the connection.

It counts in the kernel's ticks of `CLOCK_BOOTTIME`, rounded down, as /proc does. Doubt is an error: a call
of which nobody knows when dom0 allowed it is refused.
"""

import os
import select
import socket
import struct
import time
from pathlib import Path
from typing import NamedTuple

from qubes_fwd_qrexec.common.errors import ForwardError, TextError, why
from qubes_fwd_qrexec.common.values import parse_number

AGENT_PID_VARIABLE = "QREXEC_AGENT_PID"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PROC = Path("/proc")
# proc_pid_stat(5): starttime is field 22, and the second field, in parentheses, may hold blanks.
_START_TIME_AFTER_NAME = 22 - 3
_STAT_MAX_BYTES = 4096
_PEER_CREDENTIALS = struct.Struct("iII")


class CallStartError(ForwardError):
    """Nobody can tell when dom0 allowed the call."""


class CallStart(NamedTuple):
    """The same moment by two clocks: the second one does not run while the machine is suspended."""

    boot_ticks: int
    monotonic_s: float


def boot_ticks() -> int:
    """Now."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS_PER_S)


def agent_pid() -> int:
    """The process of the agent that has started this one. Raises `CallStartError`."""
    text = os.environ.get(AGENT_PID_VARIABLE, "")
    try:
        return parse_number(text)
    except TextError:
        raise CallStartError(f"{AGENT_PID_VARIABLE} is {text!a}, and not the agent's process") from None


def peer_pid(call: socket.socket) -> int:
    """The process that has connected to a socket service. Raises `CallStartError`."""
    try:
        raw = call.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    except OSError as error:
        raise CallStartError(f"nobody knows who calls: {error.strerror}") from error
    return int(_PEER_CREDENTIALS.unpack(raw)[0])


def call_start(agent: int, call: socket.socket) -> CallStart:
    """When the agent's process for ``call`` began. Raises `CallStartError`, also where the call is over.

    ``call`` is the socket by which it sends to us: as long as its other end is open, the number is still that
    of the agent's process and not another one's.
    """
    try:
        with (_PROC / str(agent) / "stat").open("rb") as file:
            text = file.read(_STAT_MAX_BYTES).decode("ascii", "replace")
        began = int(text.rpartition(")")[2].split()[_START_TIME_AFTER_NAME])
    except (FileNotFoundError, ProcessLookupError):
        raise CallStartError(
            f"the agent's process {agent} cannot be seen, so nobody knows when dom0 allowed this call; "
            "is /proc mounted with hidepid?"
        ) from None
    except (OSError, ValueError, IndexError) as error:
        raise CallStartError(f"when the agent's process {agent} began: {why(error)}") from error
    now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    monotonic_s = time.monotonic()
    if _is_over(call):
        raise CallStartError("the call is over")
    age_s = now_s - began / TICKS_PER_S
    if age_s < 0:
        raise CallStartError(f"the agent's process {agent} begins in the future")
    # Where the machine was suspended in between, the lease is shorter for it and never longer.
    return CallStart(began, monotonic_s - age_s)


def _is_over(call: socket.socket) -> bool:
    poll = select.poll()
    poll.register(call, 0)
    return bool(poll.poll(0))
