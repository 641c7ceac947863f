# SPDX-License-Identifier: GPL-2.0-or-later
"""Counters against a peer whose every frame is legal and whose frames together are an attack.

None of them knows a clock: the first lives on what streams left behind, the second on `tick`.
"""

from qubes_fwd_qrexec.errors import RemoteProtocolError

from .limits import MIN_CREDIT_BYTES, RAPID_RESET_SLACK, RAPID_RESETS_PER_TICK


class LateFrames:
    """What the peer may still send on streams that are over here, because it crossed our EOF.

    Two sums for all streams rather than a record of each: a stream that ended well leaves a right to one
    RESET and to as much CREDIT as its window had room for.
    """

    __slots__ = ("_credit", "_resets")

    def __init__(self) -> None:
        self._credit = 0
        self._resets = 0

    def expect(self, credit: int) -> None:
        """A stream ended with both EOFs, and its window had that much room."""
        self._credit += credit
        self._resets += 1

    def take_credit(self, stream_id: int, increment: int) -> None:
        """A CREDIT came for a stream that is over. Raises RemoteProtocolError if it cannot be late."""
        if not MIN_CREDIT_BYTES <= increment <= self._credit:
            raise RemoteProtocolError(f"CREDIT on stream {stream_id}, which is over")
        self._credit -= increment

    def take_reset(self, stream_id: int) -> None:
        """A RESET came for a stream that is over. Raises RemoteProtocolError if it cannot be late."""
        if not self._resets:
            raise RemoteProtocolError(f"RESET on stream {stream_id}, which is over")
        self._resets -= 1


class RapidResets:
    """Streams that the listener side opened and reset within one tick."""

    __slots__ = ("_count", "tick")

    def __init__(self) -> None:
        self.tick = 0
        self._count = 0

    def next_tick(self) -> None:
        """A second has passed."""
        self.tick += 1
        self._count = 0

    def add(self, opened_tick: int) -> None:
        """A stream that was opened in that tick was reset now."""
        if opened_tick == self.tick:
            self._count += 1

    @property
    def may_open(self) -> bool:
        """For the listener side: whether its own allowance lasts."""
        return self._count < RAPID_RESETS_PER_TICK

    def check(self, max_streams: int) -> None:
        """For the target side: raises RemoteProtocolError for more than a listener side can cause.

        That one stops opening at its allowance, but the streams that it has then may all be reset yet.
        """
        if self._count > RAPID_RESET_SLACK * (RAPID_RESETS_PER_TICK + max_streams):
            raise RemoteProtocolError(f"{self._count} streams were opened and reset within one tick")
