# SPDX-License-Identifier: GPL-2.0-or-later
"""The arithmetic of credit, and nothing else: how much may be sent, and how much the peer may send.

Credit is counted in bytes. A DATA frame costs its payload plus FRAME_COST_BYTES.
"""

from qubes_fwd_qrexec.common.errors import RemoteProtocolError

from .limits import FRAME_COST_BYTES, MAX_DATA_BYTES, MIN_CREDIT_BYTES


def first_cost(first: bytes) -> int:
    """What the first bytes of a stream cost in OPEN: as much as DATA, if there are any."""
    return len(first) + FRAME_COST_BYTES if first else 0


class Credit:
    """One stream's credit in both directions; one object, since thousands are held.

    ``available`` is how much this end may still send. ``outstanding`` is what the peer knows it may send, and
    ``held`` was granted to it here but not sent yet: a CREDIT frame for each small read of the consumer would
    cost more than the read.
    """

    __slots__ = ("_is_recalled", "_keep", "_was_recalled", "available", "held", "outstanding")

    def __init__(self, available: int, outstanding: int) -> None:
        self.available = available
        # Whether the peer has asked for credit back since it last gave some.
        self._was_recalled = False
        self.outstanding = outstanding
        self.held = 0
        # What the peer may keep, while a RECALL is unanswered; and whether no CREDIT was sent since.
        self._keep = 0
        self._is_recalled = False

    # What this end may send

    @property
    def sendable_bytes(self) -> int:
        """The longest payload that one DATA frame may have now; 0 if none may be sent."""
        room = self.available - FRAME_COST_BYTES
        return 0 if room <= 0 else min(room, MAX_DATA_BYTES)

    def spend(self, payload_bytes: int) -> bool:
        """Take the cost of a frame. Returns False, and takes nothing, if there is not enough credit."""
        left = self.available - payload_bytes - FRAME_COST_BYTES
        if left < 0:
            return False
        self.available = left
        return True

    def replenish(self, increment: int, window_bytes: int) -> None:
        """Add what the peer granted. Raises RemoteProtocolError past its window or below the minimum."""
        if increment < MIN_CREDIT_BYTES:
            raise RemoteProtocolError(f"CREDIT of {increment} bytes, not at least {MIN_CREDIT_BYTES}")
        if self.available + increment > window_bytes:
            raise RemoteProtocolError(f"CREDIT of {increment} bytes goes past the window of {window_bytes}")
        self.available += increment
        self._was_recalled = False

    def note_recall(self) -> None:
        """The peer asks for credit back. Raises RemoteProtocolError if it granted none in between."""
        if self._was_recalled:
            raise RemoteProtocolError("a second RECALL, and no CREDIT since the last one")
        self._was_recalled = True

    def give_back(self, keep: int) -> int:
        """Give up what is above ``keep``; returns how much that was."""
        amount = max(self.available - keep, 0)
        self.available -= amount
        return amount

    # What the peer may send

    @property
    def granted(self) -> int:
        """How much may still arrive, including what is held back."""
        return self.outstanding + self.held

    def receive(self, cost: int) -> None:
        """Take the cost of a DATA frame that came. Raises RemoteProtocolError if it was not granted."""
        left = self.outstanding - cost
        if left < 0:
            raise RemoteProtocolError(f"DATA goes {-left} bytes past the credit")
        self.outstanding = left

    def grant(self, increment: int) -> int:
        """Grant more. Returns how much to send in a CREDIT frame now; 0 to hold it back.

        CREDIT is sent once it adds half of the peer's window: the peer never runs out of credit while the
        consumer keeps up, and a CREDIT frame stands for many DATA frames.
        """
        held = self.held + increment
        if held < MIN_CREDIT_BYTES or held < self.outstanding:
            self.held = held
            return 0
        self.held = 0
        self.outstanding += held
        self._is_recalled = False
        return held

    def recall(self, keep: int) -> bool:
        """Return whether to ask the peer for everything above ``keep`` now; if so, it counts as asked."""
        if self.outstanding <= keep or self._keep or self._is_recalled:
            return False
        self._keep = keep
        self._is_recalled = True
        return True

    def take_back(self, amount: int) -> None:
        """Take what the peer gives back. Raises RemoteProtocolError if that is more than it was asked for."""
        keep = self._keep
        if not keep:
            raise RemoteProtocolError("a RETURN that answers no RECALL")
        if amount and self.outstanding - amount < keep:
            raise RemoteProtocolError(
                f"RETURN of {amount} bytes of {self.outstanding}, where {keep} may be kept"
            )
        self._keep = 0
        self.outstanding -= amount
