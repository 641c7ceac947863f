# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands panic and resume: everything closed at once and held, whatever is wrong; and opened again.

The hold is one line of dom0's policy file, which allows nothing while it is there. Whoever plans reads that
file first, under the lock, and finds nothing live with it. Whoever has read it before cannot write it any
more, as a write that opens names the text that was read. So panic writes the file at once, without the lock,
and all the rest is what `apply` does. Wherever panic is killed, nothing opens, and the next `apply` closes.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.values import QubeName

from . import leftovers, policy
from .apply import Outcome, differences
from .backend import ANY
from .judged import denials, judged
from .reconcile import apply, reconcile
from .revoking import Ended, allowances, revoke, serving
from .states import Plan
from .stock import Stock, ended, left_over
from .views import reasons
from .views.render import escaped
from .views.session import Session

_RESUME = "'qvm-forward resume' shows with --dry-run what would open again, and opens it"


class Report(NamedTuple):
    """What panic has done; ``open_still`` is what a look at the system found afterwards."""

    is_held: bool
    outcome: Outcome = Outcome()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    open_still: tuple[str, ...] = ()
    stock: tuple[Stock, ...] = ()

    @property
    def is_closed(self) -> bool:
        return self.is_held and not (self.problems or self.open_still or self.stock)

    def as_json(self) -> dict[str, Any]:
        return {
            "is_closed": self.is_closed,
            "is_held": self.is_held,
            "steps": [step.as_json() for step in self.outcome.done],
            "ended": [ended.as_json() for ended in self.outcome.ended],
            "not_done": list(self.problems),
            "notes": list(self.notes),
            "open_still": list(self.open_still),
            "stock": [left.as_json() for left in self.stock],
        }


def panic(args: Namespace, session: Session) -> int:
    """Close everything and hold it; status 0 only if all of it is closed."""
    report = hold(session)
    if session.is_json:
        session.say_json(report.as_json())
    else:
        _say(report, session)
    return 0 if report.is_closed else 1


def hold(session: Session) -> Report:
    """Close everything, and have it held; never raises a `ForwardError`."""
    notes: list[str] = []
    why = _write_hold(session)
    with ExitStack() as held:
        if _lock(held, session, 0.0) is not None:
            # Whoever has the lock may be waiting for a qube; calls end before it is waited for.
            _end_calls(session)
            if (busy := _lock(held, session)) is not None:
                notes.append(f"this went on without the lock: {busy}")
        live, listening, outcome, problems = _close(session)
        if why is not None:
            # It may work now, as where somebody was mending another policy file.
            why = _write_hold(session)
    is_held, open_still = _look(session)
    if is_held:
        open_still += _allowed_elsewhere(live, session)
    if why is not None and not is_held:
        problems = (f"policy: deny every call: {why}", *problems)
    left = left_over(ended(live, Plan(())), session.backend, everything_at=listening)
    return Report(is_held, outcome, problems, tuple(notes), open_still, left)


def _write_hold(session: Session) -> str | None:
    """Write the file, whatever it says; why not, if that cannot be done."""
    try:
        session.backend.replace_policy(policy.text((), session.now, is_held=True), ANY)
    except (ForwardError, OSError) as error:
        return str(error)
    return None


def _lock(held: ExitStack, session: Session, timeout_s: float | None = None) -> str | None:
    """Take the lock; why not, if it cannot be had."""
    try:
        held.enter_context(session.backend.locked(timeout_s))
    except (ForwardError, OSError) as error:
        return str(error)
    return None


def _end_calls(session: Session) -> tuple[Ended, ...]:
    try:
        told = allowances(serving(session.backend.inventory()), (), cuts_drains=True)
    except (ForwardError, OSError):
        # This is said when it is tried again.
        return ()
    return revoke(told, session.backend)


def _close(session: Session) -> tuple[Plan, list[QubeName], Outcome, tuple[str, ...]]:
    """All that `apply` closes while everything is held; what was live before, and who listened."""
    try:
        _, outcome, before = reconcile(session.backend, session.now, is_held=True, ends_all=True)
    except (ForwardError, OSError) as error:
        return Plan(()), [], Outcome(), (f"read all qubes, to find listeners and calls: {error}",)
    session.warn_unread(before)
    live = before.plan(session.now, is_held=False)
    return live, leftovers.listening(live, before.inventory), outcome, outcome.troubles


