# SPDX-License-Identifier: GPL-2.0-or-later
"""Reconcile: read the system, plan, and make policy and listeners follow. Nothing else opens anything."""

from typing import NamedTuple

from .apply import Outcome, Place, carry_out, differences
from .backend import Backend
from .snapshot import Snapshot, look
from .states import Plan

# Somebody who keeps rewriting policy must not keep us here for ever, as we hold the lock.
_LOOKS = 3


class Applied(NamedTuple):
    """What the rules ask for, the outcome of the steps, and the system as it was before them."""

    plan: Plan
    outcome: Outcome
    snapshot: Snapshot


def reconcile(backend: Backend, now: float, *, is_held: bool | None = None) -> Applied:
    """Make policy and configuration what the stored rules ask for; the caller holds the lock.

    What could not be done is in the outcome. If somebody changes policy meanwhile without our lock, all is
    looked at again. ``is_held`` puts everything on hold, or lifts the hold. Raises `StoreError` if the qubes
    cannot be read.
    """
    outcome, untold, overtaken = Outcome(), set[Place](), 0
    while True:
        snapshot = look(backend, with_config=True)
        planned = snapshot.plan(now, is_held=is_held)
        # Whoever began a hold may have been killed before any call was ended.
        ends_all = planned.is_held and not is_held
        steps = differences(planned, snapshot.inventory, snapshot.installed, untold, ends_all=ends_all)
        problem = None if is_held else snapshot.policy_problem
        if problem is not None:
            # Everything may be on hold: only close, and only what needs no policy.
            steps = tuple(step for step in steps if step.narrows)
        outcome = carry_out(steps, backend, snapshot.installed).after(outcome)
        if problem is not None:
            problem = f"dom0's policy cannot be read, and stays as it is: {problem}"
            outcome = outcome._replace(problems=(problem, *outcome.problems))
        overtaken += outcome.is_overtaken
        failed = {(step.qube, step.key) for step, _ in outcome.untold}
        if overtaken == _LOOKS or (failed == untold and not outcome.is_overtaken):
            break
        # What a listener could not be told is closed: policy would allow more than it knows of, or less.
        untold = failed
        # The hold to be lifted is the one that was seen; a newer one stays.
        is_held = is_held or None
    if outcome.untold:
        steps, errors = zip(*outcome.untold, strict=True)
        outcome = outcome._replace(undone=(*steps, *outcome.undone), problems=(*errors, *outcome.problems))
    return Applied(planned, outcome, snapshot)
