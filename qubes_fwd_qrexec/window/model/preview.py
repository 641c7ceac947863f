# SPDX-License-Identifier: GPL-2.0-or-later
"""What would become of a rule that is not stored; nothing is changed."""

from typing import NamedTuple

from qubes_fwd_qrexec.admin.changing import new_problem
from qubes_fwd_qrexec.admin.deciding import Decision, decided
from qubes_fwd_qrexec.admin.snapshot import Snapshot
from qubes_fwd_qrexec.admin.states import Cause, Finding, Forward, Plan
from qubes_fwd_qrexec.common.rules import NamedRule


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
    key = named.key
    after = snapshot.changed({key: str(named.rule)})
    decision = decided(after, [key], now).get(key)
    if decision is not None:
        after = snapshot.changed({key: str(decision.rule)})
    old = None
    if key in snapshot.stored:
        old = snapshot.plan(now, [key], is_held=False, known=known).find(*key)
    planned = after.plan(now, [key], is_held=False, known=known)
    forward = next(each for each in planned if each.named.key == key)
    problem = new_problem(old, forward)
    if snapshot.is_held:
        forward = forward.with_finding(Finding(Cause.HELD))
    return Preview(forward, problem, decision)
