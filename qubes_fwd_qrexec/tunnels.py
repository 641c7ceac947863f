# SPDX-License-Identifier: GPL-2.0-or-later
"""The exposed qube's tunnels to one target: opened when a connection comes, kept a while, replaced in time.

A tunnel is one qrexec call, which dom0 judges. It takes streams until its lease is over or it is full;
then the next connection opens another, which dom0 judges afresh, and the old one ends with its last
stream. While it is in use its lease is renewed before it is over, by one more call that dom0 judges and
that ends at once: else each connection that stays open would in the end hold a call of its own. A tunnel
that cannot be opened is not tried again at once: connections must not flood dom0.
"""

import logging
import math
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio

from .budget import Budget
from .bugs import BugError
from .call import Ending
from .counters import WAYS, Carried, Refusal
from .errors import RefusedError
from .exitstatus import meaning, refusal
from .listenertunnel import RetryError, Tunnel
from .logs import RateLimit, inform, warn
from .qrexec import Call, open_call
from .relaythread import RelayThread
from .report import Way
from .targets import Target
from .tunnel import Origin, ProxyVersion
from .values import TargetPorts

_logger = logging.getLogger(__name__)
# relay-behaviours 26: a target that never says HELLO.
HELLO_S = 30.0
# A browser's next request, a user's next click: a tunnel without streams is kept for so long.
LINGER_S = 60.0
# relay-behaviours 25: connections that wait for a tunnel are bounded in number; HELLO_S bounds their time.
WAITING_MAX = 1024
# A tunnel that has lived for so long, or for its lease, was none that the target gives up at once.
_PROVEN_S = 10.0
# How long before the lease of a tunnel in use is over dom0 is asked again, and after how long once more where
# that came to nothing: twice more, before new connections would have to wait for a tunnel of their own.
RENEW_BEFORE_S = 60.0
_RENEW_AGAIN_S = 20.0
# How often a stream is asked for again that the target would not have begun.
_TRIES = 3
# After the call has ended its exit status comes, or never does.
_STATUS_WAIT_S = 0.2
_LOOK_S = 1.0