def _allowed_elsewhere(live: Plan, session: Session) -> tuple[str, ...]:
    """Forwards whose calls another policy file allows: the hold is in ours, and the first file wins."""
    try:
        verdicts = judged(live.live, session.backend, None)
    except (ForwardError, OSError):
        return ()  # that dom0's policy cannot be read is said by then
    return tuple(
        f"policy: another file than {policy.NAME}.policy allows calls of {target} {name}"
        for (target, name), verdict in verdicts.items()
        if verdict.is_allowed
    )


def _look(session: Session) -> tuple[bool, tuple[str, ...]]:
    """Whether everything is held, and what dom0 allows all the same."""
    try:
        text = session.backend.read_policy().text
    except (ForwardError, OSError) as error:
        return False, (f"policy: it cannot be read ({error})",)
    lines = sorted(policy.allowing(text))
    return policy.is_held(text), tuple(f"policy: {' '.join(line.split())}" for line in lines)


def _say(report: Report, session: Session) -> None:
    if report.is_closed:
        session.say("Everything is closed and held: dom0 allows no forward, and no qube is told to listen.\n")
    else:
        session.say("NOT EVERYTHING IS CLOSED.\n")
    session.say("".join(f"{line}\n" for line in _ended(report.outcome)))
    if report.is_held:
        session.say(f"The rules are kept as they are. {_RESUME}.\n")
    for note in report.notes:
        session.warn(f"note: {note}")
    for problem in report.problems:
        session.warn(f"not done: {problem}")
    for what in report.open_still:
        session.warn(f"still open: {what}")
    for left in report.stock:
        session.warn(f"still open: {left.words()}")
    if targets := sorted({left.target for left in report.stock if left.target is not None}):
        session.warn(f"'qvm-shutdown {' '.join(targets)}' ends these connections at once")
    if not report.is_closed:
        session.warn("say 'qvm-forward panic' again once that is mended")


def _ended(outcome: Outcome) -> Iterator[str]:
    count = sum(ended.ended for ended in outcome.ended)
    if count:
        yield f"{count} call{' was' if count == 1 else 's were'} ended in {_qubes(outcome)}."


def _qubes(outcome: Outcome) -> str:
    return ", ".join(sorted({ended.target for ended in outcome.ended if ended.ended}))


def resume(args: Namespace, session: Session) -> int:
    """Lift the hold and open what the rules ask for, or with --dry-run say what that would be."""
    if args.dry_run:
        snapshot = session.look(with_config=True)
        was_held = snapshot.is_held
        planned = snapshot.plan(session.now, is_held=False)
        steps = differences(planned, snapshot.inventory, snapshot.installed, session.now)
    else:
        with session.backend.locked():
            was_held = session.look().is_held
            planned, outcome, _ = apply(session.backend, session.now, is_held=False)
            steps = outcome.done
    if session.is_json:
        data = {
            "dry_run": args.dry_run,
            "was_held": was_held,
            "is_held": planned.is_held or (args.dry_run and was_held),
        }
        session.say_json(data | {"steps": [step.as_json() for step in steps]})
        return 0
    if not was_held:
        words = "".join(f"  {word}\n" for step in steps for word in step.words())
        what = "" if not words else "This would change:\n" if args.dry_run else "Changed:\n"
        session.say(f"Nothing was held.\n{what}{words}")
        return 0
    if args.dry_run:
        session.say("This would be open again:\n" if planned.live else "Nothing would open.\n")
    else:
        session.say(
            "Nothing is held any more. Open again:\n" if planned.live else "Nothing is held any more.\n"
        )
    session.say("".join(f"  {forward.source}: {reasons.sentence(forward)}\n" for forward in planned.live))
    if not args.dry_run:
        for (target, name), denial in denials(planned.live, session.backend).items():
            session.say(f"Note: {target} {name}: {escaped(denial)}.\n")
    return 0
