# SPDX-License-Identifier: GPL-2.0-or-later
"""Plans as data for programs: what `--json` prints of them."""

from typing import Any

from qubes_fwd_qrexec.admin.states import Forward, Plan, State
from qubes_fwd_qrexec.common.rules import BrokenRule

from . import reasons


def forward_as_json(forward: Forward) -> dict[str, Any]:
    """One forward. ``ways_out`` are commands with arguments; a word in capitals is to be filled in."""
    mode, mode_reason = reasons.mode(forward)
    return {
        "qube": forward.named.target,
        "name": forward.named.name,
        "state": forward.state,
        "cause": forward.cause,
        "reason": reasons.sentence(forward),
        "ways_out": [list(command) for command in reasons.ways_out(forward)],
        "mode": mode,
        "mode_reason": mode_reason,
        "exposed": forward.exposed,
        "side": forward.side,
        "path": list(forward.chain),
        "service": forward.service,
        "transport": forward.transport,
        "transport_reason": "" if forward.service is None else reasons.transport_reason(forward),
        "notes": list(reasons.notes(forward)),
        "hints": list(reasons.hints(forward)),
        "rule": forward.named.rule.options(),
    }


def broken_as_json(rule: BrokenRule) -> dict[str, Any]:
    """What is stored as a rule and cannot be read."""
    return {
        "qube": rule.target,
        "name": rule.name,
        "state": State.BROKEN,
        "reason": rule.problem,
        "text": rule.text,
    }


def plan_as_json(planned: Plan) -> dict[str, Any]:
    """All forwards, and what is stored as a rule and cannot be read."""
    return {
        "forwards": [forward_as_json(forward) for forward in planned],
        "broken": [broken_as_json(rule) for rule in planned.broken],
        "is_held": planned.is_held,
    }