class Tunnels:
    """All tunnels to one target and one range of its ports; a call's argument names both."""

    def __init__(
        self,
        client: tuple[str, ...],
        target: Target,
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
        self._waiting = 0
        self._is_retired = False
        self._failed = ""
        self._is_renewing = False
        self._renew_at = math.inf

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
        deadline = trio.current_time() + HELLO_S
        turned_away = 0
        while True:
            tunnel = await self._usable(deadline)
            try:
                return await tunnel.relay(accepted, port, origin, proxy, carried)
            except RetryError as error:
                turned_away += error.is_targets
            if turned_away >= _TRIES:
                raise RefusedError(f"{self._target.name} took none of {_TRIES} requests for a stream")

    async def _usable(self, deadline: float) -> Tunnel:
        """A tunnel with room, made if there is none; `RefusedError` when that fails or takes too long."""
        while trio.current_time() < deadline:
            if self._is_retired:
                raise RefusedError(f"the forward to {self._target.name} is over")
            for tunnel in self._tunnels:
                if tunnel.has_room:
                    return tunnel
            with self._waiting_one(), trio.move_on_at(deadline):
                if any(tunnel.is_held_up for tunnel in self._tunnels):
                    await trio.sleep(_LOOK_S)
                    continue
                opening = next((t for t in self._tunnels if t.is_opening), None) or self._open()
                await opening.settled.wait()
                if opening.problem is not None:
                    kind = opening.refusal or Refusal.NO_CALL
                    raise RefusedError(f"no tunnel to {self._target.name}: {opening.problem}", kind)
        raise RefusedError(f"no tunnel to {self._target.name} within {HELLO_S:g} s")

    @contextmanager
    def _waiting_one(self) -> Iterator[None]:
        if self._waiting >= WAITING_MAX:
            raise RefusedError(
                f"{WAITING_MAX} connections wait for a tunnel to {self._target.name}", Refusal.BUSY
            )
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def _open(self) -> Tunnel:
        self._target.check_back_off(self._service)
        tunnel = Tunnel(self._relays, self._ports, self._given_up)
        self._tunnels.append(tunnel)
        self._tasks.start_soon(self._run, tunnel)
        return tunnel

    async def _run(self, tunnel: Tunnel) -> None:
        """One tunnel's whole life, with the call that it is made of and one of the target's slots."""
        problem: str | None = "the listener stops"
        try:
            async with self._target.slot(self._service):
                problem = await self._call(tunnel, self._keep)
                if tunnel.is_opening:
                    problem = problem or "the target closed it at once"
                    tunnel.refusal = self._failed = tunnel.refusal or Refusal.NO_CALL
                    self._target.refused(self._service, problem)
                elif problem is not None:
                    if tunnel.is_revoked:
                        inform(
                            _logger, self._limit, "ended", f"dom0 has ended a tunnel to {self._target.name}"
                        )
                    else:
                        message = f"a tunnel to {self._target.name} was lost: {problem}"
                        warn(_logger, self._limit, "lost", message)
                    # A target can say either, and neither may be a flood of calls.
                    self._target.lost(self._service, problem)
                else:
                    self._given_up(tunnel)
        except RefusedError as error:
            problem = str(error)
            tunnel.refusal = error.kind
        except Exception as bug:
            if self._relays.has_failed:
                raise
            self._relays.loop.bugs.note(bug)
            problem = BugError().strerror
        finally:
            self._tunnels.remove(tunnel)
            if tunnel.is_opening:
                tunnel.problem = problem
                tunnel.settled.set()

    async def _renew(self) -> None:
        """Have dom0 asked anew. In the target the call begins the lease of every tunnel to these ports."""
        tunnel = Tunnel(self._relays, self._ports, lambda _: None)
        try:
            async with self._target.slot(self._service):
                problem = await self._call(tunnel, _end_at_once)
                if tunnel.is_opening:
                    problem = problem or "the target closed it at once"
                    self._target.refused(self._service, problem)
        except RefusedError as error:
            problem = str(error)
        except Exception as bug:
            if self._relays.has_failed:
                raise
            self._relays.loop.bugs.note(bug)
            problem = BugError().strerror
        finally:
            self._is_renewing = False
        if tunnel.is_opening:
            self._renew_at = trio.current_time() + _RENEW_AGAIN_S
            message = f"the lease of tunnels to {self._target.name} was not renewed: {problem}"
            warn(_logger, self._limit, "lease", message)
        else:
            self._leased(tunnel)

    def _leased(self, tunnel: Tunnel) -> None:
        """dom0 has said yes just now; a lease that is no longer than that is never renewed."""
        renew_in_s = tunnel.lease_s - RENEW_BEFORE_S
        self._renew_at = tunnel.ready_at + renew_in_s if renew_in_s > 0 else math.inf

    async def _call(self, tunnel: Tunnel, keep: Callable[[Tunnel], Awaitable[None]]) -> str | None:
        """Why the tunnel ended, unless it was as agreed; ``keep`` looks after it meanwhile."""
        try:
            async with open_call(self._client, self._target.name, self._service) as call:
                problem = await self._drive(tunnel, call, keep)
                status = None if problem is None else await call.status(_STATUS_WAIT_S)
        except OSError as error:
            return f"cannot start {self._client[0]}: {error.strerror}"
        if not status:
            return problem
        if not tunnel.is_opening:
            return problem if tunnel.is_revoked else f"{problem}; {meaning(status)}"
        tunnel.refusal = refusal(status)
        # That the call's bytes ended says nothing more where it never came through; what they said does.
        is_told = tunnel.mux is not None and tunnel.mux.is_peer_wrong
        return problem if is_told else meaning(status)

    async def _drive(
        self, tunnel: Tunnel, call: Call, keep: Callable[[Tunnel], Awaitable[None]]
    ) -> str | None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep, tunnel)
            try:
                problem = await tunnel.run(call, self._budget, self._half_close_s, self._idle_s)
            except OSError as error:
                problem = f"cannot watch the call: {error.strerror}"
            nursery.cancel_scope.cancel()
        return problem

    async def _keep(self, tunnel: Tunnel) -> None:
        """Let a tunnel end that has had no streams for a while, and renew the lease of one that has some."""
        await tunnel.settled.wait()
        self._failed = ""
        self._leased(tunnel)
        idle_since = tunnel.ready_at
        opened = 0
        is_proven = False
        while not self._is_retired:
            now = trio.current_time()
            if tunnel.streams or tunnel.opened != opened:
                idle_since, opened = now, tunnel.opened
            elif now - idle_since >= (self._linger_s if opened else LINGER_S):
                break
            if not is_proven and now - tunnel.ready_at >= _PROVEN_S:
                is_proven = True  # said once: a refusal that comes later is no older for it
                self._target.accepted(self._service)
            if now >= self._renew_at and tunnel.streams and not tunnel.is_draining and not self._is_renewing:
                self._is_renewing = True
                self._tasks.start_soon(self._renew)
            await trio.sleep(_LOOK_S)
        tunnel.drain()

    def _given_up(self, tunnel: Tunnel) -> None:
        """The target wants no more streams on it. If that came too soon, it may not go on like this: each
        tunnel is a question to dom0."""
        lived_s = trio.current_time() - tunnel.ready_at
        if not tunnel.is_spent and lived_s < min(_PROVEN_S, tunnel.lease_s):
            self._target.lost(self._service, "the target gave a tunnel up at once")
        tunnel.is_spent = True


async def _end_at_once(tunnel: Tunnel) -> None:
    """All that was wanted of it is that dom0 and the target let it be."""
    await tunnel.settled.wait()
    tunnel.drain()
