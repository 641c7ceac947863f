# SPDX-License-Identifier: GPL-2.0-or-later
"""One stream, as small as possible: a listener holds tens of thousands of them at once."""

from qubes_fwd_qrexec.common.errors import LocalProtocolError, RemoteProtocolError

from .credit import Credit
from .states import MOVES, OVER, Half
from .wire import FrameType


class Stream(Credit):
    """The two halves of a stream, its credit both ways, and the tick in which it was opened."""

    __slots__ = ("local", "opened_tick", "remote")

    def __init__(self, available: int, outstanding: int, tick: int) -> None:
        super().__init__(available, outstanding)
        self.local = Half.PENDING
        self.remote = Half.PENDING
        self.opened_tick = tick

    def move_local(self, frame_type: FrameType) -> None:
        """This end is about to send such a frame. Raises LocalProtocolError if it may not."""
        half = MOVES.get((self.local, frame_type))
        if half is None:
            raise LocalProtocolError(f"{frame_type.name} cannot be sent on a stream that is {self}")
        self.local = half

    def move_remote(self, frame_type: FrameType) -> None:
        """The peer sent such a frame. Raises RemoteProtocolError if it may not."""
        half = MOVES.get((self.remote, frame_type))
        if half is None:
            raise RemoteProtocolError(f"{frame_type.name} came on a stream that is {self}")
        self.remote = half

    @property
    def is_discarding(self) -> bool:
        """Whether this end has reset the stream, so that what still arrives is checked and dropped."""
        return self.local >= Half.RESET

    @property
    def is_receiving(self) -> bool:
        """Whether data can still arrive that this end must keep."""
        return self.remote <= Half.FLOWING and self.local < Half.RESET

    @property
    def is_over(self) -> bool:
        """Whether the slot is free."""
        return (self.local, self.remote) in OVER

    def __str__(self) -> str:
        return f"{self.local.name} here and {self.remote.name} there"
