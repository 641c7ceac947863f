# SPDX-License-Identifier: GPL-2.0-or-later
"""What a forward counts while it is open, without any cost where bytes move.

Who carries a connection counts its bytes anyway; they are read from there while it lives, and added up
when it ends.
"""

import time
from collections.abc import Callable
from typing import Protocol

from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.common.report import Way

# What of it tells how the way to the target is, until a connection comes through again.
WAYS: dict[str, Way] = {
    Refusal.POLICY: Way.REFUSED,
    Refusal.NO_SERVICE: Way.NO_SERVICE,
    Refusal.NO_CALL: Way.FAILED,
}


class Measured(Protocol):
    """What knows how many bytes it has moved; another thread may be counting on."""

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
    """One connection; ``by`` is what moves its bytes, once there is such."""

    __slots__ = ("by", "since")

    def __init__(self, since: float) -> None:
        self.since = since
        self.by: Measured | None = None

    @property
    def sent(self) -> int:
        """Bytes from the client."""
        return 0 if self.by is None else self.by.sent

    @property
    def received(self) -> int:
        """Bytes to the client."""
        return 0 if self.by is None else self.by.received

    @property
    def moved_at(self) -> float:
        """When bytes last moved, or it began (`time.monotonic`)."""
        return self.since if self.by is None else self.by.moved_at


class Counters:
    """The figures of one forward since ``since`` (UNIX seconds). It belongs to trio's thread."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.since = clock()
        self.total = 0
        """Connections that were let in, whatever became of them."""
        self.refusals: dict[str, int] = {}
        self.last_error: tuple[str, float] | None = None
        """What went wrong last, and when."""
        self._live: set[Carried] = set()
        self._sent = self._received = 0

    @property
    def connections(self) -> int:
        return len(self._live)

    @property
    def sent(self) -> int:
        """Bytes from clients, those of live connections too."""
        return self._sent + sum(carried.sent for carried in self._live)

    @property
    def received(self) -> int:
        return self._received + sum(carried.received for carried in self._live)

    def opened(self, carried: Carried) -> None:
        """A connection was let in; `closed` must follow."""
        self.total += 1
        self._live.add(carried)

    def closed(self, carried: Carried) -> None:
        self._live.discard(carried)
        self._sent += carried.sent
        self._received += carried.received

    def refused(self, reason: str) -> None:
        self.refusals[reason] = self.refusals.get(reason, 0) + 1

    def failed(self, text: str) -> None:
        self.last_error = text, self._clock()
