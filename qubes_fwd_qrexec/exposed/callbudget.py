# SPDX-License-Identifier: GPL-2.0-or-later
"""All qrexec calls of this qube together: how many there may be, and who waits for one.

A calling qube has room for 30 vchans, over all targets and including everything else that it calls:
qrexec-client-vm takes 33 of the 1,024 grant pages of xen-gntalloc for each, or 17 for a single call, whose
buffers are smaller. So the listener has one budget for all its calls. It counts calls and not pages, so the
smaller size of single calls benefits the rest of the qube. Part of the budget is reserved for mux calls,
since each of those carries thousands of connections, and renewals have room on top of it. Calls beyond the
budget wait in a bounded queue (`callqueue`). If no call ends by itself, something makes room: the least
recently used of the idle mux calls, the idlest connection of a client that has more than its share, or the
idlest mux call that such a client has to itself.

A call that is refused beside live calls to its target, or for lack of a vchan beside any other, has found no
room: it is made again when another ends. A call that is refused on its own is refused to everybody who waits
for the same one (`brake`). A refusal by dom0 has the same exit status as a full target. So a service that was
never allowed since the last change of the configuration counts as refused after a few seconds.

Lack of a vchan has the same exit status as a target that does not take the call (`shortage`). So that such a
target keeps nobody out of others, those have the next try, and nothing that others use ends for it. Once it
is known to be at fault its calls are refused on their own.
"""

import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager

import trio

from qubes_fwd_qrexec.common.config import CALLS_MAX
from qubes_fwd_qrexec.common.errors import RefusedError
from qubes_fwd_qrexec.common.exitstatus import ExitStatus, meaning, refusal
from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.system.bugs import Bugs

from .brake import Brake
from .callplace import Place
from .callqueue import CallQueue, Key, Kind, Wanted, count_key, has_more_than_its_share
from .callwaits import CallWaits
from .shortage import Shortage

# Renewals on top of the budget: otherwise mux calls that take up all of it could not be renewed.
RENEWALS_MAX = 2
# On Qubes 4.3 calls that begin together fail, as xenstored allows a qube ten transactions at once.
BEGIN_MAX = 4
# A call that takes longer than this waits for its target to start, and no longer for xenstored.
BEGIN_S = 5.0
# At most a quarter of the budget is reserved for mux calls.
_RESERVED_SHARE = 4
# A connection in which something moves is not ended to make room for another.
QUIET_S = 1.0
# How often to look at the queue, in addition to whenever a call ends.
_LOOK_S = 0.25


