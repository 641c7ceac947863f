# SPDX-License-Identifier: GPL-2.0-or-later
"""The life of one stream, as a table of legal moves; a move that is not in it is illegal.

A stream has two halves: what this end has sent, and what the peer has sent. Only the frames of its own end
move a half, except ACCEPT, which lets both halves flow.
"""

from enum import IntEnum
from typing import Final

from .wire import FrameType


class Half(IntEnum):
    """How far one end has come. A number rather than a name, so that comparing them is cheap."""

    PENDING = 0
    FLOWING = 1
    ENDED = 2
    """It sent EOF."""
    MUST_RESET = 3
    """The other end sent RESET, and this one owes the answer."""
    RESET = 4
    """It sent RESET and had not sent EOF."""
    ENDED_RESET = 5
    """It sent EOF and then RESET."""


MOVES: Final[dict[tuple[Half, FrameType], Half]] = {
    (Half.PENDING, FrameType.ACCEPT): Half.FLOWING,
    (Half.PENDING, FrameType.RESET): Half.RESET,
    (Half.FLOWING, FrameType.DATA): Half.FLOWING,
    (Half.FLOWING, FrameType.CREDIT): Half.FLOWING,
    (Half.FLOWING, FrameType.RECALL): Half.FLOWING,
    (Half.FLOWING, FrameType.RETURN): Half.FLOWING,
    (Half.FLOWING, FrameType.EOF): Half.ENDED,
    (Half.FLOWING, FrameType.RESET): Half.RESET,
    (Half.ENDED, FrameType.CREDIT): Half.ENDED,
    (Half.ENDED, FrameType.RECALL): Half.ENDED,
    (Half.ENDED, FrameType.RESET): Half.ENDED_RESET,
    (Half.MUST_RESET, FrameType.RESET): Half.RESET,
}

OVER: Final[frozenset[tuple[Half, Half]]] = frozenset(
    {
        (Half.ENDED, Half.ENDED),
        (Half.RESET, Half.RESET),
        (Half.RESET, Half.ENDED_RESET),
        (Half.ENDED_RESET, Half.RESET),
        # The peer's EOF crossed our RESET. The peer had our EOF before our RESET, so for it the stream ended
        # with both EOFs, and it will not answer.
        (Half.ENDED_RESET, Half.ENDED),
    }
)
"""Pairs of (local, remote) at which the slot is free and the peer's slot is, or will be, free too."""
