# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the forwards of an exposed qube need more qrexec calls than it makes at once."""

from qubes_fwd_qrexec.admin.states import Forward, Plan
from qubes_fwd_qrexec.common.config import CALLS_MAX
from qubes_fwd_qrexec.common.rules import Transport


def note(plan: Plan, forward: Forward, before: Plan) -> str | None:
    """What to mind of a live forward whose qube needs more calls than it makes, and more than before."""
    needed = calls_needed(plan, forward.exposed)
    if not forward.is_live or needed <= CALLS_MAX or needed <= calls_needed(before, forward.exposed):
        return None
    return (
        f"the forwards of {forward.exposed} need {needed} qrexec calls, and it makes {CALLS_MAX} at once: "
        "idle forwards give theirs up, and while all are in use, further connections wait"
    )


def calls_needed(plan: Plan, exposed: str | None) -> int:
    """How many calls an exposed qube needs if all of its forwards are in use.

    Mux calls of one protocol to the same ports of a target are one call; a rule with single calls needs at
    least one.
    """
    calls = {
        (c.target, c.service, c.target_ports, c.name if c.transport is Transport.CALL else None)
        for f in plan.live
        for c in f.listener_configs
        if f.exposed == exposed
    }
    return len(calls)
