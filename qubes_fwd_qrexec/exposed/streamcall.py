# SPDX-License-Identifier: GPL-2.0-or-later
"""One mux call of the listener side that carries connections, each as a stream.

`streampool` asks it to carry one; `muxcall` has what such a call is without them.
"""

import math
import secrets
import socket
import time
from collections.abc import Callable
from functools import partial

import trio

from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.mux import Connection, GoawayCode, Hello, OpenReceived, Origin, ProxyVersion, ResetCode
from qubes_fwd_qrexec.relay.budget import WINDOW_MAX_BYTES, Budget
from qubes_fwd_qrexec.relay.leg import Leg
from qubes_fwd_qrexec.relay.leg_end import LegEnd
from qubes_fwd_qrexec.relay.mux import Mux
from qubes_fwd_qrexec.relay.thread import RelayThread

from .call import Ending
from .callqueue import Key
from .connectionlog import How
from .counters import Carried
from .crowd import client_key
from .muxcall import MuxCall
from .qrexec import Call

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


class RetryError(Exception):
    """The stream was not begun and may be asked for again. ``is_targets``: the target refused it."""

    def __init__(self, *, is_targets: bool) -> None:
        super().__init__()
        self.is_targets = is_targets


class StreamCall(MuxCall[Mux]):
    """A mux call that carries connections.

    ``half_close_s``, ``idle_s``: see `Mux`.
    """

    def __init__(
        self, relays: RelayThread, ports: TargetPorts, budget: Budget, half_close_s: float, idle_s: float
    ) -> None:
        super().__init__(relays, ports)
        self._budget = budget
        self._half_close_s = half_close_s
        self._idle_s = idle_s
        self._users: dict[Carried, Key] = {}
        self.waiting: dict[Leg, Callable[[Ending | RetryError], None]] = {}
        """For each stream, what to call with how it ended, in the loop's thread."""

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

    @property
    def carries(self) -> int:
        return 0 if self.mux is None else len(self.mux.legs)

    @property
    def is_used(self) -> bool:
        return bool(self._users or self.carries)

    @property
    def sole_user(self) -> tuple[Key, float] | None:
        keys = set(self._users.values())
        if self.is_opening or len(keys) != 1:
            return None
        return keys.pop(), time.monotonic() - max(carried.moved_at for carried in self._users)

    def make_mux(self, call: Call) -> Mux:
        hello = Hello(WINDOW_MAX_BYTES, secrets.token_bytes(16))
        connection = Connection(hello, range(self.ports.first, self.ports.last + 1))
        return Mux(
            self.relays.loop,
            connection,
            call.stdout,
            call.stdin,
            self._budget,
            self,
            self._half_close_s,
            self._idle_s,
            hello_s=math.inf,
        )

    def cut(self) -> None:
        for leg, finish in list(self.waiting.items()):
            del self.waiting[leg]
            leg.abort_from_here()
            finish(Ending(None, leg.sent, leg.received, how=How.MADE_ROOM))

    async def relay(
        self,
        accepted: socket.socket,
        port: int,
        origin: Origin,
        proxy: ProxyVersion,
        carried: Carried | None = None,
    ) -> Ending:
        """Carry one connection, and close or abort it in the end, unless the `Ending` has an error.

        Raises `RetryError` if it was not begun.
        """
        carried = carried or Carried(time.monotonic())
        self._users[carried] = client_key(origin.client)
        try:
            return await self._relay(accepted, port, origin, proxy, carried)
        finally:
            del self._users[carried]
            self.used_at = trio.current_time()

    async def _relay(
        self,
        accepted: socket.socket,
        port: int,
        origin: Origin,
        proxy: ProxyVersion,
        carried: Carried,
    ) -> Ending:
        legs: list[Leg] = []

        def begin(finish: Callable[[Ending | RetryError], None]) -> None:
            if not self.has_room or self.mux is None:
                finish(RetryError(is_targets=False))
                return
            self.opened += 1
            leg = self.mux.open(port, origin, accepted, proxy)
            if leg is None:
                text = "this qube holds as many connections as it may"
                finish(Ending(text, 0, 0, Refusal.BUSY, How.REFUSED))
                return
            legs.append(leg)
            carried.by = leg
            self.waiting[leg] = finish
            leg.on_end = partial(self._leg_ended, leg)

        def let_go() -> None:
            for leg in legs:
                self.waiting.pop(leg, None)
                leg.abort_from_here()

        result = await self.relays.wait(begin, let_go)
        if isinstance(result, RetryError):
            raise result
        return result

    def _leg_ended(self, leg: Leg, how: LegEnd) -> None:
        finish = self.waiting.pop(leg, None)
        if finish is not None:
            finish(Ending(None, leg.sent, leg.received, how=_HOW[how]))

    # As the owner of the mux, in the loop's thread

    def open_requested(self, event: OpenReceived) -> None:
        """Never called: the target cannot ask for streams."""

    def open_abandoned(self, stream_id: int) -> None:
        """Never called: this end answers no streams."""

    def refused(self, leg: Leg, code: ResetCode) -> None:
        if code in _TRY_AGAIN and self.mux is not None and not self.mux.is_over:
            self.turn_away()  # the target drains, or should
            self.mux.drain(GoawayCode.SHUTDOWN)
        finish = self.waiting.pop(leg, None)
        if finish is not None:
            error = _REFUSALS.get(code, f"the target reset the stream: {code.name}")
            refused = Ending(error, 0, 0, Refusal.SERVER, How.REFUSED)
            finish(RetryError(is_targets=True) if code in _TRY_AGAIN else refused)
