# SPDX-License-Identifier: GPL-2.0-or-later
"""The loop of `qvm-forward watch`: reconcile after each change that matters, and when a rule's time is over.

It looks at the whole system each time. So the next look mends whatever an earlier one missed, failed to do,
or was killed in. Its own writes are changes too; one more look finds nothing to do, and there it settles.
While nothing happens it looks at the clock, every 30 s.
"""

from collections.abc import Iterator
from typing import NamedTuple

from qubes_fwd_qrexec.common.errors import ForwardError, StoreError
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.system.clock import Clock
from qubes_fwd_qrexec.system.ending import Ending

from . import policy
from .apply import Applied, reconcile
from .backend import Backend, Changes
from .confirming import Unconfirmed, unconfirmed
from .revoking import Ended, allowances, revoke, serving
from .states import Plan

# A tool that sets up a qube sends its events within milliseconds of each other; a person waits for a second.
QUIET_S = 0.2
BURST_S = 1.0
# How late it may notice that the clock was set or the machine suspended. Listeners end rules to the second.
TICK_S = 30.0
# qubesd is back some seconds after it was restarted.
RETRY_S = 5.0


class Look(NamedTuple):
    """One reconciliation, at a time in UNIX seconds; ``before`` is the plan of the one before.

    ``ended`` has what targets answered to the lists that they were sent, by it or after their start. A target
    that could not be told is named there once and not asked again: its lease ends what goes on. ``doubts``
    are qubes that do not confirm what they were told of forwards by nft. ``running`` are the targets that ran
    then. ``is_followed``: news of changes arrive, and this look was due to some.
    """

    at: float
    before: Plan | None
    applied: Applied
    ended: tuple[Ended, ...]
    doubts: tuple[Unconfirmed, ...]
    running: frozenset[QubeName]
    next_end: float | None
    is_followed: bool


def watch(backend: Backend, clock: Clock, ending: Ending) -> Iterator[Look | ForwardError | None]:
    """The loop, until the end is asked for; a reconciliation that has begun is finished.

    Yields each look, an error for what failed, and None where only the clock was looked at. After an error
    all begins anew, 5 s later: what failed may itself be a change, and looking finds what was not noticed.
    """
    last: Look | None = None
    while not ending.is_asked():
        try:
            with backend.changes((ending.fileno(),)) as changes:
                is_due, has_news = True, False
                while True:
                    if is_due:
                        last = _look(backend, clock.now(), last, is_followed=has_news)
                        yield last
                        if problems := last.applied.outcome.problems:
                            raise StoreError(f"not everything could be done: {'; '.join(problems)}")
                    else:
                        yield None
                    if ending.is_asked():
                        return
                    end = None if last is None else last.next_end
                    left_s = TICK_S if end is None else end - clock.now()
                    is_due = has_news = changes.wait(max(0.0, min(TICK_S, left_s)))
                    if has_news:
                        settle(changes, clock)
                    is_due = is_due or (end is not None and end <= clock.now())
        except ForwardError as error:
            yield error
            ending.is_asked(RETRY_S)


def settle(changes: Changes, clock: Clock) -> None:
    """Wait until a burst of changes is over, up to a limit."""
    end = clock.now() + BURST_S
    while (left_s := end - clock.now()) > 0 and changes.wait(min(QUIET_S, left_s)):
        pass


def _look(backend: Backend, now: float, last: Look | None, *, is_followed: bool) -> Look:
    """Reconcile, and tell what is allowed to targets that have started since the last look: dom0 may have
    allowed a call while one was still starting, of a rule that is over by now. When a hold begins, all are
    told to cut what they have."""
    before = None if last is None else last.applied.plan
    with backend.locked():
        applied = reconcile(backend, now, known=before)
    planned, ended = applied.plan, applied.outcome.ended
    fresh = running = serving(applied.snapshot.inventory)
    just_told = {each.target for each in ended}
    if not planned.is_held or (before is not None and before.is_held) or running <= just_told:
        fresh = running - just_told - (frozenset() if last is None else last.running)
    lines = {line for forward in planned.live for line in policy.lines(forward)}
    told = revoke(allowances(fresh, lines, cuts_drains=planned.is_held), backend)
    doubts = unconfirmed(applied.outcome.told, backend)
    end = next_end(planned, now)
    return Look(now, before, applied, (*ended, *told), doubts, frozenset(running), end, is_followed)


def next_end(planned: Plan, now: float) -> float | None:
    """When the next enabled rule expires."""
    rules = [forward.named.rule for forward in planned]
    ends = [rule.expire for rule in rules if rule.enabled and not rule.has_ended and rule.expire is not None]
    return min((end for end in ends if end > now), default=None)