class Waiting(Wanted):
    """A call that a task waits for; ``users`` says which clients wait for it."""

    __slots__ = ("error", "place", "settled", "users")

    def __init__(
        self, kind: Kind, target: str, service: str, key: Key, users: Callable[[], Collection[Key]]
    ) -> None:
        super().__init__(kind, target, service, key)
        self.users = users
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
        self._queue = CallQueue[Waiting]() if queue is None else queue
        self._places: set[Place] = set()
        self._here = Brake()
        self._targets: dict[str, Brake] = {}
        self._services: dict[tuple[str, str], Brake] = {}
        self._full_until: dict[tuple[str, str], float] = {}
        """Until when a refusal of the service beside live calls may mean a full target."""
        self._freed_at = -math.inf
        """When a call that had room ended last."""
        self._shortage = Shortage()
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
        return sum(place.wanted.target == target for place in self._places)

    @property
    def singles_max(self) -> int:
        """How many single calls there may be."""
        return self.calls_max - self._reserved

    def expect(self, mux_calls: int) -> None:
        """Reserve room, within bounds, for so many mux calls."""
        self._reserved = min(mux_calls, self.calls_max // _RESERVED_SHARE)

    def forget_refusals(self) -> None:
        """The configuration has changed, and dom0's policy perhaps with it: try again at once."""
        self._here.release()
        self._shortage.forget()
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
            self._look()
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
        was_try = self._here.is_through(place) and self._was_undisturbed(place)
        is_small = place.wanted.kind is Kind.SINGLE
        self._shortage.is_through(place.wanted.target, was_try=was_try, is_small=is_small)
        for brake in self._brakes(place.wanted):
            brake.is_through(place)
        named = place.wanted.target, place.wanted.service
        self._services.pop(named, None)
        self._full_until[named] = math.inf

    def failed(self, place: Place, why: str, status: int | None) -> bool:
        wanted = place.wanted
        place.has_failed = True
        others = [] if place.is_through else self._beside(place, status)
        again_at = place.began_at + self._waits.again_s
        # Who had the room may be over before this is heard of.
        may_be_room = others or (not place.is_through and place.began_at <= self._freed_at)
        if status == ExitStatus.NO_ROOM and may_be_room:
            began_at = place.began_at if self._was_undisturbed(place) else -math.inf
            is_small = wanted.kind is Kind.SINGLE
            now = trio.current_time()
            self._shortage.meets(wanted.target, len(others), began_at, now, is_small=is_small)
            if not self._shortage.is_fault_of(wanted.target):
                self._here.put_on(len(others), again_at, meaning(status))
                return True
            if not self._shortage.is_met:
                self._here.release()
        living = sum(other.wanted.target == wanted.target for other in others)
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

    def _was_undisturbed(self, place: Place) -> bool:
        """Whether no call with room has ended since this one began, so that those beside it were as many."""
        return place.began_at >= self._freed_at

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
        while (wanted := self._take(now)) is not None:
            wanted.place = Place(self, wanted, now)
            for brake in self._brakes(wanted):
                brake.begins(wanted.place, self._living(brake, wanted))
            self._places.add(wanted.place)
            wanted.settled.set()
        if self._queue:
            self._make_room(now)
            if not self._is_looking:
                self._is_looking = True
                self._tasks.start_soon(self._keep_looking)

    def _take(self, now: float) -> Waiting | None:
        """Take the next one that may begin. A try is first for a target that has not failed to find room."""
        if self._here.is_full(self.calls) and self._shortage.is_met:
            is_met_by = self._shortage.is_met_by
            other = self._queue.take(lambda one: not is_met_by(one.target) and self._may_begin(one, now))
            if other is not None:
                return other
        return self._queue.take(lambda one: self._may_begin(one, now))

    async def _keep_looking(self) -> None:
        """Look again while anybody waits: some calls become possible with time alone."""
        try:
            while self._queue:
                await trio.sleep(_LOOK_S)
                # It belongs to nobody, so a bug in it ends nobody: every wait has its own bound.
                self._bugs.guarded(lambda: None, self._look)
        finally:
            self._is_looking = False

    def _may_begin(self, wanted: Wanted, now: float) -> bool:
        beginning = sum(not place.is_through and now - place.began_at < BEGIN_S for place in self._places)
        return (
            beginning < BEGIN_MAX
            and self._has_room(wanted)
            and all(brake.admits(self._living(brake, wanted), now) for brake in self._brakes(wanted))
        )

    def _has_room(self, wanted: Wanted) -> bool:
        """Whether the budget has room for it."""
        if wanted.kind is Kind.RENEWAL:
            return self.calls < self.calls_max + RENEWALS_MAX
        singles = sum(place.wanted.kind is Kind.SINGLE for place in self._places)
        return self.calls < self.calls_max and (wanted.kind is not Kind.SINGLE or singles < self.singles_max)

    def _make_room(self, now: float) -> None:
        """End a call, if necessary, for the first one in the queue that has no room."""
        for wanted in self._queue:
            is_targets = not self._target(wanted).admits(self.calls_to(wanted.target), now)
            if not is_targets and self._has_room(wanted) and self._here.admits(self.calls, now):
                continue
            own = [place for place in self._places if place.wanted.target == wanted.target]
            places = own if is_targets else list(self._places)
            if any(place.makes_room for place in places):
                return  # that one will end soon
            # Where a single target lacks vchans, that may be its fault: nothing that others use ends for it.
            used = places if not self._has_room(wanted) or self._shortage.is_met_by_several else own
            found = (
                self._idlest_mux_call(places)
                or self._idlest_single(used, wanted)
                or self._idlest_of_one_user(used, wanted)
            )
            if found is not None:
                found.make_room()
            return

    def _idlest_mux_call(self, places: list[Place]) -> Place | None:
        """The least recently used mux call that nothing uses now."""
        return max(
            (p for p in places if p.wanted.kind is Kind.MUX and p.quiet_s >= 0),
            key=lambda p: p.quiet_s,
            default=None,
        )

    def _idlest_single(self, places: list[Place], wanted: Wanted) -> Place | None:
        """The idlest single call of the key that holds most, if that is more than the waiting one's share."""
        candidates = (
            place
            for place in places
            if place.wanted.kind is Kind.SINGLE
            and place.quiet_s >= QUIET_S
            and self._queue.has_more_than_its_share(place.wanted.key, wanted.key)
        )
        return max(candidates, key=lambda p: (self._queue.held(p.wanted.key), p.quiet_s), default=None)

    def _idlest_of_one_user(self, places: list[Place], wanted: Waiting) -> Place | None:
        """The idlest mux call with a single client, if that client has more of them than one that waits."""
        held_by = Counter[Key]()
        for place in self._places:
            if (use := place.sole_user) is not None:
                count_key(held_by, use[0])
        users = wanted.users()
        found, most = None, (0, 0.0)
        for place in places:
            if (use := place.sole_user) is None or use[1] < QUIET_S:
                continue
            rank = held_by[use[0][:1]], use[1]
            if rank > most and any(has_more_than_its_share(held_by, use[0], user) for user in users):
                found, most = place, rank
        return found

    def _end(self, place: Place) -> None:
        self._places.discard(place)
        if not place.has_failed:
            self._freed_at = trio.current_time()
        self._queue.release(place.wanted.key)
        for brake in self._brakes(place.wanted):
            brake.ended(place)
        self._look()

    def _no_room(self, wanted: Wanted) -> RefusedError:
        """Why there was no place in time."""
        for brake in reversed(self._brakes(wanted)):
            if brake.is_on:
                return RefusedError(brake.why, brake.kind)
        return RefusedError(f"this qube makes {self.calls} calls, and none ended in time", Refusal.BUSY)

    # Brakes

    def _brakes(self, wanted: Wanted) -> tuple[Brake, ...]:
        """The brakes that apply to it. A renewal has none for its service: its own pace is slow enough."""
        brakes = self._here, self._target(wanted)
        return brakes if wanted.kind is Kind.RENEWAL else (*brakes, self._service(wanted))

    def _target(self, wanted: Wanted) -> Brake:
        return self._targets.setdefault(wanted.target, Brake())

    def _service(self, wanted: Wanted) -> Brake:
        return self._services.setdefault((wanted.target, wanted.service), Brake())

    def _living(self, brake: Brake, wanted: Wanted) -> int:
        """How many calls count against a brake: none against that of a service, which was refused."""
        if brake is self._here:
            return self.calls
        return self.calls_to(wanted.target) if brake is self._target(wanted) else 0
