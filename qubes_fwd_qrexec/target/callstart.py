# SPDX-License-Identifier: GPL-2.0-or-later
"""When dom0 allowed a call, as far as its target can know: when the agent's process for the call began.

The start of the service says little: before the agent starts it, it does a handshake with the calling qube,
which can delay it as long as it likes (qubes-core-qrexec agent/qrexec-agent-data.c). But the agent forks its
process when dom0's message arrives, and the service learns it from ``QREXEC_AGENT_PID``.

Times are in kernel ticks of `CLOCK_BOOTTIME`, rounded down, as in /proc. A call is refused if it is not
certain when dom0 allowed it.
"""

import os
import select
import socket
import time
from typing import NamedTuple

from qubes_fwd_qrexec.common.errors import ForwardError, TextError, why
from qubes_fwd_qrexec.common.values import parse_number

AGENT_PID_VARIABLE = "QREXEC_AGENT_PID"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# proc_pid_stat(5): starttime is field 22, and the second field, in parentheses, may hold blanks.
_START_TIME_AFTER_NAME = 22 - 3
_STAT_MAX_BYTES = 4096


class CallStartError(ForwardError):
    """It is unknown when dom0 allowed the call."""


class CallStart(NamedTuple):
    """The same moment by two clocks, of which the second stops while the machine is suspended."""

    boot_ticks: int
    monotonic_s: float


def boot_ticks() -> int:
    """The time now, in kernel ticks."""
    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * TICKS_PER_S)


def agent_pid(text: str) -> int:
    """The PID of the agent's process for a call, from its variable. Raises `CallStartError`."""
    try:
        return parse_number(text)
    except TextError:
        raise CallStartError(f"{AGENT_PID_VARIABLE} is {text!a} instead of the agent's PID") from None


def call_start(agent: int, call: socket.socket) -> CallStart:
    """When the agent's process for ``call`` began. Raises `CallStartError`, also if the call is over.

    ``agent`` is its PID. ``call`` is the socket on which it sends to us: as long as the other end is open,
    the PID still belongs to the agent's process.
    """
    try:
        with open(f"/proc/{agent}/stat", "rb", buffering=0) as file:
            text = (file.read(_STAT_MAX_BYTES) or b"").decode("ascii", "replace")
        began = int(text.rpartition(")")[2].split()[_START_TIME_AFTER_NAME])
    except (FileNotFoundError, ProcessLookupError):
        raise CallStartError(
            f"the agent's process {agent} cannot be seen, so it is unknown when dom0 allowed this call; "
            "is /proc mounted with hidepid?"
        ) from None
    except (OSError, ValueError, IndexError) as error:
        raise CallStartError(f"cannot read when the agent's process {agent} began: {why(error)}") from error
    now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    monotonic_s = time.monotonic()
    if _is_over(call):
        raise CallStartError("the call is over")
    age_s = now_s - began / TICKS_PER_S
    if age_s < 0:
        raise CallStartError(f"the agent's process {agent} begins in the future")
    # If the machine was suspended in between, this makes the lease shorter, never longer.
    return CallStart(began, monotonic_s - age_s)


def _is_over(call: socket.socket) -> bool:
    poll = select.poll()
    poll.register(call, 0)
    return bool(poll.poll(0))
