# SPDX-License-Identifier: GPL-2.0-or-later
"""Which streams of a mux call may have what others need, so that they are looked at once a second.

A look asks the kernel what it holds. Tens of thousands of streams that are idle would take a third of every
second, so one that was seen to have nothing is left alone until it has moved something.
"""

import math
from collections.abc import Iterable
from typing import Final, Protocol, TypeVar

from .budget import Share

FLOORS: Final = 0
"""What a stream was seen to have: its floors alone,"""
LENT: Final = 1
"""more credit or larger buffers than that,"""
BYTES: Final = 2
"""bytes that wait, or that may arrive without being read at once."""


class Looked(Protocol):
    """A stream. ``moved_at``: when its bytes last moved (`time.monotonic`); ``seen`` is one of the above."""

    moved_at: float
    seen: int


AnyLooked = TypeVar("AnyLooked", bound=Looked)


class Looks:
    """Remembers when it was last looked; times are those of `time.monotonic`."""

    __slots__ = ("_looked_at",)

    def __init__(self) -> None:
        self._looked_at = -math.inf

    def due(self, streams: Iterable[AnyLooked], share: Share, now: float) -> list[AnyLooked]:
        """Those to look at now, if memory is short or crowded."""
        if not share.is_watched:
            return []
        since, self._looked_at = self._looked_at, now
        least = LENT if share.is_short or share.sockets.is_short else BYTES
        return [stream for stream in streams if stream.moved_at >= since or stream.seen >= least]
