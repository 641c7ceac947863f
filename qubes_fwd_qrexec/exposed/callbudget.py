# SPDX-License-Identifier: GPL-2.0-or-later
"""All qrexec calls of this qube together: how many there may be, and who waits for one.

A calling qube has room for 30 vchans, over all targets and including everything else that it calls:
qrexec-client-vm takes 33 of the 1,024 grant pages of xen-gntalloc for each, or 17 for a single call, whose
buffers are smaller. So the listener has one budget for all its calls. It counts calls and not pages, so the
smaller size of single calls benefits the rest of the qube. Part of the budget is reserved for mux calls,
since each of those carries thousands of connections, and renewals have room on top of it. A target that has
a call leaves a place for each target that has none. Calls beyond the budget wait in a bounded queue
(`callqueue`). The least recently used of the idle mux calls makes room at once. If no call ends by itself for
a moment, something else does: the idlest connection of a client that has more than its share, or the idlest
mux call that such a client has to itself.

A call that is refused beside live calls to its target, or for lack of a vchan beside any other, has found no
room: it is made again when another ends, and now and then. A call that is refused on its own is refused to
everybody who waits for the same one (`brake`). A refusal by dom0 has the same exit status as a full target,
and lack of a vchan that of a target which does not take the call. So a service that was never allowed since
the last change of the configuration counts as refused after a few seconds. Nobody can tell whose fault it
is, so what the calls to a target meet holds back calls to that target alone, and ends nothing that is in use
by others.
"""

import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager

import trio

from qubes_fwd_qrexec.common.config import CALLS_MAX
from qubes_fwd_qrexec.common.errors import RefusedError
from qubes_fwd_qrexec.common.exitstatus import ExitStatus, meaning, refusal
from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.system.bugs import Bugs

from .brake import Brake
from .callplace import Place
from .callqueue import CallQueue, Key, Kind, Wanted
from .callwaits import CallWaits
from .idlest import idlest_mux_call, idlest_of_one_user, idlest_single

# Renewals on top of the budget: otherwise mux calls that take up all of it could not be renewed.
RENEWALS_MAX = 2
# On Qubes 4.3 calls that begin together fail, as xenstored allows a qube ten transactions at once.
BEGIN_MAX = 4
# Those to one target, which may be slow to take them, leave a place to others, if there are any.
BEGIN_OF_ONE_MAX = BEGIN_MAX - 1
# A call that takes longer than this waits for its target to start, and no longer for xenstored.
BEGIN_S = 5.0
# At most a quarter of the budget is reserved for mux calls, and as much for targets that have no call.
_RESERVED_SHARE = 4
# How often to look at the queue, in addition to whenever a call ends. So soon after it has found no room a
# target may try again when one does; and for whoever has waited for so long a connection may be ended.
LOOK_S = 0.25


class Waiting(Wanted):
    """A call that a task waits for, ``since`` when; ``users`` says which clients wait for it."""

    __slots__ = ("error", "place", "settled", "since", "users")

    def __init__(
        self, kind: Kind, target: str, service: str, key: Key, users: Callable[[], Collection[Key]]
    ) -> None:
        super().__init__(kind, target, service, key)
        self.users = users
        self.since = trio.current_time()
        self.settled = trio.Event()
        self.place: Place | None = None
        self.error: RefusedError | None = None

    def refuse(self, error: RefusedError) -> None:
        self.error = error
        self.settled.set()


