# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the forwards of an exposed qube need more qrexec calls than it makes at once."""

from collections import Counter
from collections.abc import Mapping

from qubes_fwd_qrexec.admin.states import Forward, Plan
from qubes_fwd_qrexec.common.config import CALLS_MAX, ListenerConfig
from qubes_fwd_qrexec.common.rules import Transport
from qubes_fwd_qrexec.common.values import QubeName


def note(forward: Forward, needed: Mapping[QubeName, int], before: Mapping[QubeName, int]) -> str | None:
    """What to mind of a live forward whose qube needs more calls than it makes, and more than before; see
    `calls_needed`.
    """
    if not forward.is_live or forward.exposed is None:
        return None
    calls = needed.get(forward.exposed, 0)
    if calls <= CALLS_MAX or calls <= before.get(forward.exposed, 0):
        return None
    return (
        f"the forwards of {forward.exposed} need {calls} qrexec calls, and it makes {CALLS_MAX} at once: "
        "idle forwards give theirs up, and while all are in use, further connections wait"
    )


def calls_needed(plan: Plan) -> Mapping[QubeName, int]:
    """How many calls each exposed qube needs if all of its forwards are in use.

    Mux calls of one protocol to the same ports of a target are one call; a rule with single calls needs at
    least one.
    """
    calls = {
        (exposed, c.target, c.service, c.target_ports, c.name if c.transport is Transport.CALL else None)
        for forward in plan.live
        for exposed, c in forward.configs
        if isinstance(c, ListenerConfig)
    }
    return Counter(exposed for exposed, *_ in calls)
