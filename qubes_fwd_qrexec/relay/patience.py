# SPDX-License-Identifier: GPL-2.0-or-later
"""How long the other end of a mux call's call is waited for, when it says or takes nothing.

A qube that is paused or swaps, or a daemon between that is stopped, is no fault: TCP waits for such a peer,
and so does this, for minutes. What it holds up is bounded by credit all the while, and that the call is gone
the call itself says. So this is only for a peer that would hold its streams for ever.

It counts in ticks of this process and not by the clock. A process that was stopped itself finds that much
time has passed in which its peer could not be heard.
"""

from qubes_fwd_qrexec.mux import Connection

from .backlog import Backlog

TICK_S = 1.0
# docs/behaviours.md, 26: no HELLO.
HELLO_S = 30.0
# docs/behaviours.md, 48: half a frame and then silence, or a peer that reads nothing.
_PAUSE_S = 300


class Patience:
    """For one end of one call; `tick` is called each second in which this process runs.

    ``hello_s``: how long the peer may take to say HELLO. A listener, whose target may still be starting,
    judges that by itself.
    """

    __slots__ = ("_backlog", "_connection", "_hello_s", "_silent_ticks", "_ticks")

    def __init__(self, connection: Connection, backlog: Backlog, hello_s: float = HELLO_S) -> None:
        self._hello_s = hello_s
        self._connection = connection
        self._backlog = backlog
        self._ticks = 0
        self._silent_ticks = 0

    def heard(self) -> None:
        """Something has come."""
        self._silent_ticks = 0

    def tick(self) -> str | None:
        """A second has passed: why the other end is waited for no longer, if so."""
        self._ticks += 1
        self._silent_ticks += 1
        if self._connection.peer is None and self._ticks * TICK_S >= self._hello_s:
            return f"no HELLO within {self._hello_s:g} s"
        if self._connection.has_partial_frame and self._silent_ticks * TICK_S >= _PAUSE_S:
            return f"half a frame, and nothing more for {_PAUSE_S} s"
        if self._backlog.stuck_ticks * TICK_S >= _PAUSE_S:
            return f"the other end has read nothing for {_PAUSE_S} s"
        return None
