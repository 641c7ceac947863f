# SPDX-License-Identifier: GPL-2.0-or-later
"""The figures of a forward while it is open, at no cost where bytes move.

The transport counts the bytes of each connection anyway. They are read from there while it lives, and added
up when it ends.
"""

import time
from collections.abc import Callable
from typing import Protocol

from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.common.report import Way

# The refusals that show what is wrong on the way to the target, until a connection gets through again.
WAYS: dict[str, Way] = {
    Refusal.POLICY: Way.REFUSED,
    Refusal.NO_SERVICE: Way.NO_SERVICE,
    Refusal.NO_CALL: Way.FAILED,
}


class Measured(Protocol):
    """Something that counts the bytes it moves, perhaps in another thread."""

    @property
    def sent(self) -> int: ...

    @property
    def received(self) -> int: ...

    @property
    def moved_at(self) -> float:
        """When it last moved any (`time.monotonic`)."""

    @property
    def is_joined(self) -> bool:
        """Whether the server in the target is known to have taken the connection."""


class Carried:
    """One connection; ``by`` is what moves its bytes, once something does.

    Its figures may be read in any thread, so each reads ``by`` once: the loop's thread may change it.
    """

    __slots__ = ("by", "since")

    def __init__(self, since: float) -> None:
        self.since = since
        self.by: Measured | None = None

    @property
    def sent(self) -> int:
        """Bytes from the client."""
        by = self.by
        return 0 if by is None else by.sent

    @property
    def received(self) -> int:
        """Bytes to the client."""
        by = self.by
        return 0 if by is None else by.received

    @property
    def moved_at(self) -> float:
        """When bytes last moved, or it began (`time.monotonic`)."""
        by = self.by
        return self.since if by is None else by.moved_at

    @property
    def is_joined(self) -> bool:
        """Whether the server in the target is known to have taken it."""
        by = self.by
        return by is not None and by.is_joined


class Counters:
    """The figures of one forward since ``since`` (UNIX seconds); for the loop's thread alone."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.since = clock()
        self.total = 0
        """How many connections were let in, however they ended."""
        self.sent = self.received = 0
        """Bytes from and to the clients of connections that have ended."""
        self.refusals: dict[str, int] = {}
        self.last_error: tuple[str, float] | None = None
        """What went wrong last, and when (UNIX seconds)."""

    def closed(self, carried: Carried) -> None:
        """A connection has ended."""
        self.sent += carried.sent
        self.received += carried.received

    def refused(self, reason: str) -> None:
        self.refusals[reason] = self.refusals.get(reason, 0) + 1

    def failed(self, text: str) -> None:
        self.last_error = text, self._clock()
