# SPDX-License-Identifier: GPL-2.0-or-later
"""One accepted connection, from when it is let in until it has ended.

There may be thousands, and many new ones each second, so it is small, has no task and no timer, and decides
nothing: its owner does, the table of its forward. Whoever has it now, its carrier, moves its bytes or has it
wait for a call.
"""

import math
import socket
from typing import Protocol

from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.values import Binding, IPAddress
from qubes_fwd_qrexec.mux import Origin
from qubes_fwd_qrexec.relay.copy import abort

from .connectionlog import How, Opened
from .counters import Carried


class ConnectionOwner(Protocol):
    """Who is told what happens to a connection, in the loop's thread."""

    def failed(self, connection: "Connection", kind: str | None, error: str) -> None:
        """Something went wrong; `ended` follows. ``kind`` is a word for counters, if nothing was carried."""

    def ended(self, connection: "Connection", how: How) -> None:
        """The connection is over, and its socket closed."""


class Carrier(Protocol):
    """What carries connections to the target; called in the loop's thread."""

    def carry(self, connection: "Connection") -> None:
        """Carry it to its end, of which the connection is told: `over` or `refuse`."""

    def forget(self, connection: "Connection") -> bool:
        """Have it wait for a call no more. Returns whether it did, and so may be carried by another one."""

    def end(self, connection: "Connection") -> None:
        """End it: both sides see RST. The connection is told that it is `over`, now or soon."""


class Connection(Carried):
    """Belongs to the loop's thread; its figures may be read in any. ``peer`` is the client's address, with
    its zone if it has one, and port; ``client`` the address by which it is let in and counted; ``local`` what
    it connected to.

    ``config`` is what its forward was when it came, ``carrier`` who has it now, ``call_tries`` how often the
    target did not begin a stream for it. ``ends_at`` (`time.monotonic`) is when it must be over at the
    latest, and finite once its forward no longer allows it. ``cut_as``: how it ended, if it was cut here.
    """

    __slots__ = (
        "call_tries",
        "carrier",
        "client",
        "config",
        "cut_as",
        "ends_at",
        "line",
        "local",
        "owner",
        "peer",
        "sock",
        "target_port",
    )

    def __init__(
        self,
        owner: ConnectionOwner,
        config: ListenerConfig,
        sock: socket.socket,
        peer: Binding,
        client: IPAddress,
        local: Binding,
        now: float,
    ) -> None:
        super().__init__(now)
        self.owner = owner
        self.config = config
        self.sock = sock
        self.peer = peer
        self.client = client
        self.local = local
        self.target_port = config.target_port(local[1])
        self.carrier: Carrier | None = None
        self.cut_as: How | None = None
        self.call_tries = 0
        self.ends_at = math.inf
        self.line: Opened | None = None

    def origin(self) -> Origin:
        """Who connected to what, for the target."""
        return Origin(self.client, self.peer[1], *self.local)

    def client_name(self) -> tuple[str, int]:
        """The client's address and port, as `socket.getpeername` has them."""
        return str(self.peer[0]), self.peer[1]

    def cut(self, how: How = How.CUT) -> None:
        """End it, whatever bug its carrier has: both sides see RST. A second call changes nothing."""
        if self.cut_as is not None:
            return
        self.cut_as = how
        if self.carrier is None:
            self._end(how)
            return
        try:
            self.carrier.end(self)
        except Exception:
            self._end(how)
            raise

    def make_room(self) -> None:
        """Others need its place."""
        self.cut(How.MADE_ROOM)

    def fail(self) -> None:
        """There was a bug in what was done for it."""
        self.cut(How.BUG)

    # For its carrier

    def over(self, how: How) -> None:
        """It has ended, and its socket is closed."""
        self.carrier = None
        self.owner.ended(self, self.cut_as or how)

    def refuse(self, kind: str | None, error: str) -> None:
        """It is not carried; the client sees RST."""
        try:
            self.owner.failed(self, kind, error)
        finally:
            self._end(How.ABORTED if kind is None else How.REFUSED)

    def _end(self, how: How) -> None:
        abort(self.sock)
        self.over(how)
