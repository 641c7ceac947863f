# SPDX-License-Identifier: GPL-2.0-or-later
"""How the processes that serve mux calls for one socket service divide its memory.

A process alone may fill what `budget` and `socketbuffers` allow. Where there is one for each call, all of
them together may use as much as one, and what each gets is decided when it begins: the more there are, the
less. No source has more calls than it leaves to the others, nor much more memory.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from qubes_fwd_qrexec.common.errors import RefusedError
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.relay.budget import BUDGET_BYTES, STREAMS_MAX, Budget
from qubes_fwd_qrexec.relay.socketbuffers import HELD_BYTES, SHARED_BYTES, SocketMemory

from .localserver import ServiceError

# Of which the memory of one whole process has so many.
PARTS = 256
# 128 connections.
_LEAST = 2
# Beside that a process has this part of what its caller may still have: at first 1,664 connections.
_SHARE = 8
# Each is a process with 11 MiB before it carries anything.
CALLS_MAX = 32
# By which a process is told how many parts it has; without it, it has all.
VARIABLE = "QUBES_FORWARD_MEMORY_PARTS"
# Windows and buffers that are lent are less divided than what each connection needs: few large ones are fast.
LENT_TIMES = 2


class Portions:
    """What has been given out; see `taken`."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[QubeName, str]] = Counter()
        self._parts: Counter[QubeName] = Counter()

    @contextmanager
    def taken(self, caller: QubeName, argument: str) -> Iterator[int]:
        """How many parts a call of that source has, while it lives. Raises `RefusedError`.

        A second call for what a living one is for is let in as long as there is any place: by such calls
        leases are renewed.
        """
        in_use = sum(self._calls.values())
        own = sum(count for (other, _), count in self._calls.items() if other == caller)
        may_renew = self._calls[caller, argument] == 1 and in_use < CALLS_MAX
        if own >= CALLS_MAX - in_use and not may_renew:
            taken = f"{caller} has {own} of {in_use} mux calls"
            raise RefusedError(f"{taken}; of {CALLS_MAX} in all no qube has more than it leaves to others")
        # The least that each may need that is not there yet stays.
        left = PARTS - sum(self._parts.values()) - _LEAST * (CALLS_MAX - in_use)
        parts = _LEAST + max((left - self._parts[caller]) // _SHARE, 0)
        self._calls[caller, argument] += 1
        self._parts[caller] += parts
        try:
            yield parts
        finally:
            self._calls[caller, argument] -= 1
            self._parts[caller] -= parts
            self._calls, self._parts = +self._calls, +self._parts


def own_budget() -> Budget:
    """What this process may hold, by its environment. Raises `ServiceError` where that is no such number."""
    text = os.environ.get(VARIABLE, str(PARTS))
    try:
        return budget_of(int(text))
    except ValueError:
        problem = f"{VARIABLE} is {text!a}; {_LEAST} to {PARTS} would be right"
        raise ServiceError(ExitStatus.TROUBLE, problem) from None


def budget_of(parts: int) -> Budget:
    """The budget of a process with so many parts of the memory of a whole one. Raises ValueError."""
    if not _LEAST <= parts <= PARTS:
        raise ValueError(f"{parts} parts")
    lent = min(LENT_TIMES * parts, PARTS)
    sockets = SocketMemory(SHARED_BYTES * lent // PARTS, HELD_BYTES * parts // PARTS)
    return Budget(BUDGET_BYTES * lent // PARTS, STREAMS_MAX * parts // PARTS, sockets)
