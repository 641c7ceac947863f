# SPDX-License-Identifier: GPL-2.0-or-later
"""Counters against a peer whose frames are legal one by one and an attack together.

Neither has a clock: the first counts what ended streams leave behind, the second counts per `tick`.
"""

from itertools import islice

from qubes_fwd_qrexec.common.errors import RemoteProtocolError

from .limits import MIN_CREDIT_BYTES, RAPID_RESETS_PER_TICK


class LateFrames:
    """What the peer may still send on streams that are over here, because it crossed our EOF.

    It keeps sums over all streams instead of a record for each one: a stream that ended well entitles the
    peer to one RESET, one RECALL and as much CREDIT as its window had room for.
    """

    __slots__ = ("_credit", "_recalls", "_resets")

    def __init__(self) -> None:
        self._credit = 0
        self._recalls = 0
        self._resets = 0

    def expect(self, credit: int) -> None:
        """A stream ended with both EOFs, and its window had room for ``credit`` more bytes."""
        self._credit += credit
        self._recalls += 1
        self._resets += 1

    def take_credit(self, stream_id: int, increment: int) -> None:
        """A CREDIT came for a stream that is over. Raises RemoteProtocolError if it cannot just be late."""
        if not MIN_CREDIT_BYTES <= increment <= self._credit:
            raise RemoteProtocolError(f"CREDIT on stream {stream_id}, which is over")
        self._credit -= increment

    def take_recall(self, stream_id: int) -> None:
        """A RECALL came for a stream that is over. Raises RemoteProtocolError if it cannot just be late."""
        if not self._recalls:
            raise RemoteProtocolError(f"RECALL on stream {stream_id}, which is over")
        self._recalls -= 1

    def take_reset(self, stream_id: int) -> None:
        """A RESET came for a stream that is over. Raises RemoteProtocolError if it cannot just be late."""
        if not self._resets:
            raise RemoteProtocolError(f"RESET on stream {stream_id}, which is over")
        self._resets -= 1


class RapidResets:
    """Streams that the listener side opened and reset within one tick, and the answers held back for them.

    Holding back the answer keeps the slot taken. So a peer that opens and resets too fast runs out of slots:
    if it keeps to the limit of streams it is slowed down, and if it does not that is a violation. Ending the
    mux because of the rate alone would let any client that connects and aborts quickly cut off all others.
    """

    __slots__ = ("_answered", "_withheld", "tick")

    def __init__(self) -> None:
        self.tick = 0
        self._answered = 0
        # A dict for its order; it is as long as there are slots at most.
        self._withheld: dict[int, None] = {}

    def may_answer(self, stream_id: int, opened_tick: int) -> bool:
        """Whether to answer the RESET of a stream that was opened in that tick now.

        If not, a later `next_tick` returns the stream.
        """
        if stream_id in self._withheld:
            return False
        if opened_tick != self.tick:
            return True
        if self._answered < RAPID_RESETS_PER_TICK:
            self._answered += 1
            return True
        self._withheld[stream_id] = None
        return False

    def next_tick(self) -> list[int]:
        """Return the streams whose RESET is to be answered now, oldest first; called once a second."""
        self.tick += 1
        due = list(islice(self._withheld, RAPID_RESETS_PER_TICK))
        for stream_id in due:
            del self._withheld[stream_id]
        self._answered = len(due)
        return due

    def forget(self) -> None:
        """The mux is over: answer nothing any more."""
        self._withheld.clear()
