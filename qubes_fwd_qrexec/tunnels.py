# SPDX-License-Identifier: GPL-2.0-or-later
"""The exposed qube's tunnels to one target: opened when a connection comes, kept a while, replaced in time.

A tunnel is one qrexec call, which dom0 judges. It takes streams until its lease is over or it is full; then
the next connection opens another, which dom0 judges afresh, and the old one ends with its last stream. While
it is in use its lease is renewed long before it is over, by one more call that dom0 judges and that ends at
once: the target cuts what was not renewed. All its calls are among those of `callbudget`, which also keeps
connections from flooding dom0 with questions.
"""

import logging
import math
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio

from .budget import Budget
from .bugs import A_BUG
from .call import Ending
from .callbudget import CallBudget, Place
from .callqueue import CallQueue, Key, Kind, Wanted
from .counters import WAYS, Carried, Refusal
from .crowd import source_key
from .errors import RefusedError
from .exitstatus import meaning, refusal
from .listenertunnel import RetryError, Tunnel
from .logs import RateLimit, inform, warn
from .qrexec import Call, open_call
from .relaythread import RelayThread
from .report import Way
from .tunnel import Origin, ProxyVersion
from .values import TargetPorts

_logger = logging.getLogger(__name__)
# As long as qrexec waits for a target that has started to answer (agent/qrexec-client-vm.c).
OPEN_S = 120.0
# relay-behaviours 26: a target that has taken the call and never says HELLO.
HELLO_S = 30.0
# A browser's next request, a user's next click: a tunnel without streams is kept for so long.
LINGER_S = 60.0
# relay-behaviours 25: connections that wait for a tunnel are bounded in number; OPEN_S bounds their time.
WAITING_MAX = 1024
# When dom0 is asked to renew a lease: with so much of it over, and again after each tenth, or each 20 s.
RENEW_AT_SHARE = 0.5
_RENEW_AGAIN_SHARE = 0.1
_RENEW_AGAIN_MAX_S = 20.0
# A renewal that hangs holds up others, and the next try may fare better.
_RENEW_S = 30.0
# How often a stream is asked for again that the target would not have begun.
_TRIES = 3
# After the call has ended its exit status comes, or never does.
_STATUS_WAIT_S = 0.2
_LOOK_S = 1.0


class _Waiter(Wanted):
    """A connection that waits for a tunnel; its key is its source."""

    __slots__ = ("is_refused", "scope")

    def __init__(self, kind: Kind, target: str, service: str, key: Key) -> None:
        super().__init__(kind, target, service, key)
        self.scope = trio.CancelScope()
        self.is_refused = False


