# SPDX-License-Identifier: GPL-2.0-or-later
"""The figures of a forward of UDP while it is open."""

import time
from collections.abc import Callable
from enum import StrEnum

from qubes_fwd_qrexec.common.document import NUMBER_MAX


class Dropped(StrEnum):
    """Why datagrams were dropped."""

    FULL = "full"
    """A queue in this qube had no room."""
    OLD = "old"
    """They had waited in it for too long."""
    LATE = "late"
    """They came from the target when their flow had ended here."""
    KERNEL = "kernel"
    """The socket's receive buffer had no room: they came faster than this program reads."""
    TOO_LONG = "too-long"
    """Longer than a datagram over IPv4 may be."""
    TO_MANY = "to-many"
    """Sent by broadcast or multicast."""
    NO_CALL = "no-call"
    """There was no call to the target in time."""
    REFUSED = "refused"
    """Their flow had been refused just before."""
    UNSENT = "unsent"
    """The kernel did not send them to the client."""
    TARGET = "target"
    """The target says that it dropped them, in either direction."""


class FlowCounters:
    """The figures since ``since`` (UNIX seconds). The loop's thread writes them, and any thread may read."""

    __slots__ = (
        "__weakref__",
        "_clock",
        "datagrams_received",
        "datagrams_sent",
        "drops",
        "last_error",
        "received",
        "refusals",
        "sent",
        "since",
        "total",
    )

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self.since = clock()
        self.total = 0
        """How many flows were let in, however they ended."""
        self.sent = self.received = 0
        """Bytes from clients, and to them."""
        self.datagrams_sent = self.datagrams_received = 0
        self.refusals: dict[str, int] = {}
        """How many datagrams began no flow, and how many flows had to end, by reason."""
        self.drops: dict[Dropped, int] = {}
        self.last_error: tuple[str, float] | None = None
        """What went wrong last, and when (UNIX seconds)."""

    def refused(self, reason: str) -> None:
        self.refusals[reason] = self.refusals.get(reason, 0) + 1

    def dropped(self, reason: Dropped, datagrams: int) -> None:
        if datagrams:
            # A target may say any number, and dom0 refuses a report as a whole that has too large a one.
            self.drops[reason] = min(self.drops.get(reason, 0) + datagrams, NUMBER_MAX)

    def failed(self, text: str) -> None:
        self.last_error = text, self._clock()