class CallBudget:
    """One for each listener. In ``tasks`` it runs a task while anybody waits."""

    def __init__(
        self,
        tasks: trio.Nursery,
        calls_max: int = CALLS_MAX,
        queue: CallQueue[Waiting] | None = None,
        bugs: Bugs | None = None,
        waits: CallWaits | None = None,
    ) -> None:
        self.calls_max = calls_max
        self._waits = waits or CallWaits()
        self._bugs = bugs or Bugs()
        self._tasks = tasks
        self._reserved = 0
        self._expected: frozenset[str] = frozenset()
        """The targets that may want calls."""
        self._kept = 0
        """How many places are kept for those of them that have none."""
        self._queue = CallQueue[Waiting]() if queue is None else queue
        self._places: set[Place] = set()
        self._singles = 0
        self._calls_to = Counter[str]()
        self._targets: dict[str, Brake] = {}
        self._services: dict[tuple[str, str], Brake] = {}
        self._full_until: dict[tuple[str, str], float] = {}
        """Until when a refusal of the service beside live calls may mean a full target."""
        self._freed_at = -math.inf
        """When a call that had room ended last."""
        self._is_looking = False

    @property
    def calls(self) -> int:
        """Calls under way."""
        return len(self._places)

    @property
    def waiting(self) -> int:
        """How many calls wait."""
        return len(self._queue)

    def calls_to(self, target: str) -> int:
        """Calls under way to one target."""
        return self._calls_to[target]

    @property
    def singles_max(self) -> int:
        """How many single calls there may be."""
        return self.calls_max - self._reserved

    def expect(self, mux_calls: int, targets: Iterable[str] = ()) -> None:
        """Reserve room, within bounds, for so many mux calls, and for each of these targets."""
        self._reserved = min(mux_calls, self.calls_max // _RESERVED_SHARE)
        self._expected = frozenset(targets)
        self._keep_room()

    def forget_refusals(self) -> None:
        """The configuration has changed, and dom0's policy perhaps with it: try again at once."""
        self._targets.clear()
        self._services.clear()
        self._full_until.clear()
        self._look()

    def deadline(self) -> float:
        """Until when a call that is wanted now may wait (trio's clock), however often it is made."""
        return trio.current_time() + self._waits.wait_s

    @asynccontextmanager
    async def place(
        self,
        kind: Kind,
        target: str,
        service: str,
        key: Key = (),
        deadline: float | None = None,
        users: Callable[[], Collection[Key]] | None = None,
    ) -> AsyncIterator[Place]:
        """Wait for a place for one call of ``service`` (``NAME+ARGUMENT``); the call must end with the block.

        ``users`` says for which clients it is: by default the one in ``key``, which begins with the rule.

        Raises `RefusedError` if there is no place before ``deadline`` (by default `deadline`), or the same
        call is refused meanwhile.
        """
        waiting = Waiting(kind, target, service, key, users or (lambda: [key[1:]]))
        if deadline is None:
            deadline = self.deadline()
        elif trio.current_time() >= deadline:
            raise self._no_room(waiting)
        if (displaced := self._queue.add(waiting)) is not None:
            displaced.refuse(RefusedError(f"too many connections wait for a call to {target}", Refusal.BUSY))
        try:
            self._look_at(waiting)
            with trio.move_on_at(deadline):
                await waiting.settled.wait()
            if waiting.error is not None:
                raise waiting.error
            if waiting.place is None:
                raise self._no_room(waiting)
            yield waiting.place
        finally:
            self._queue.remove(waiting)
            if waiting.place is not None:
                self._end(waiting.place)

    # Reports of places

    def is_through(self, place: Place) -> None:
        if not place.is_through:
            self._note_through(place)
            self._look()

    def _note_through(self, place: Place) -> None:
        place.is_through = True
        for brake, _ in self._brakes(place.wanted):
            brake.is_through(place)
        named = place.wanted.target, place.wanted.service
        self._services.pop(named, None)
        self._full_until[named] = math.inf

    def failed(self, place: Place, why: str, status: int | None) -> bool:
        wanted = place.wanted
        place.has_failed = True
        again_at = place.began_at + self._waits.again_s
        others = [] if place.is_through else self._beside(place, status)
        living = sum(other.wanted.target == wanted.target for other in others)
        # Who had the room may be over before this is heard of.
        may_be_room = others or (not place.is_through and place.began_at <= self._freed_at)
        if status == ExitStatus.NO_ROOM and may_be_room and self._may_be_full(wanted):
            now = trio.current_time()
            self._target(wanted).in_vain(living, again_at, meaning(status), now, LOOK_S)
            return True
        is_renewal = wanted.kind is Kind.RENEWAL
        if status == ExitStatus.REFUSED and living and not is_renewal and self._may_be_full(wanted):
            full = f"{wanted.target} takes no more than {living} calls of this qube, or dom0 refuses this one"
            self._target(wanted).put_on(living, again_at, full)
            return True
        self._service(wanted).put_on(0, again_at, why, refusal(status))
        for waiting in list(self._queue):
            is_same = (waiting.target, waiting.service) == (wanted.target, wanted.service)
            if is_same and waiting.kind is not Kind.RENEWAL:
                self._queue.remove(waiting)
                waiting.refuse(RefusedError(why, refusal(status)))
        return False

    def _beside(self, place: Place, status: int | None) -> list[Place]:
        """The calls that may have taken the room that one which failed has not found.

        A call takes its vchan, and a transaction of xenstored, while it begins. It takes a slot of its target
        after dom0's answer: then it has been through for longer than anybody needs to notice, unless many
        wait for a target to start, which answers all of them at once.
        """
        now = trio.current_time()
        is_here = status == ExitStatus.NO_ROOM
        return [
            other
            for other in self._places
            if other is not place
            and not other.has_failed
            and (is_here or other.is_through or now - other.began_at >= BEGIN_S)
        ]

    def _may_be_full(self, wanted: Wanted) -> bool:
        now = trio.current_time()
        return now < self._full_until.setdefault((wanted.target, wanted.service), now + self._waits.doubt_s)

    def lost(self, place: Place, why: str) -> None:
        if not place.is_through:  # it was, and a later report must not release the brake
            self._note_through(place)
        self._service(place.wanted).put_on(0, place.began_at + self._waits.again_s, why, Refusal.NO_CALL)

    # Who is next

    def _look(self) -> None:
        """Let the calls begin that may, and make room for the rest."""
        now = trio.current_time()
        while (wanted := self._next(now)) is not None:
            self._begin(wanted, now)
        if self._queue:
            self._make_room(now)
            if not self._is_looking:
                self._is_looking = True
                self._tasks.start_soon(self._keep_looking)

    async def _keep_looking(self) -> None:
        """Look again while anybody waits: some calls become possible with time alone."""
        try:
            while self._queue:
                await trio.sleep(LOOK_S)
                # It belongs to nobody, so a bug in it ends nobody: every wait has its own bound.
                self._bugs.guarded(lambda: None, self._look)
        finally:
            self._is_looking = False

    def _look_at(self, newcomer: Waiting) -> None:
        """The others that wait were looked at when something changed, and there may be many."""
        now = trio.current_time()
        if len(self._queue) == 1:
            self._look()
        elif self._may_begin(newcomer, self._beginning(now), now):
            self._begin(newcomer, now)

    def _next(self, now: float) -> Waiting | None:
        """The one that may begin now and is served first."""
        beginning = self._beginning(now)
        if beginning.total() >= BEGIN_MAX:
            return None
        return self._queue.first(lambda one: self._may_begin(one, beginning, now))

    def _begin(self, wanted: Waiting, now: float) -> None:
        self._queue.begin(wanted)
        wanted.place = Place(self, wanted, now)
        for brake, living in self._brakes(wanted):
            brake.begins(wanted.place, living, now)
        self._places.add(wanted.place)
        self._count(wanted, 1)
        wanted.settled.set()

    def _beginning(self, now: float) -> Counter[str]:
        """How many calls begin, by target."""
        return Counter(
            place.wanted.target
            for place in self._places
            if not place.is_through and now - place.began_at < BEGIN_S
        )

    def _may_begin(self, wanted: Wanted, beginning: Counter[str], now: float) -> bool:
        is_alone = self._expected <= {wanted.target}
        return (
            beginning[wanted.target] < (BEGIN_MAX if is_alone else BEGIN_OF_ONE_MAX)
            and beginning.total() < BEGIN_MAX
            and self._has_room(wanted)
            and all(brake.admits(living, now) for brake, living in self._brakes(wanted))
        )

    def _has_room(self, wanted: Wanted) -> bool:
        """Whether the budget has room for it."""
        if wanted.kind is Kind.RENEWAL:
            return self.calls < self.calls_max + RENEWALS_MAX
        if self.calls >= self.calls_max or (wanted.kind is Kind.SINGLE and self._singles >= self.singles_max):
            return False
        return self._leaves_room(wanted.target)

    def _leaves_room(self, target: str) -> bool:
        """Whether one more call to the target leaves a place to each that has none; its first one may not."""
        return not self._calls_to[target] or self.calls + self._kept < self.calls_max

    def _make_room(self, now: float) -> None:
        """End a call for the first one in the queue which has no room, and to which that gives some."""
        seen = set[tuple[str, Kind, bool]]()
        for wanted in self._queue:
            has_waited = now - wanted.since >= LOOK_S  # where many come and go, a call ends by itself
            if (wanted.target, wanted.kind, has_waited) in seen:
                continue  # whoever comes before it holds less
            seen.add((wanted.target, wanted.kind, has_waited))
            brake = self._target(wanted)
            is_renewal = wanted.kind is Kind.RENEWAL
            is_braked = not is_renewal and not brake.admits(self.calls_to(wanted.target), now)
            if self._has_room(wanted) and not is_braked:
                continue
            everybody = list(self._places)
            own = [place for place in everybody if place.wanted.target == wanted.target]
            leaves_room = self._leaves_room(wanted.target)
            used = everybody if leaves_room and not is_braked else own
            unused = everybody if leaves_room and (not is_braked or brake.waits_for_any) else own
            if any(place.makes_room for place in unused):
                continue  # that one will end soon
            found = idlest_mux_call(unused)
            if found is None and has_waited:
                found = idlest_single(used, wanted.key, self._queue)
                found = found or idlest_of_one_user(used, wanted.users(), everybody)
            if found is not None:
                found.make_room()
                return

    def _end(self, place: Place) -> None:
        self._places.discard(place)
        self._count(place.wanted, -1)
        self._queue.release(place.wanted.key)
        for brake, _ in self._brakes(place.wanted):
            brake.ended(place)
        if not place.has_failed:
            self._freed_at = trio.current_time()
            for brake in self._targets.values():
                brake.hasten()
        self._look()

    def _count(self, wanted: Wanted, change: int) -> None:
        self._calls_to[wanted.target] += change
        if wanted.kind is Kind.SINGLE:
            self._singles += change
        self._keep_room()

    def _keep_room(self) -> None:
        """Keep a place for each target that has none, within bounds."""
        without = sum(not self._calls_to[target] for target in self._expected)
        self._kept = min(without, self.calls_max // _RESERVED_SHARE)

    def _no_room(self, wanted: Wanted) -> RefusedError:
        """Why there was no place in time."""
        for brake, _ in reversed(self._brakes(wanted)):
            if brake.is_on:
                return RefusedError(brake.why, brake.kind)
        return RefusedError(f"this qube makes {self.calls} calls, and none ended in time", Refusal.BUSY)

    # Brakes

    def _brakes(self, wanted: Wanted) -> tuple[tuple[Brake, int], ...]:
        """The brakes that apply to it, and how many calls count against each: none against that of a service,
        which was refused. A renewal has none: its own pace is slow enough, and it must not wait for a try
        that hangs."""
        if wanted.kind is Kind.RENEWAL:
            return ()
        return (self._target(wanted), self.calls_to(wanted.target)), (self._service(wanted), 0)

    def _target(self, wanted: Wanted) -> Brake:
        return self._targets.setdefault(wanted.target, Brake())

    def _service(self, wanted: Wanted) -> Brake:
        return self._services.setdefault((wanted.target, wanted.service), Brake())