class Tunnels:
    """All tunnels to one target and one range of its ports; a call's argument names both."""

    def __init__(
        self,
        client: tuple[str, ...],
        calls: CallBudget,
        target: str,
        service: str,
        ports: TargetPorts,
        relays: RelayThread,
        budget: Budget,
        tasks: trio.Nursery,
        half_close_s: float,
        linger_s: float = LINGER_S,
        idle_s: float = math.inf,
    ) -> None:
        self._client = client
        self._calls = calls
        self._target = target
        self._service = service
        self._ports = ports
        self._relays = relays
        self._budget = budget
        self._tasks = tasks
        self._half_close_s = half_close_s
        self._linger_s = linger_s
        self._idle_s = idle_s
        self._tunnels: list[Tunnel] = []
        self._limit = RateLimit()
        self._waiting: CallQueue[_Waiter] = CallQueue(WAITING_MAX)
        self._is_retired = False
        self._failed = ""
        self._is_renewing = False
        self._renew_at = math.inf
        self._lease_s = math.inf
        self._lease_over_at = math.inf
        self.last_problem: tuple[str, float] | None = None
        """What became of a tunnel that was lost, and when (UNIX seconds)."""

    def retire(self) -> None:
        """No forward needs these any more: each tunnel ends with its last stream."""
        self._is_retired = True
        for tunnel in self._tunnels:
            tunnel.drain()

    @property
    def count(self) -> int:
        """Tunnels that are ready, those that drain too."""
        return sum(not tunnel.is_opening for tunnel in self._tunnels)

    @property
    def way(self) -> Way:
        """How it stands with the way to the target."""
        if self.count:
            return Way.OPEN
        return Way.OPENING if self._tunnels else WAYS.get(self._failed, Way.IDLE)

    async def relay(
        self,
        accepted: socket.socket,
        port: int,
        origin: Origin,
        proxy: ProxyVersion,
        carried: Carried | None = None,
    ) -> Ending:
        """Carry one connection, which is closed then unless the `Ending` has an error.

        Raises `RefusedError` when there is no tunnel to be had; the connection is untouched then.
        """
        deadline = trio.current_time() + OPEN_S
        turned_away = 0
        while True:
            tunnel = await self._usable(deadline, source_key(origin.client))
            try:
                return await tunnel.relay(accepted, port, origin, proxy, carried)
            except RetryError as error:
                turned_away += error.is_targets
            if turned_away >= _TRIES:
                raise RefusedError(f"{self._target} took none of {_TRIES} requests for a stream")

    async def _usable(self, deadline: float, user: Key) -> Tunnel:
        """A tunnel with room, made if there is none; `RefusedError` when that fails or takes too long."""
        while trio.current_time() < deadline:
            if self._is_retired:
                raise RefusedError(f"the forward to {self._target} is over")
            for tunnel in self._tunnels:
                if tunnel.has_room:
                    return tunnel
            with self._waiting_one(user, deadline):
                if any(tunnel.is_held_up for tunnel in self._tunnels):
                    await trio.sleep(_LOOK_S)
                    continue
                opening = next((t for t in self._tunnels if t.is_opening), None) or self._open()
                await opening.settled.wait()
                if opening.problem is not None:
                    kind = opening.refusal or Refusal.NO_CALL
                    raise RefusedError(f"no tunnel to {self._target}: {opening.problem}", kind)
        raise RefusedError(f"no tunnel to {self._target} within {OPEN_S:g} s")

    @contextmanager
    def _waiting_one(self, user: Key, deadline: float) -> Iterator[None]:
        """Where too many wait, the last one of whoever has most is refused, which may be this one."""
        waiter = _Waiter(Kind.SINGLE, self._target, self._service, user)
        displaced = self._waiting.add(waiter)
        try:
            if displaced is not None:
                displaced.is_refused = True
                displaced.scope.cancel()
            if not waiter.is_refused:
                with waiter.scope, trio.move_on_at(deadline):
                    yield
        finally:
            self._waiting.remove(waiter)
        if waiter.is_refused:
            raise RefusedError(f"{WAITING_MAX} connections wait for a tunnel to {self._target}", Refusal.BUSY)

    def _open(self) -> Tunnel:
        tunnel = Tunnel(self._relays, self._ports)
        self._tunnels.append(tunnel)
        self._tasks.start_soon(self._run, tunnel)
        return tunnel

    async def _run(self, tunnel: Tunnel) -> None:
        """One tunnel's whole life, with the calls that it takes until there is room for one."""
        problem: str | None = "the listener stops"
        deadline = self._calls.deadline()
        try:
            while True:
                async with self._calls.place(
                    Kind.MUX,
                    self._target,
                    self._service,
                    deadline=deadline,
                    users=lambda: {waiter.key for waiter in self._waiting},
                ) as place:
                    problem = await self._call(tunnel, place, self._keep)
                    if not tunnel.is_opening:
                        self._ended(tunnel, place, problem)
                        return
                    problem = problem or "the target closed it at once"
                    self._failed = tunnel.refusal or Refusal.NO_CALL
                    if not place.failed(problem, tunnel.status):
                        return
                tunnel.forget_call()
        except RefusedError as error:
            problem = str(error)
            tunnel.refusal = Refusal(error.kind)
        except Exception as bug:
            if self._relays.has_failed:
                raise
            self._relays.loop.bugs.note(bug)
            problem = A_BUG
        finally:
            self._tunnels.remove(tunnel)
            if tunnel.is_opening:
                tunnel.problem = problem
                tunnel.settled.set()

    def _ended(self, tunnel: Tunnel, place: Place, problem: str | None) -> None:
        """It was ready once. Whatever it ends by, the next one may not be a flood of calls."""
        if problem is None:
            if not tunnel.was_let_go:
                place.lost("the target gave a tunnel up")
            return
        place.lost(problem)
        if tunnel.is_revoked:
            inform(_logger, self._limit, "ended", f"dom0 has ended a tunnel to {self._target}")
            return
        message = f"a tunnel to {self._target} was lost: {problem}"
        warn(_logger, self._limit, "lost", message)
        self.last_problem = message, time.time()
        self._failed = Refusal.NO_CALL

    async def _renew(self) -> None:
        """Have dom0 asked anew. In the target the call begins the lease of every tunnel to these ports."""
        tunnel = Tunnel(self._relays, self._ports)
        problem: str | None = f"no answer within {_RENEW_S:g} s"
        try:
            with trio.move_on_after(_RENEW_S):
                async with self._calls.place(Kind.RENEWAL, self._target, self._service) as place:
                    problem = await self._call(tunnel, place, _end_at_once)
                    if tunnel.is_opening:
                        problem = problem or "the target closed it at once"
                        place.failed(problem, tunnel.status)
        except RefusedError as error:
            problem = str(error)
        except Exception as bug:
            if self._relays.has_failed:
                raise
            self._relays.loop.bugs.note(bug)
            problem = A_BUG
        finally:
            self._is_renewing = False
        if not tunnel.is_opening:
            self._leased(tunnel)
            return
        now = trio.current_time()
        again_s = min(_RENEW_AGAIN_MAX_S, self._lease_s * _RENEW_AGAIN_SHARE)
        self._renew_at = now + again_s
        left_s = max(0, self._lease_over_at - now)
        message = (
            f"the lease of tunnels to {self._target} was not renewed: {problem}; unless it is, their "
            f"connections end in {left_s:.0f} s"
        )
        warn(_logger, self._limit, "lease", message)

    def _leased(self, tunnel: Tunnel) -> None:
        """dom0 has said yes just now."""
        self._lease_s = tunnel.lease_s
        self._renew_at = tunnel.ready_at + tunnel.lease_s * RENEW_AT_SHARE
        self._lease_over_at = tunnel.ready_at + tunnel.lease_s

    async def _call(
        self, tunnel: Tunnel, place: Place, keep: Callable[[Tunnel], Awaitable[None]]
    ) -> str | None:
        """Why the tunnel ended, unless it was as agreed; ``keep`` looks after it meanwhile."""
        try:
            async with open_call(self._client, self._target, self._service) as call:
                problem = await self._drive(tunnel, place, call, keep)
                status = None if problem is None else await call.status(_STATUS_WAIT_S)
        except OSError as error:
            return f"cannot start {self._client[0]}: {error.strerror}"
        tunnel.status = status
        if not status:
            return problem
        is_told = tunnel.mux is not None and tunnel.mux.is_peer_wrong
        if not tunnel.is_opening:
            return problem if tunnel.is_revoked else f"{problem}; {meaning(status, is_through=True)}"
        tunnel.refusal = refusal(status)
        # That the call's bytes ended says nothing more where it never came through; what they said does.
        return problem if is_told else meaning(status, is_through=place.is_through)

    async def _drive(
        self, tunnel: Tunnel, place: Place, call: Call, keep: Callable[[Tunnel], Awaitable[None]]
    ) -> str | None:
        place.holder = tunnel
        tunnel.place = place
        late = ""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep, tunnel)

            @nursery.start_soon
            async def watch() -> None:
                """End a call that hangs: before the target has taken it, or before it has said HELLO."""
                nonlocal late
                with trio.move_on_after(OPEN_S):
                    await call.wait_through(tunnel.settled.is_set)
                    place.through()
                if place.is_through:
                    with trio.move_on_after(HELLO_S):
                        await tunnel.settled.wait()
                        return
                    late = f"no HELLO within {HELLO_S:g} s"
                else:
                    late = f"{self._target} has not taken the call within {OPEN_S:g} s"
                nursery.cancel_scope.cancel()

            problem: str | None = None
            try:
                problem = await tunnel.run(call, self._budget, self._half_close_s, self._idle_s)
            except OSError as error:
                problem = f"cannot watch the call: {error.strerror}"
            nursery.cancel_scope.cancel()
        return late or problem

    async def _keep(self, tunnel: Tunnel) -> None:
        """Let a tunnel end that has had no streams for a while, and renew the lease of one that has some."""
        await tunnel.settled.wait()
        self._failed = ""
        self._leased(tunnel)
        while not self._is_retired:
            now = trio.current_time()
            if (tunnel.quiet_s or 0.0) >= (self._linger_s if tunnel.opened else LINGER_S):
                break
            if now >= self._renew_at and tunnel.streams and not tunnel.is_draining and not self._is_renewing:
                self._is_renewing = True
                self._tasks.start_soon(self._renew)
            await trio.sleep(_LOOK_S)
        tunnel.drain()


async def _end_at_once(tunnel: Tunnel) -> None:
    """All that was wanted of it is that dom0 and the target let it be."""
    await tunnel.settled.wait()
    tunnel.drain()
