# SPDX-License-Identifier: GPL-2.0-or-later
"""One mux call of the listener side that carries connections, each as a stream.

`streampool` asks it to carry one; `muxcall` has what such a call is without them.
"""

import math
import secrets
import time
from typing import Protocol

from qubes_fwd_qrexec.common.errors import LocalProtocolError
from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.common.rules import Proxy
from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.mux import Connection as MuxConnection
from qubes_fwd_qrexec.mux import GoawayCode, Hello, OpenReceived, ProxyVersion, ResetCode
from qubes_fwd_qrexec.relay.budget import WINDOW_MAX_BYTES, Budget
from qubes_fwd_qrexec.relay.leg import Leg
from qubes_fwd_qrexec.relay.leg_end import LegEnd
from qubes_fwd_qrexec.relay.mux import Mux
from qubes_fwd_qrexec.relay.thread import RelayThread

from .callqueue import Key
from .connection import Connection
from .connectionlog import How
from .crowd import client_key
from .muxcall import MuxCall
from .qrexec import Call

_PROXY_VERSIONS = {Proxy.OFF: ProxyVersion.OFF, Proxy.V1: ProxyVersion.V1, Proxy.V2: ProxyVersion.V2}
_HOW = {
    LegEnd.DONE: How.CLOSED,
    LegEnd.LOCAL_RESET: How.CLIENT_RESET,
    LegEnd.REMOTE_RESET: How.TARGET_RESET,
    LegEnd.BUG: How.BUG,
}
_REFUSALS = {
    ResetCode.REFUSED: "the server in the target refused the connection",
    ResetCode.TIMEOUT: "the server in the target did not accept the connection in time",
    ResetCode.UNREACHABLE: "the server in the target cannot be reached",
    ResetCode.OVER_LIMIT: "the target takes no more connections",
}
# The target has done nothing for the stream: it may be asked for again on another mux call.
_TRY_AGAIN = frozenset((ResetCode.LEASE_OVER, ResetCode.SHUTDOWN))


class StreamCallOwner(Protocol):
    """Who is told about a call, in the loop's thread."""

    def call_ready(self) -> None:
        """A call takes streams from now on."""

    def not_begun(self, connection: Connection) -> None:
        """The target has done nothing for the connection, for which no more is done here."""


class StreamCall(MuxCall[Mux]):
    """A mux call that carries connections.

    All but what the holder of a place is asked belongs to the loop's thread. ``half_close_s``, ``idle_s``:
    see `Mux`.
    """

    def __init__(
        self,
        relays: RelayThread,
        ports: TargetPorts,
        owner: StreamCallOwner,
        budget: Budget,
        half_close_s: float,
        idle_s: float,
    ) -> None:
        super().__init__(relays, ports)
        self._owner = owner
        self._budget = budget
        self._half_close_s = half_close_s
        self._idle_s = idle_s
        self.connections: dict[Leg, Connection] = {}

    # As a mux call

    @property
    def carries(self) -> int:
        return 0 if self.mux is None else len(self.mux.legs)

    @property
    def is_used(self) -> bool:
        return self.carries > 0

    @property
    def sole_user(self) -> tuple[Key, float] | None:
        connections = tuple(self.connections.values())  # in one step, while the loop's thread may change it
        if self.is_opening or not connections:
            return None
        key = client_key(connections[0].client)
        if any(client_key(connection.client) != key for connection in connections):
            return None
        return key, time.monotonic() - max(connection.moved_at for connection in connections)

    def make_mux(self, call: Call) -> Mux:
        hello = Hello(WINDOW_MAX_BYTES, secrets.token_bytes(16))
        return Mux(
            self.relays.loop,
            MuxConnection(hello, range(self.ports.first, self.ports.last + 1)),
            call.stdout,
            call.stdin,
            self._budget,
            self,
            self._half_close_s,
            self._idle_s,
            hello_s=math.inf,
        )

    def cut(self) -> None:
        for connection in list(self.connections.values()):
            connection.make_room()

    # For the pool

    @property
    def has_room(self) -> bool:
        """Whether it takes another stream now."""
        return self.is_usable and self.mux is not None and self.mux.open_room > 0

    @property
    def is_held_up(self) -> bool:
        """Whether it has no room only because clients come and go faster than the target answers resets."""
        mux = self.mux
        if not self.is_usable or mux is None or mux.open_room > 0:
            return False
        return 2 * len(mux.legs) < mux.connection.open_streams

    # As a carrier

    def carry(self, connection: Connection) -> None:
        """Ask for a stream. Raises LocalProtocolError unless it `has_room`."""
        if self.mux is None:
            raise LocalProtocolError("there is no call")
        self.opened += 1
        leg = self.mux.open(
            connection.target_port,
            connection.origin(),
            connection.sock,
            _PROXY_VERSIONS[connection.config.proxy],
        )
        if leg is None:
            connection.refuse(Refusal.BUSY, "this qube holds as many connections as it may")
            return
        connection.by = leg
        connection.carrier = self
        self.connections[leg] = connection
        leg.on_end = self._leg_ended

    def forget(self, connection: Connection) -> bool:
        """Nothing waits here."""
        return False

    def end(self, connection: Connection) -> None:
        leg = connection.by
        if isinstance(leg, Leg) and self._left(leg) is not None:
            leg.abort_from_here()
            connection.over(How.CUT)

    def _leg_ended(self, leg: Leg) -> None:
        connection = self._left(leg)
        if connection is not None and leg.ended is not None:
            connection.over(_HOW[leg.ended])

    def _left(self, leg: Leg) -> Connection | None:
        """Whose leg it was; None if that was asked before."""
        self.used_at = time.monotonic()
        return self.connections.pop(leg, None)

    # As the owner of the mux

    def ready(self) -> None:
        super().ready()
        self._owner.call_ready()

    def open_requested(self, event: OpenReceived) -> None:
        """Never called: the target cannot ask for streams."""

    def open_abandoned(self, stream_id: int) -> None:
        """Never called: this end answers no streams."""

    def refused(self, leg: Leg, code: ResetCode) -> None:
        if code in _TRY_AGAIN and self.mux is not None and not self.mux.is_over:
            self.turn_away()  # the target drains, or should
            self.mux.drain(GoawayCode.SHUTDOWN)
        connection = self._left(leg)
        if connection is None:
            return
        if code in _TRY_AGAIN:
            connection.call_tries += 1
            self._owner.not_begun(connection)
        else:
            error = _REFUSALS.get(code, f"the target reset the stream: {code.name}")
            connection.refuse(Refusal.SERVER, error)
