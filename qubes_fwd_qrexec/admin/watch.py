# SPDX-License-Identifier: GPL-2.0-or-later
"""The loop of `qvm-forward watch`: reconcile after each change that matters, and when a rule's time is over.

It looks at the whole system each time. So whatever it missed, was killed in or could not do is mended by the
next time. Its own writes are changes too; one more look finds nothing to do, and there it settles. While
nothing happens it looks at the clock, every 30 s.
"""

from typing import NamedTuple, Protocol

from qubes_fwd_qrexec.common.errors import ForwardError, StoreError
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.system.clock import Clock
from qubes_fwd_qrexec.system.ending import Ending

from . import policy
from .backend import Backend, Changes
from .reconcile import Applied, reconcile
from .revoking import Ended, allowances, revoke, serving
from .states import Plan

# A tool that sets up a qube sends its events within milliseconds of each other; a person waits for a second.
QUIET_S = 0.2
BURST_S = 1.0
# How late it is noticed at most that the clock was set or the machine suspended. Listeners end to the second.
TICK_S = 30.0
# qubesd is back some seconds after it was restarted.
RETRY_S = 5.0


class Look(NamedTuple):
    """One reconciliation, at a time in UNIX seconds; ``before`` is the plan of the one before.

    ``ended`` is what targets made of what they were told, by it and as they have started. A target that
    could not be told is named there once, and nothing tries again: its lease ends what goes on.
    """

    at: float
    before: Plan | None
    applied: Applied
    ended: tuple[Ended, ...]
    next_end: float | None


class Watching(Protocol):
    """Who shows what the loop does. ``troubled``: something failed, and all is tried once more after 5 s.
    ``is_well``: nothing does any more. ``ticked``: a wait is over, and so far was the clock set back.
    """

    def looked(self, look: Look) -> None: ...

    def troubled(self, error: ForwardError) -> None: ...

    def is_well(self) -> None: ...

    def ticked(self, ahead_s: float) -> None: ...


class Watcher:
    """The loop, until the end is asked for; a reconciliation that has begun is finished."""

    def __init__(self, backend: Backend, clock: Clock, ending: Ending, view: Watching) -> None:
        self._backend = backend
        self._clock = clock
        self._ending = ending
        self._view = view
        self._before: Plan | None = None
        self._next_end: float | None = None
        # The targets that ran at the last look, and know what was allowed then.
        self._running: set[QubeName] = set()

    def run(self) -> None:
        while not self._ending.is_asked():
            try:
                with self._backend.changes((self._ending.fileno(),)) as changes:
                    self._follow(changes)
            except ForwardError as error:
                self._view.troubled(error)
                self._ending.is_asked(RETRY_S)

    def _follow(self, changes: Changes) -> None:
        """Reconcile, wait, and again. Raises `ForwardError` when anything fails: all begins anew then, later,
        as what failed may itself be a change, and as changes that were not noticed are found by looking.
        """
        is_due = True
        while True:
            if is_due:
                self._reconcile()
            if self._ending.is_asked():
                return
            left_s = TICK_S if self._next_end is None else self._next_end - self._clock.now()
            is_due = changes.wait(max(0.0, min(TICK_S, left_s)))
            if is_due:
                self._view.is_well()
                self._settle(changes)
            is_due = is_due or (self._next_end is not None and self._next_end <= self._clock.now())
            self._view.ticked(self._clock.ahead_s())

    def _settle(self, changes: Changes) -> None:
        """Let a burst come to its end; one that does not end is cut short."""
        end = self._clock.now() + BURST_S
        while (left_s := end - self._clock.now()) > 0 and changes.wait(min(QUIET_S, left_s)):
            pass

    def _reconcile(self) -> None:
        now = self._clock.now()
        with self._backend.locked():
            applied = reconcile(self._backend, now)
        ended = (*applied.outcome.ended, *self._tell_started(applied))
        before, self._before = self._before, applied.plan
        self._next_end = next_end(applied.plan, now)
        self._view.looked(Look(now, before, applied, ended, self._next_end))
        if applied.outcome.problems:
            raise StoreError(f"not everything could be done: {'; '.join(applied.outcome.problems)}")

    def _tell_started(self, applied: Applied) -> tuple[Ended, ...]:
        """Tell what is allowed to targets that have started: dom0 may have allowed a call while one was still
        starting, of a rule that is over by now. When a hold begins, all are told to cut what they have."""
        planned, running = applied.plan, serving(applied.snapshot.inventory)
        if planned.is_held and not (self._before is not None and self._before.is_held):
            fresh = running
        else:
            fresh = running - self._running - {each.target for each in applied.outcome.ended}
        self._running = running
        lines = {line for forward in planned.live for line in policy.lines(forward)}
        return revoke(allowances(fresh, lines, cuts_drains=planned.is_held), self._backend)


def next_end(planned: Plan, now: float) -> float | None:
    """When the next enabled rule ends."""
    rules = [forward.source.rule for forward in planned]
    ends = [rule.expire for rule in rules if rule.enabled and not rule.has_ended and rule.expire is not None]
    return min((end for end in ends if end > now), default=None)
