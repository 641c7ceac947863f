# SPDX-License-Identifier: GPL-2.0-or-later
"""The exposed qube's mux calls to one target: opened when needed, kept for a while, renewed in time.

A mux call is one qrexec call, which dom0 judges. It takes streams, or flows, until its lease is over or it
is full. Then the next one opens another call, which dom0 judges anew, and the old call ends with the last
that it carries. While a mux call is in use its lease is renewed long before it ends, by one more call that
dom0 judges and that ends at once; the target cuts mux calls that are not renewed. All these calls count in
`callbudget`, which also keeps clients from flooding dom0 with calls. `streampool` and `flowpool` have what
is carried.
"""

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from typing import Any, Generic, TypeVar

import trio

from qubes_fwd_qrexec.common.errors import RefusedError
from qubes_fwd_qrexec.common.exitstatus import meaning, refusal
from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.common.report import Way
from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.relay.thread import RelayThread
from qubes_fwd_qrexec.system.bugs import A_BUG
from qubes_fwd_qrexec.system.logs import RateLimit, inform, warn

from .callbudget import CallBudget
from .callplace import Place
from .callqueue import Key, Kind
from .counters import WAYS
from .muxcall import MuxCall
from .qrexec import Call, open_call

_logger = logging.getLogger(__name__)
# As long as qrexec-client-vm waits for the data connection of a started target (agent/qrexec-client-vm.c).
OPEN_S = 120.0
# docs/behaviours.md, 26: a target that has taken the call and never says HELLO.
HELLO_S = 30.0
# A mux call that carries nothing is kept for so long: for a browser's next request, or a user's next click.
LINGER_S = 60.0
# When to renew a lease: once so much of it is over, and again after each tenth of it, or every 20 s.
RENEW_AT_SHARE = 0.5
_RENEW_AGAIN_SHARE = 0.1
_RENEW_AGAIN_MAX_S = 20.0
# A renewal that hangs holds up others, and the next try may succeed.
_RENEW_S = 30.0
# For how long a call that has ended as agreed may pass on what it has taken: killed, it would lose that.
_LAST_S = 10.0
# The exit status comes this soon after the end of the call, or never.
_STATUS_WAIT_S = 0.2
LOOK_S = 1.0

C = TypeVar("C", bound=MuxCall[Any])


