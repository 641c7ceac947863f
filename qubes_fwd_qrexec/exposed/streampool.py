# SPDX-License-Identifier: GPL-2.0-or-later
"""Connections over the mux calls to one target: each gets a call with room, or waits for one within bounds.

All this happens in the loop's thread; only a call is made in trio's.
"""

import math
import time
from collections.abc import Collection

import trio

from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.relay.budget import Budget
from qubes_fwd_qrexec.relay.copy import abort
from qubes_fwd_qrexec.relay.loop import Timer
from qubes_fwd_qrexec.relay.socketbuffers import WAITING_BYTES, set_size
from qubes_fwd_qrexec.relay.thread import RelayThread

from .callbudget import CallBudget
from .callqueue import Key
from .connection import Connection
from .connectionlog import How
from .crowd import Crowd, client_key
from .muxpool import LINGER_S, OPEN_S, MuxPool
from .streamcall import StreamCall

# docs/behaviours.md, 25: how many connections may wait for a mux call; OPEN_S bounds how long.
WAITING_MAX = 1024
# How many of them are served in one turn of the loop, so that streams which are there have theirs.
_BURST = 16
# How often to ask for a stream that the target did not begin.
_TRIES = 3
# How often to look whether one has waited for too long, or a call has room again.
_LOOK_S = 0.1


class StreamPool(MuxPool[StreamCall]):
    """The mux calls for connections to one target and one range of its ports.

    ``half_close_s``, ``idle_s``: see `Mux`.
    """

    def __init__(
        self,
        qrexec_client: tuple[str, ...],
        calls: CallBudget,
        target: str,
        service: str,
        ports: TargetPorts,
        relays: RelayThread,
        tasks: trio.Nursery,
        budget: Budget,
        half_close_s: float,
        linger_s: float = LINGER_S,
        idle_s: float = math.inf,
    ) -> None:
        super().__init__(qrexec_client, calls, target, service, ports, relays, tasks, linger_s)
        self._budget = budget
        self._half_close_s = half_close_s
        self._idle_s = idle_s
        self._waiting: dict[Connection, None] = {}
        self._crowd = Crowd()
        self._is_asking = False
        self._timer: Timer | None = None

    # As a pool, in trio's thread

    def make_call(self) -> StreamCall:
        return StreamCall(self.relays, self.ports, self, self._budget, self._half_close_s, self._idle_s)

    def users(self) -> Collection[Key]:
        # In one step, while the loop's thread may change it.
        return {client_key(connection.client) for connection in tuple(self._waiting)}

    @property
    def waiting(self) -> int:
        """How many connections wait for a call."""
        return len(self._waiting)

    # As a carrier, in the loop's thread

    def carry(self, connection: Connection) -> None:
        """Begin a stream for it, or have it wait for a call."""
        if not self._waiting and (call := self._with_room()) is not None:
            call.carry(connection)
        else:
            self._wait(connection)

    def end(self, connection: Connection) -> None:
        self.forget(connection)
        abort(connection.sock)
        connection.over(How.CUT)

    def forget(self, connection: Connection) -> bool:
        """Have it wait no more. Returns whether it did."""
        if not self._crowd.discard(connection):
            return False
        del self._waiting[connection]
        connection.carrier = None
        return True

    def _with_room(self) -> StreamCall | None:
        """The first call that takes another stream now."""
        for call in tuple(self.mux_calls):  # in one step, while trio's thread may change it
            if call.has_room:
                return call
        return None

    def _wait(self, connection: Connection) -> None:
        """If too many wait, the first one of the client with most makes room, or this one is refused."""
        try:
            connection.sock.getpeername()  # a client that has left is not worth a call
        except OSError as error:
            connection.refuse(None, str(error))
            return
        set_size(connection.sock, WAITING_BYTES)
        self._waiting[connection] = None
        self._crowd.add(connection)
        connection.carrier = self
        if len(self._waiting) > WAITING_MAX:
            # Counted already, so nobody is ended for one who would then hold as many.
            other = self._crowd.idlest_before(connection.client)
            if other is None:
                busy = f"{WAITING_MAX} connections wait for a mux call to {self.target}"
                self._refuse(connection, Refusal.BUSY, busy)
                return
            other.make_room()
        self._look_later(_LOOK_S)
        self._want_call()

    def _want_call(self) -> None:
        """Have one more call made, unless that is under way, or one has room in a moment."""
        if not self._is_asking and not any(call.is_held_up for call in tuple(self.mux_calls)):
            self._is_asking = True
            self.relays.tell(self._ask)

    def _refuse(self, connection: Connection, kind: Refusal, error: str) -> None:
        self.forget(connection)
        connection.refuse(kind, error)

    def _serve(self) -> None:
        """Begin streams for those that wait, the first to come first, as far as there is room."""
        for _ in range(_BURST):
            first = next(iter(self._waiting), None)
            if first is None:
                return
            call = self._with_room()
            if call is None:
                self._want_call()
                return
            self.forget(first)
            self.relays.loop.guarded(first.fail, call.carry, first)
        self._look_later(0.0)

    def _look_later(self, delay_s: float) -> None:
        if self._timer is not None and delay_s:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.relays.loop.after(delay_s, self._look, self._fail_all)

    def _look(self) -> None:
        """Refuse who has waited for too long, and serve who may begin now."""
        self._timer = None
        before = time.monotonic() - OPEN_S
        for connection in [one for one in self._waiting if one.since <= before]:
            self._refuse(connection, Refusal.NO_CALL, f"no mux call to {self.target} within {OPEN_S:g} s")
        self._serve()
        if self._waiting:
            self._look_later(_LOOK_S)

    def _settled(self, kind: Refusal, problem: str | None) -> None:
        """A call that was asked for is ready, or will never be."""
        self._is_asking = False
        if problem is None:
            self._serve()
            return
        for connection in list(self._waiting):
            self._refuse(connection, kind, f"no mux call to {self.target}: {problem}")

    def _stop_asking(self) -> None:
        """There was a bug when a call was settled."""
        self._is_asking = False
        self._fail_all()

    def _fail_all(self) -> None:
        for connection in list(self._waiting):
            connection.fail()

    # As the owner of the calls, in the loop's thread

    def call_ready(self) -> None:
        self._serve()

    def not_begun(self, connection: Connection) -> None:
        connection.carrier = connection.by = None
        if connection.call_tries < _TRIES:
            self.carry(connection)
        else:
            error = f"{self.target} took none of {_TRIES} requests for a stream"
            connection.refuse(Refusal.NO_CALL, error)
