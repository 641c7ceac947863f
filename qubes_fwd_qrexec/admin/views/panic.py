# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands panic and resume."""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from qubes_fwd_qrexec.admin.hold import Held, Resumed, hold
from qubes_fwd_qrexec.admin.hold import resume as lift
from qubes_fwd_qrexec.admin.judged import denials
from qubes_fwd_qrexec.admin.policy import NAME

from . import heard, reasons, steps
from .session import Session
from .tables import escaped


def panic(args: Namespace, session: Session) -> int:
    """Close everything and hold it; status 0 only if all of it is closed."""
    held = hold(session.backend, session.now)
    if held.applied is not None:
        session.warn_unread(held.applied.snapshot)
    if session.is_json:
        session.say_json(_as_json(held))
    else:
        _say(held, session)
    return 0 if held.is_closed else 1


def _as_json(held: Held) -> dict[str, Any]:
    return {
        "is_closed": held.is_closed,
        "is_held": held.is_held,
        "steps": [steps.as_json(step) for step in held.applied.outcome.done] if held.applied else [],
        "ended": [steps.ended_as_json(ended) for ended in held.ended],
        "not_done": list(_not_done(held)),
        "notes": list(held.notes),
        "open_still": list(_open_still(held)),
        "goes_on": [left._asdict() for left in held.goes_on],
    }


def _say(held: Held, session: Session) -> None:
    if held.is_closed:
        session.say("Everything is closed and held: dom0 allows no forward, and no qube is told to listen.\n")
    else:
        session.say("NOT EVERYTHING IS CLOSED.\n")
    count = sum(ended.ended for ended in held.ended)
    if count:
        qubes = ", ".join(sorted(ended.target for ended in held.ended if ended.ended))
        session.say(f"{count} {'call was' if count == 1 else 'calls were'} ended in {qubes}.\n")
    if held.is_held:
        session.say(
            "The rules are kept as they are. 'qvm-forward resume' shows with --dry-run what would open "
            "again, and opens it.\n"
        )
    for note in held.notes:
        session.warn(f"note: {note}")
    for problem in _not_done(held):
        session.warn(f"not done: {problem}")
    for what in (*_open_still(held), *(heard.still_open(left) for left in held.goes_on)):
        session.warn(f"still open: {what}")
    if targets := sorted({left.target for left in held.goes_on if left.target is not None}):
        session.warn(f"'qvm-shutdown {' '.join(targets)}' ends these connections at once")
    if not held.is_closed:
        session.warn("mend that, and say 'qvm-forward panic' again")


def _not_done(held: Held) -> Iterator[str]:
    yield from held.problems
    yield from (steps.ended_words(ended) for ended in held.ended if ended.problem is not None)


def _open_still(held: Held) -> Iterator[str]:
    yield from (f"policy: {' '.join(line.split())}" for line in held.allowed)
    for named in held.allowed_elsewhere:
        yield f"policy: another file than {NAME}.policy allows calls of {named}"


def resume(args: Namespace, session: Session) -> int:
    """Lift the hold and open what the rules ask for, or with --dry-run say what that would be."""
    resumed = lift(session.backend, session.now, is_preview=args.dry_run)
    session.warn_unread(resumed.snapshot)
    if session.is_json:
        data = {
            "dry_run": args.dry_run,
            "was_held": resumed.was_held,
            "is_held": resumed.plan.is_held or (args.dry_run and resumed.was_held),
        }
        session.say_json(data | {"steps": [steps.as_json(step) for step in resumed.steps]})
        return 0
    session.say(_resumed(resumed, is_preview=args.dry_run))
    if not args.dry_run and resumed.was_held:
        for (target, name), denial in denials(resumed.plan.live, session.backend).items():
            session.say(f"Note: {target} {name}: dom0 denies its calls: {escaped(denial)}.\n")
    return 0


def _resumed(resumed: Resumed, *, is_preview: bool) -> str:
    live = resumed.plan.live
    if not resumed.was_held:
        changes = "".join(f"  {word}\n" for step in resumed.steps for word in steps.words(step))
        title = "This would change:\n" if is_preview else "Changed:\n"
        return f"Nothing was held.\n{title if changes else ''}{changes}"
    if is_preview:
        title = "This would be open again:\n" if live else "Nothing would open.\n"
    else:
        title = "Nothing is held any more.\n" if not live else "Nothing is held any more. Open again:\n"
    return title + "".join(f"  {forward.source}: {reasons.sentence(forward)}\n" for forward in live)
