# SPDX-License-Identifier: GPL-2.0-or-later
"""The command apply: what it changed, or would change."""

from argparse import Namespace

from qubes_fwd_qrexec.admin.apply import Applied, Outcome, differences, reconcile
from qubes_fwd_qrexec.admin.states import Cause, State

from . import reasons, render
from .plans import plan_as_json
from .session import Session
from .steps import as_json, check, text
from .tables import Style


def apply(args: Namespace, session: Session) -> int:
    """Make it so, or with --dry-run say what that would change."""
    if args.dry_run:
        planned, outcome, snapshot = due(session)
    else:
        with session.backend.locked():
            planned, outcome, snapshot = reconcile(session.backend, session.now)
        check(outcome)
        session.warn_unread(snapshot)
    steps = outcome.done
    # Each was warned of when it was read.
    is_unread = any(qube.problem is not None for qube in snapshot.inventory.qubes.values())
    refused = [f for f in planned if f.state is State.REFUSED]
    if session.is_json:
        data = {"dry_run": args.dry_run, "steps": [as_json(step) for step in steps]}
        session.say_json(data | plan_as_json(planned))
    elif not steps:
        what = "what could be read" if is_unread else "all"
        session.say(f"Nothing to change: {what} is as the rules ask for.\n")
    else:
        session.say(text(steps, is_preview=args.dry_run))
    if not session.is_json:
        # Not of clones and disposables: there may be many, and their forwards never were open.
        closed = (f for f in planned if f.cause is Cause.NETVM_CHANGED)
        session.say("".join(f"{f.named} is suspended. {reasons.sentence(f)}\n" for f in closed))
    for forward in refused:
        session.warn(f"{forward.named} is refused. {reasons.sentence(forward)}")
    for rule in planned.broken:
        session.warn(render.broken_line(rule, Style()).rstrip("\n"))
    return 1 if refused or planned.broken or is_unread else 0


def due(session: Session, *, is_held: bool | None = None) -> Applied:
    """What `reconcile` would do now. Nothing is done."""
    snapshot = session.look(with_config=True)
    planned = snapshot.plan(session.now, is_held=is_held)
    return Applied(planned, Outcome(differences(planned, snapshot.inventory, snapshot.installed)), snapshot)
