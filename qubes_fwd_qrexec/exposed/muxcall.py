# SPDX-License-Identifier: GPL-2.0-or-later
"""One mux call of the listener side: a qrexec call, its mux, and the connections that it carries.

`muxpool` makes it, keeps it and lets it go; this is what happens in between.
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
from .callplace import Place
from .callqueue import Key
from .counters import Carried
from .crowd import client_key
from .qrexec import Call

_HOW = {
    LegEnd.DONE: "closed",
    LegEnd.LOCAL_RESET: "client-reset",
    LegEnd.REMOTE_RESET: "target-reset",
    LegEnd.BUG: "bug",
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


class MuxCall:
    """One mux call of the listener side, from before the call is made until it has ended.

    Each attribute is written either in the loop's thread or in trio's, and may be read in both.
    """

    def __init__(self, relays: RelayThread, ports: TargetPorts) -> None:
        self.settled = trio.Event()
        """Set once it is ready, or it is known that it never will be."""
        self.problem: str | None = None
        self.refusal: Refusal | None = None
        """Why it never became ready, as one word."""
        self.status: int | None = None
        """The exit status of its call, if it has one."""
        self.mux: Mux | None = None
        self.ready_at = -math.inf
        self.opened = 0
        """How many streams it was asked for."""
        self.was_let_go = False
        """Whether this end drains it."""
        self.place: Place | None = None
        """The place of its call among all calls of this qube."""
        self._relays = relays
        self._ports = ports
        self._is_ready = False
        self._is_draining = False
        self._users: dict[Carried, Key] = {}
        self._used_at = -math.inf
        self._finish: Callable[[str | None], None] | None = None
        self.waiting: dict[Leg, Callable[[Ending | RetryError], None]] = {}
        """For each stream, what to call with how it ended, in the loop's thread."""

    @property
    def is_opening(self) -> bool:
        return not self.settled.is_set()

    @property
    def is_revoked(self) -> bool:
        return self.mux is not None and self.mux.is_revoked

    @property
    def is_draining(self) -> bool:
        """Whether it takes no more streams, and ends with the last one."""
        return self._is_draining

    @property
    def has_room(self) -> bool:
        """Whether it takes another stream now."""
        return self._is_ready and not self._is_draining and self.mux is not None and self.mux.open_room > 0

    @property
    def is_held_up(self) -> bool:
        """Whether it has no room only because clients come and go faster than the target answers resets."""
        mux = self.mux
        if not self._is_ready or self._is_draining or mux is None or mux.open_room > 0:
            return False
        return 2 * len(mux.legs) < mux.connection.open_streams

    @property
    def lease_s(self) -> float:
        peer = None if self.mux is None else self.mux.connection.peer
        return 0.0 if peer is None else peer.lease_s

    @property
    def streams(self) -> int:
        return 0 if self.mux is None else len(self.mux.legs)

    @property
    def quiet_s(self) -> float | None:
        """As the holder of a place: for how many seconds it has had no stream; None if it has some."""
        if self.is_opening or self._is_draining or self._users or self.streams:
            return None
        return trio.current_time() - max(self._used_at, self.ready_at)

    @property
    def sole_user(self) -> tuple[Key, float] | None:
        """As the holder of a place: the only client that uses it, and for how many seconds it was idle."""
        keys = set(self._users.values())
        if self.is_opening or len(keys) != 1:
            return None
        return keys.pop(), time.monotonic() - max(carried.moved_at for carried in self._users)

    def make_room(self) -> None:
        """As the holder of a place: others need the call, so cut its streams."""
        self.drain()

        def cut() -> None:
            for leg, finish in list(self.waiting.items()):
                del self.waiting[leg]
                leg.abort_from_here()
                finish(Ending(None, leg.sent, leg.received, how="made-room"))

        def fail() -> None:
            if self.mux is not None:
                self.mux.fail()

        self._relays.order(cut, fail)

    def forget_call(self) -> None:
        """There was no room for its call, and another will be made."""
        self.mux = self.refusal = self.status = self.place = None
        self._is_draining = False

    async def run(self, call: Call, budget: Budget, half_close_s: float, idle_s: float) -> str | None:
        """Drive it until it is over. Returns why it ended, or None if it ended as agreed.

        It uses the sockets of ``call`` until then. Raises OSError when the kernel can watch no more sockets.
        """

        def begin(finish: Callable[[str | None], None]) -> None:
            self._finish = finish
            hello = Hello(WINDOW_MAX_BYTES, secrets.token_bytes(16))
            connection = Connection(hello, range(self._ports.first, self._ports.last + 1))
            loop, source, sink = self._relays.loop, call.stdout, call.stdin
            self.mux = Mux(
                loop, connection, source, sink, budget, self, half_close_s, idle_s, hello_s=math.inf
            )

        def let_go() -> None:
            self._finish = None
            if self.mux is not None:
                self.mux.abandon()

        return await self._relays.wait(begin, let_go)

    def drain(self) -> None:
        """Take no more streams, and end with the last one."""
        self._is_draining = self.was_let_go = True

        def drain() -> None:
            if self.mux is not None:
                self.mux.drain(GoawayCode.SHUTDOWN)

        def fail() -> None:
            if self.mux is not None:
                self.mux.fail()

        self._relays.order(drain, fail)

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
            self._used_at = trio.current_time()

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
                finish(Ending(text, 0, 0, Refusal.BUSY, "refused"))
                return
            legs.append(leg)
            carried.by = leg
            self.waiting[leg] = finish
            leg.on_end = partial(self._leg_ended, leg)

        def let_go() -> None:
            for leg in legs:
                self.waiting.pop(leg, None)
                leg.abort_from_here()

        result = await self._relays.wait(begin, let_go)
        if isinstance(result, RetryError):
            raise result
        return result

    def _leg_ended(self, leg: Leg, how: LegEnd) -> None:
        finish = self.waiting.pop(leg, None)
        if finish is not None:
            finish(Ending(None, leg.sent, leg.received, how=_HOW[how]))

    # As the owner of the mux, in the loop's thread

    def ready(self) -> None:
        def settle() -> None:
            self.ready_at = trio.current_time()
            self.settled.set()

        self._is_ready = True
        self._relays.tell(settle)

    def open_requested(self, event: OpenReceived) -> None:
        """Never called: the target cannot ask for streams."""

    def open_abandoned(self, stream_id: int) -> None:
        """Never called: this end answers no streams."""

    def refused(self, leg: Leg, code: ResetCode) -> None:
        if code in _TRY_AGAIN and self.mux is not None and not self.mux.is_over:
            self._turn_away()  # the target drains, or should
            self.mux.drain(GoawayCode.SHUTDOWN)
        finish = self.waiting.pop(leg, None)
        if finish is not None:
            error = _REFUSALS.get(code, f"the target reset the stream: {code.name}")
            refused = Ending(error, 0, 0, Refusal.SERVER, "refused")
            finish(RetryError(is_targets=True) if code in _TRY_AGAIN else refused)

    def draining(self, code: GoawayCode) -> None:
        self._turn_away()

    def _turn_away(self) -> None:
        """The target takes no more streams. That must not repeat quickly: dom0 judges each new call."""
        if not self._is_draining:
            self._is_draining = True
            self._relays.tell(self._note_end)

    def _note_end(self) -> None:
        if self.place is not None:
            self.place.lost("the target gave a mux call up")

    def over(self, problem: str | None) -> None:
        self._is_draining = True
        if self._finish is not None:
            self._finish(problem)
