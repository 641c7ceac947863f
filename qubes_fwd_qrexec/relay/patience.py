# SPDX-License-Identifier: GPL-2.0-or-later
"""How long to wait for the other end of a mux call when it sends or reads nothing.

It is no fault if a qube is paused or swaps, or a daemon in between is stopped: TCP waits for such a peer, and
so does this, for minutes. Credit bounds what the peer holds up meanwhile, and the call itself says when it is
gone. So this is only for a peer that would hold its streams for ever.

It counts ticks of this process and not the clock: a process that was stopped itself could not hear its peer
in that time.
"""

from typing import Protocol

from qubes_fwd_qrexec.mux import Hello

from .callwriter import CallWriter

TICK_S = 1.0
# docs/behaviours.md, 26: no HELLO.
HELLO_S = 30.0
# docs/behaviours.md, 48: half a frame and then silence. As long for a peer that reads nothing.
PAUSE_S = 300


class _Peer(Protocol):
    """The protocol's state of a mux: what has come from the peer."""

    @property
    def peer(self) -> Hello | None: ...

    @property
    def has_partial_frame(self) -> bool: ...


class Patience:
    """For one end of one mux call; `tick` is called every second in which this process runs.

    ``hello_s``: how many seconds the peer may take to say HELLO. A listener, whose target may still be
    starting, decides that itself.
    """

    __slots__ = ("_connection", "_hello_s", "_silent_ticks", "_ticks", "_writer")

    def __init__(self, connection: _Peer, writer: CallWriter, hello_s: float = HELLO_S) -> None:
        self._hello_s = hello_s
        self._connection = connection
        self._writer = writer
        self._ticks = 0
        self._silent_ticks = 0

    def heard(self) -> None:
        """Something has arrived."""
        self._silent_ticks = 0

    def tick(self) -> str | None:
        """A second has passed. Returns why to give up on the other end, or None to go on waiting."""
        self._ticks += 1
        self._silent_ticks += 1
        if self._connection.peer is None and self._ticks * TICK_S >= self._hello_s:
            return f"no HELLO within {self._hello_s:g} s"
        if self._connection.has_partial_frame and self._silent_ticks * TICK_S >= PAUSE_S:
            return f"half a frame, and nothing more for {PAUSE_S} s"
        if self._writer.stuck_ticks * TICK_S >= PAUSE_S:
            return f"the other end has read nothing for {PAUSE_S} s"
        return None
