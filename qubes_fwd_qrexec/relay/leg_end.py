# SPDX-License-Identifier: GPL-2.0-or-later
"""How a stream of a mux call ended."""

from enum import Enum, auto


class LegEnd(Enum):
    """How a stream ended."""

    DONE = auto()
    """Both directions ended cleanly."""
    LOCAL_RESET = auto()
    """The local peer aborted."""
    REMOTE_RESET = auto()
    """The other end aborted the stream, or the mux call was lost."""
    BUG = auto()
    """A bug of this end ended it."""
