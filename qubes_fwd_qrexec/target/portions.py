# SPDX-License-Identifier: GPL-2.0-or-later
"""How the processes that serve mux calls for one socket service divide its memory.

A single process may use all that `budget` and `socketbuffers` allow. With one process for each call, all of
them together may use as much as one. What each gets is decided when it begins: the more there are, the less.
No caller has more calls than it leaves to the others, nor much more memory.
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

# The memory of a single process has so many parts.
PARTS = 256
# The least that a process gets: 128 connections.
_LEAST = 2
# In addition it gets 1/_SHARE of what its caller may still have: at first 1,664 connections.
_SHARE = 8
# Each is a process that takes 11 MiB before it carries anything.
CALLS_MAX = 32
# Says how many parts a process has; without it, it has all.
VARIABLE = "QUBES_FORWARD_MEMORY_PARTS"
# Lent windows and buffers are divided less than what each connection needs: a few large ones are fast.
LENT_TIMES = 2


class Portions:
    """The parts that live calls have; see `taken`."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[QubeName, str]] = Counter()
        self._parts: Counter[QubeName] = Counter()

    @contextmanager
    def taken(self, caller: QubeName, argument: str) -> Iterator[int]:
        """Take parts for a call for as long as the block runs; yields how many. Raises `RefusedError`.

        A second call with the same caller and argument is let in as long as there is any room, because such
        calls renew leases.
        """
        in_use = sum(self._calls.values())
        own = sum(count for (other, _), count in self._calls.items() if other == caller)
        may_renew = self._calls[caller, argument] == 1 and in_use < CALLS_MAX
        if own >= CALLS_MAX - in_use and not may_renew:
            taken = f"{caller} has {own} of {in_use} mux calls"
            raise RefusedError(f"{taken}; of {CALLS_MAX} in all no qube has more than it leaves to others")
        # The least that future calls may need is reserved.
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
    """The budget of this process, from its environment. Raises `ServiceError` if that is invalid."""
    text = os.environ.get(VARIABLE, str(PARTS))
    try:
        return budget_of(int(text))
    except ValueError:
        problem = f"{VARIABLE} is {text!a}; {_LEAST} to {PARTS} would be right"
        raise ServiceError(ExitStatus.TROUBLE, problem) from None


def budget_of(parts: int) -> Budget:
    """The budget of a process that has ``parts`` of the memory. Raises ValueError."""
    if not _LEAST <= parts <= PARTS:
        raise ValueError(f"{parts} parts")
    lent = min(LENT_TIMES * parts, PARTS)
    sockets = SocketMemory(SHARED_BYTES * lent // PARTS, HELD_BYTES * parts // PARTS)
    return Budget(BUDGET_BYTES * lent // PARTS, STREAMS_MAX * parts // PARTS, sockets)
