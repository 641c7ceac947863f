# SPDX-License-Identifier: GPL-2.0-or-later
"""Connections over the mux calls to one target: each waits, within bounds, for a call with room."""

import math
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import trio

from qubes_fwd_qrexec.common.errors import RefusedError
from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.mux import Origin, ProxyVersion
from qubes_fwd_qrexec.relay.budget import Budget
from qubes_fwd_qrexec.relay.thread import RelayThread

from .call import Ending
from .callbudget import CallBudget
from .callqueue import CallQueue, Key, Kind, Wanted
from .counters import Carried
from .crowd import client_key
from .muxpool import LINGER_S, LOOK_S, OPEN_S, MuxPool
from .streamcall import RetryError, StreamCall

# docs/behaviours.md, 25: how many connections may wait for a mux call; OPEN_S bounds how long.
WAITING_MAX = 1024
# How often to ask for a stream that the target did not begin.
_TRIES = 3


class _Waiter(Wanted):
    """A connection that waits for a mux call; its key is its client."""

    __slots__ = ("is_refused", "scope")

    def __init__(self, kind: Kind, target: str, service: str, key: Key) -> None:
        super().__init__(kind, target, service, key)
        self.scope = trio.CancelScope()
        self.is_refused = False


class StreamPool(MuxPool[StreamCall]):
    """The mux calls for connections to one target and one range of its ports.

    ``waiting``: the connections for which there is no call yet. ``half_close_s``, ``idle_s``: see `Mux`.
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
        self.waiting: CallQueue[_Waiter] = CallQueue(WAITING_MAX)

    def make_call(self) -> StreamCall:
        return StreamCall(self.relays, self.ports, self._budget, self._half_close_s, self._idle_s)

    def users(self) -> Collection[Key]:
        return {waiter.key for waiter in self.waiting}

    async def relay(
        self,
        accepted: socket.socket,
        port: int,
        origin: Origin,
        proxy: ProxyVersion,
        carried: Carried | None = None,
    ) -> Ending:
        """Carry one connection, and close it in the end, unless the `Ending` has an error.

        Raises `RefusedError` if there is no mux call for it; the connection is untouched then.
        """
        deadline = trio.current_time() + OPEN_S
        turned_away = 0
        while True:
            mux_call = await self._usable(deadline, client_key(origin.client))
            try:
                return await mux_call.relay(accepted, port, origin, proxy, carried)
            except RetryError as error:
                turned_away += error.is_targets
            if turned_away >= _TRIES:
                raise RefusedError(f"{self.target} took none of {_TRIES} requests for a stream")

    async def _usable(self, deadline: float, user: Key) -> StreamCall:
        """A mux call with room, opened if there is none. Raises `RefusedError` if that fails."""
        while trio.current_time() < deadline:
            if self.is_retired:
                raise RefusedError(f"the forward to {self.target} is over")
            for mux_call in self.mux_calls:
                if mux_call.has_room:
                    return mux_call
            with self._waiting_one(user, deadline):
                if any(mux_call.is_held_up for mux_call in self.mux_calls):
                    await trio.sleep(LOOK_S)
                    continue
                opening = self.opening()
                await opening.settled.wait()
                if opening.problem is not None:
                    kind = opening.refusal or Refusal.NO_CALL
                    raise RefusedError(f"no mux call to {self.target}: {opening.problem}", kind)
        raise RefusedError(f"no mux call to {self.target} within {OPEN_S:g} s")

    @contextmanager
    def _waiting_one(self, user: Key, deadline: float) -> Iterator[None]:
        """If too many wait, the newest one of the client with most is refused, which may be this one."""
        waiter = _Waiter(Kind.SINGLE, self.target, self.service, user)
        displaced = self.waiting.add(waiter)
        try:
            if displaced is not None:
                displaced.is_refused = True
                displaced.scope.cancel()
            if not waiter.is_refused:
                with waiter.scope, trio.move_on_at(deadline):
                    yield
        finally:
            self.waiting.remove(waiter)
        if waiter.is_refused:
            raise RefusedError(
                f"{WAITING_MAX} connections wait for a mux call to {self.target}", Refusal.BUSY
            )
