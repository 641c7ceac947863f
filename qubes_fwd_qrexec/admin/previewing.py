# SPDX-License-Identifier: GPL-2.0-or-later
"""What would become of a rule that is not stored, and what a change is refused for; nothing is changed."""

from typing import NamedTuple

from qubes_fwd_qrexec.common.rules import NamedRule

from .deciding import Decision, decided
from .snapshot import Snapshot
from .states import Cause, Finding, Forward, Plan, State


class Preview(NamedTuple):
    """What would become of a rule: ``problem`` is what its change would be refused for, ``decision`` the one
    about its mode, where that was left open.

    A target that runs is asked about its server only by the change, and then the mode may be another.
    """

    forward: Forward
    problem: Finding | None = None
    decision: Decision | None = None


def preview(snapshot: Snapshot, now: float, named: NamedRule, known: Plan | None = None) -> Preview:
    """What would become of a rule if it was stored, anew or in place of the one of its name. Its target must
    exist. ``known`` is the plan of the snapshot, where the caller has it.
    """
    known = known or snapshot.plan(now)
    key = named[:2]
    after = snapshot.changed({key: str(named.rule)})
    decision = decided(after, [key], now).get(key)
    if decision is not None:
        after = snapshot.changed({key: str(decision.rule)})
    old = None
    if key in snapshot.stored:
        old = snapshot.plan(now, [key], is_held=False, known=known).find(*key)
    planned = after.plan(now, [key], is_held=False, known=known)
    forward = next(each for each in planned if each.named[:2] == key)
    problem = new_problem(old, forward)
    if snapshot.is_held:
        forward = forward.with_finding(Finding(Cause.HELD))
    return Preview(forward, problem, decision)


def new_problem(old: Forward | None, new: Forward, *, ports_alone: bool = False) -> Finding | None:
    """What would newly keep a rule closed; or, if it was and stays disabled, once it is enabled."""
    if old is not None and old.named.rule.enabled is not new.named.rule.enabled:
        if old.named.rule.enabled:
            return None  # what closes is never refused
        old = None
    stop = _stop(new)
    if not ports_alone and stop is not None and stop.cause.state is State.REFUSED:
        before = None if old is None else _stop(old)
        if before is None or (before.cause, old and old.exposed) != (stop.cause, new.exposed):
            return stop
    conflict = new.finding(Cause.CONFLICT)
    return None if old is not None and conflict == old.finding(Cause.CONFLICT) else conflict


def _stop(forward: Forward) -> Finding | None:
    """What keeps it closed, or would if it was enabled."""
    stops = (stop for stop in forward.stops if stop.cause not in (Cause.DISABLED, Cause.CONFLICT))
    return next(stops, None)