class MuxPool(ABC, Generic[C]):
    """All mux calls to one target and one range of its ports; a call's argument names both.

    ``qrexec_client``: the command that makes the next call. ``mux_calls``: those that are not over.
    ``is_renewing``: dom0 is being asked to renew the lease.
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
        linger_s: float = LINGER_S,
    ) -> None:
        self.qrexec_client = qrexec_client
        self._calls = calls
        self.target = target
        self.service = service
        self.ports = ports
        self.relays = relays
        self._tasks = tasks
        self._linger_s = linger_s
        self.mux_calls: list[C] = []
        self._limit = RateLimit()
        self.is_retired = False
        self._failed = ""
        self.is_renewing = False
        self._renew_at = math.inf
        self._lease_s = math.inf
        self._lease_over_at = math.inf
        self.last_problem: tuple[str, float] | None = None
        """Why a mux call was last lost, and when (UNIX seconds)."""

    @abstractmethod
    def make_call(self) -> C:
        """A mux call that was not made yet."""

    @abstractmethod
    def users(self) -> Collection[Key]:
        """The clients for which there is no mux call yet."""

    @abstractmethod
    def _settled(self, kind: Refusal, problem: str | None) -> None:
        """In the loop's thread: a call that was asked for is ready, or never will be for this ``problem``."""

    @abstractmethod
    def _stop_asking(self) -> None:
        """In the loop's thread: there was a bug when a call was settled."""

    def retire(self) -> None:
        """No forward needs the pool any more: each mux call ends with the last that it carries."""
        self.is_retired = True
        for mux_call in self.mux_calls:
            mux_call.drain()

    @property
    def count(self) -> int:
        """How many mux calls are ready, including draining ones."""
        return sum(not mux_call.is_opening for mux_call in self.mux_calls)

    @property
    def way(self) -> Way:
        """The state of the way to the target."""
        if self.count:
            return Way.OPEN
        return Way.OPENING if self.mux_calls else WAYS.get(self._failed, Way.IDLE)

    def opening(self) -> C:
        """The mux call that is being opened: from now on, if none is."""
        found = next((mux_call for mux_call in self.mux_calls if mux_call.is_opening), None)
        if found is None:
            found = self.make_call()
            self.mux_calls.append(found)
            self._tasks.start_soon(self._run, found)
        return found

    def _ask(self) -> None:
        """Have a call opened, and tell the loop's thread what becomes of it."""
        if not self.is_retired:
            self._tasks.start_soon(self._await, self.opening())
        else:
            over = f"the forward to {self.target} is over"
            self.relays.order(partial(self._settled, Refusal.NO_CALL, over), self._stop_asking)

    async def _await(self, opening: C) -> None:
        await opening.settled.wait()
        kind = opening.refusal or Refusal.NO_CALL
        self.relays.order(partial(self._settled, kind, opening.problem), self._stop_asking)

    async def _run(self, mux_call: C) -> None:
        """The whole life of a mux call, including calls that find no room and are made again."""
        problem: str | None = "the listener stops"
        deadline = self._calls.deadline()
        try:
            while True:
                async with self._calls.place(
                    Kind.MUX,
                    self.target,
                    self.service,
                    deadline=deadline,
                    users=self.users,
                ) as place:
                    problem = await self._call(mux_call, place, self._keep)
                    if not mux_call.is_opening:
                        self._ended(mux_call, place, problem)
                        return
                    problem = problem or "the target closed it at once"
                    self._failed = mux_call.refusal or Refusal.NO_CALL
                    if not place.failed(problem, mux_call.status):
                        return
                mux_call.forget_call()
        except RefusedError as error:
            problem = str(error)
            mux_call.refusal = Refusal(error.kind)
        except Exception as bug:
            if self.relays.has_failed:
                raise
            self.relays.loop.bugs.note(bug)
            problem = A_BUG
        finally:
            self.mux_calls.remove(mux_call)
            if mux_call.is_opening:
                mux_call.problem = problem
                mux_call.settled.set()

    def _ended(self, mux_call: C, place: Place, problem: str | None) -> None:
        """A mux call that was ready has ended. However it ended, that must not cause a flood of calls."""
        if problem is None:
            if not mux_call.was_let_go:
                place.lost("the target gave a mux call up")
            return
        place.lost(problem)
        if mux_call.is_revoked:
            inform(_logger, self._limit, "ended", f"dom0 has ended a mux call to {self.target}")
            return
        message = f"a mux call to {self.target} was lost: {problem}"
        warn(_logger, self._limit, "lost", message)
        self.last_problem = message, time.time()
        self._failed = Refusal.NO_CALL

    async def _renew(self) -> None:
        """Make a call that dom0 judges. In the target it renews the lease of all mux calls to these ports."""
        mux_call = self.make_call()
        problem: str | None = f"no answer within {_RENEW_S:g} s"
        try:
            with trio.move_on_after(_RENEW_S):
                async with self._calls.place(Kind.RENEWAL, self.target, self.service) as place:
                    problem = await self._call(mux_call, place, _end_at_once)
                    if mux_call.is_opening:
                        problem = problem or "the target closed it at once"
                        place.failed(problem, mux_call.status)
        except RefusedError as error:
            problem = str(error)
        except Exception as bug:
            if self.relays.has_failed:
                raise
            self.relays.loop.bugs.note(bug)
            problem = A_BUG
        finally:
            self.is_renewing = False
        if not mux_call.is_opening:
            self._leased(mux_call)
            return
        now = trio.current_time()
        again_s = min(_RENEW_AGAIN_MAX_S, self._lease_s * _RENEW_AGAIN_SHARE)
        self._renew_at = now + again_s
        left_s = max(0, self._lease_over_at - now)
        message = (
            f"the lease of mux calls to {self.target} was not renewed: {problem}; unless it is, their "
            f"connections end in {left_s:.0f} s"
        )
        warn(_logger, self._limit, "lease", message)

    def _leased(self, mux_call: C) -> None:
        """dom0 has just allowed a call, which begins the lease anew."""
        self._lease_s = mux_call.lease_s
        self._renew_at = mux_call.ready_at + mux_call.lease_s * RENEW_AT_SHARE
        self._lease_over_at = mux_call.ready_at + mux_call.lease_s

    async def _call(self, mux_call: C, place: Place, keep: Callable[[C], Awaitable[None]]) -> str | None:
        """Make the call, with ``keep`` as a task beside it. Returns why it ended; None if as agreed."""
        try:
            async with open_call(self.qrexec_client, self.target, self.service) as call:
                problem = await self._drive(mux_call, place, call, keep)
                if problem is None:
                    await call.over(_LAST_S)
                status = None if problem is None else await call.status(_STATUS_WAIT_S)
                if call.is_through:  # it may have ended before anybody looked
                    place.through()
        except OSError as error:
            return f"cannot start {self.qrexec_client[0]}: {error.strerror}"
        mux_call.status = status
        if not status:
            return problem
        is_told = mux_call.mux is not None and mux_call.mux.is_peer_wrong
        if not mux_call.is_opening:
            return problem if mux_call.is_revoked else f"{problem}; {meaning(status, is_through=True)}"
        mux_call.refusal = refusal(status)
        # If the call never got through, its exit status says more than the end of its bytes.
        return problem if is_told else meaning(status, is_through=place.is_through)

    async def _drive(
        self, mux_call: C, place: Place, call: Call, keep: Callable[[C], Awaitable[None]]
    ) -> str | None:
        place.holder = mux_call
        mux_call.place = place
        late = ""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep, mux_call)

            @nursery.start_soon
            async def watch() -> None:
                """End a call that hangs: before the target has taken it, or before it has said HELLO."""
                nonlocal late
                with trio.move_on_after(OPEN_S):
                    await call.wait_through(mux_call.settled.is_set)
                    place.through()
                if place.is_through:
                    with trio.move_on_after(HELLO_S):
                        await mux_call.settled.wait()
                        return
                    late = f"no HELLO within {HELLO_S:g} s"
                else:
                    late = f"{self.target} has not taken the call within {OPEN_S:g} s"
                nursery.cancel_scope.cancel()

            problem: str | None = None
            try:
                problem = await mux_call.run(call)
            except OSError as error:
                problem = f"cannot watch the call: {error.strerror}"
            nursery.cancel_scope.cancel()
        return late or problem

    async def _keep(self, mux_call: C) -> None:
        """Renew the lease of a mux call while it carries something, and end it after a while without."""
        await mux_call.settled.wait()
        self._failed = ""
        self._leased(mux_call)
        while not self.is_retired:
            now = trio.current_time()
            if (mux_call.quiet_s or 0.0) >= (self._linger_s if mux_call.opened else LINGER_S):
                break
            if (
                now >= self._renew_at
                and mux_call.carries
                and not mux_call.is_draining
                and not self.is_renewing
            ):
                self.is_renewing = True
                self._tasks.start_soon(self._renew)
            await trio.sleep(LOOK_S)
        mux_call.drain()


async def _end_at_once(mux_call: MuxCall[Any]) -> None:
    """A renewal only needs dom0 to allow the call and the target to answer it."""
    await mux_call.settled.wait()
    mux_call.drain()
