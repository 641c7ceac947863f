# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands panic and resume."""

from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from qubes_fwd_qrexec.admin import hold
from qubes_fwd_qrexec.admin.apply import Applied, Outcome, due
from qubes_fwd_qrexec.admin.hold import Held
from qubes_fwd_qrexec.admin.policy import NAME
from qubes_fwd_qrexec.admin.snapshot import Snapshot
from qubes_fwd_qrexec.admin.states import Key, Plan
from qubes_fwd_qrexec.common.errors import ForwardError

from . import confirmed, judged, reasons, steps
from .listeners import GoesOn, ask_after
from .session import Session
from .tables import counted, escaped


def panic(args: Namespace, session: Session) -> int:
    """Close everything and hold it; status 0 only if all of it is closed."""
    held = hold.hold(session.backend, session.now)
    allowed = [f"policy: {' '.join(line.split())}" for line in held.allowed]
    goes_on: tuple[GoesOn, ...] = ()
    if held.applied is not None:
        session.warn_unread(held.applied.snapshot)
        others, goes_on = _in_spite(held, held.applied.snapshot, session)
        allowed += others
    undone = [*held.problems, *steps.untold(held.ended)]
    is_closed = held.is_held and not (undone or held.doubts or allowed or goes_on)
    if session.is_json:
        done = [] if held.applied is None else held.applied.outcome.done
        session.say_json(
            {
                "is_closed": is_closed,
                "is_held": held.is_held,
                "steps": [steps.as_json(step) for step in done],
                "ended": [ended._asdict() for ended in held.ended],
                "not_done": undone,
                "notes": list(held.notes),
                "open_still": allowed,
                "unconfirmed": [doubt._asdict() for doubt in held.doubts],
                "goes_on": [left._asdict() for left in goes_on],
            }
        )
        return 0 if is_closed else 1
    if is_closed:
        session.say("Everything is closed and held: dom0 allows no forward, and no qube is told to listen.\n")
    else:
        session.say("NOT EVERYTHING IS CLOSED.\n")
    if count := sum(ended.ended for ended in held.ended):
        qubes = ", ".join(sorted(ended.target for ended in held.ended if ended.ended))
        session.say(f"Ended {counted(count, 'call')} in {qubes}.\n")
    if held.is_held:
        session.say(
            "The rules are kept as they are. 'qvm-forward resume' opens them again; with --dry-run it "
            "only shows what that would open.\n"
        )
    for line in _warnings(held, undone, (*allowed, *map(str, goes_on))):
        session.warn(line)
    if targets := sorted({left.target for left in goes_on if left.target is not None}):
        session.warn(f"'qvm-shutdown {' '.join(targets)}' ends these connections at once")
    if not is_closed:
        session.warn("fix that, and run 'qvm-forward panic' again")
    return 0 if is_closed else 1


def _in_spite(held: Held, snapshot: Snapshot, session: Session) -> tuple[list[str], tuple[GoesOn, ...]]:
    """What dom0's whole policy allows in spite of a hold, and what goes on, as the listeners say."""
    live = snapshot.plan(session.now, is_held=False)
    allowed: list[Key] = []
    # Our file holds everything, so another file allows these. That no file can be read has been said.
    with suppress(ForwardError, OSError):
        allowed = judged.allowed(live.live, session.backend) if held.is_held else []
    others = [
        f"policy: another file than {NAME}.policy allows calls of {target} {name}" for target, name in allowed
    ]
    heard = ask_after(live, Plan(()), (), snapshot.inventory, session.backend, is_everything=True)
    return others, heard.goes_on


def _warnings(held: Held, undone: Iterable[str], still_open: Iterable[str]) -> Iterator[str]:
    yield from (f"note: {note}" for note in held.notes)
    yield from (f"not done: {problem}" for problem in undone)
    yield from (f"still open: {what}" for what in still_open)
    yield from (f"still open: {confirmed.words(doubt)}" for doubt in held.doubts)
    told = held.applied.outcome.told if held.applied else {}
    for command in confirmed.ways_out(confirmed.silent(held.doubts, told)):
        yield f"'{command}' closes it whatever the qubes of its path do"


def resume(args: Namespace, session: Session) -> int:
    """Lift the hold and open what the rules ask for, or with --dry-run say what that would be."""
    if not args.dry_run:
        return resumed(*hold.resume(session.backend, session.now), session)
    planned, outcome, snapshot = due(session.look(with_config=True), session.now, is_held=False)
    if session.is_json:
        session.say_json(_resumed_as_json(outcome, snapshot.is_held, is_held=snapshot.is_held, dry_run=True))
    elif snapshot.is_held:
        session.say(_resumed(planned, is_preview=True))
    else:
        session.say(f"Nothing was held.\n{steps.text(outcome.done, is_preview=True)}")
    return 0


def resumed(was_held: bool, applied: Applied, session: Session) -> int:
    """Print what is open again. Returns the exit status."""
    planned, outcome, snapshot = applied
    is_closed = confirmed.check(outcome, session)
    steps.check(outcome)
    session.warn_unread(snapshot)
    if session.is_json:
        session.say_json(_resumed_as_json(outcome, was_held, is_held=planned.is_held, dry_run=False))
    elif planned.is_held:
        session.warn("everything was held again meanwhile, and stays closed")
    elif was_held:
        session.say(_resumed(planned, is_preview=False))
        for (target, name), denial in judged.denials(planned.live, session.backend).items():
            session.say(f"Note: {target} {name}: dom0 denies its calls: {escaped(denial)}.\n")
    else:
        session.say(f"Nothing was held.\n{steps.text(outcome.done, is_preview=False)}")
    return 1 if planned.is_held or not is_closed else 0


def _resumed_as_json(outcome: Outcome, was_held: bool, *, is_held: bool, dry_run: bool) -> dict[str, Any]:
    done = [steps.as_json(step) for step in outcome.done]
    return {"dry_run": dry_run, "was_held": was_held, "is_held": is_held, "steps": done}


def _resumed(planned: Plan, *, is_preview: bool) -> str:
    live = planned.live
    if is_preview:
        title = "This would be open again:\n" if live else "Nothing would open.\n"
    else:
        title = "Nothing is held any more.\n" if not live else "Nothing is held any more. Open again:\n"
    return title + "".join(f"  {forward.named}: {reasons.sentence(forward)}\n" for forward in live)
