# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands apply and watch: what they changed, or would change.

Watch prints each step, each rule whose state changes, and what fails, once.
"""

from argparse import Namespace
from collections.abc import Iterator

from qubes_fwd_qrexec.admin.apply import due, reconcile
from qubes_fwd_qrexec.admin.states import Cause, Plan, State
from qubes_fwd_qrexec.admin.watch import Look
from qubes_fwd_qrexec.admin.watch import watch as loop
from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.system.clock import Clock
from qubes_fwd_qrexec.system.ending import Ending
from qubes_fwd_qrexec.system.notify import notify

from . import confirmed, reasons, render, steps
from .session import Session
from .tables import Style, escaped
from .times import print_expire

# Smaller steps are those of clock synchronisation, and change nothing that anybody would see.
_SET_BACK_S = 60.0


def apply(args: Namespace, session: Session) -> int:
    """Bring policy and qubes in line with the rules, or with --dry-run print what would change."""
    is_closed = True
    if args.dry_run:
        planned, outcome, snapshot = due(session.look(with_config=True), session.now)
    else:
        with session.backend.locked():
            planned, outcome, snapshot = reconcile(session.backend, session.now)
        is_closed = confirmed.check(outcome, session)
        steps.check(outcome)
        session.warn_unread(snapshot)
    # Each was warned of when it was read.
    is_unread = any(qube.problem is not None for qube in snapshot.inventory.qubes.values())
    refused = [f for f in planned if f.state is State.REFUSED]
    if session.is_json:
        done = [steps.as_json(step) for step in outcome.done]
        session.say_json({"dry_run": args.dry_run, "steps": done, **render.plan_as_json(planned)})
    else:
        what = "what could be read" if is_unread else "all"
        nothing = f"Nothing to change: {what} is as the rules ask for.\n"
        text = steps.text(outcome.done, is_preview=args.dry_run) or nothing
        if args.dry_run:
            session.say(text)
        else:
            session.say_done(text)
        # Not of clones and disposables: there may be many, and their forwards never were open.
        closed = (f for f in planned if f.cause is Cause.NETVM_CHANGED)
        session.say("".join(f"{f.named} is suspended. {reasons.sentence(f)}\n" for f in closed))
    for forward in refused:
        session.warn(f"{forward.named} is refused. {reasons.sentence(forward)}")
    for rule in planned.broken:
        session.warn(render.broken_line(rule, Style()).rstrip("\n"))
    return 1 if refused or planned.broken or is_unread or not is_closed else 0


def watch(args: Namespace, session: Session) -> int:
    """Run until SIGTERM or SIGINT."""
    with Ending() as ending, session.backend.watching():
        follow(session, Clock(), ending)
    return 0


def follow(session: Session, clock: Clock, ending: Ending) -> None:
    """Print what the loop does until its end, and tell the service manager."""
    printer = _Printer(session)
    for event in loop(session.backend, clock, ending):
        printer.check_clock(clock.ahead_s())
        if isinstance(event, Look):
            printer.looked(event)
        elif event is not None:
            printer.troubled(event)
    notify("STOPPING=1")


class _Printer:
    def __init__(self, session: Session) -> None:
        self._session = session
        self._trouble: str | None = None
        self._is_set_back = False

    def looked(self, look: Look) -> None:
        session, (planned, outcome, snapshot) = self._session, look.applied
        session.warn_unread(snapshot)
        news = [] if look.before is None else list(differing(look.before, planned))
        untold = steps.untold(look.ended)
        if session.is_json:
            if outcome.done or outcome.problems or untold or news:
                done, problems = [steps.as_json(step) for step in outcome.done], [*outcome.problems, *untold]
                data = {"time": look.at, "news": news, "steps": done, "problems": problems}
                session.say_json(data, is_line=True)
        else:
            words = [word for step in outcome.done for word in steps.words(step)]
            session.say("".join(f"{escaped(line)}\n" for line in (*news, *words)))
        for text in untold:
            self._warn(text)
        for line in confirmed.lines(look.doubts, outcome.told, outcome.before):
            self._warn(f"{line}.")
        if self._trouble is not None and look.is_followed and not outcome.problems:
            self._trouble = None
            self._warn("all is well again")
        count = len(planned.forwards) + len(planned.broken)
        status = f"{len(planned.live)} of {count} forwards open"
        if look.next_end is not None:
            status = f"{status}; the next ends {print_expire(int(look.next_end), look.at)}"
        if self._trouble is None:
            notify("READY=1", f"STATUS={status}")

    def troubled(self, error: ForwardError) -> None:
        if str(error) != self._trouble:
            self._trouble = str(error)
            self._warn(self._trouble)
        # What it can start without does not keep it from starting.
        notify("READY=1", f"STATUS={escaped(self._trouble)}")

    def check_clock(self, ahead_s: float) -> None:
        was, self._is_set_back = self._is_set_back, ahead_s >= _SET_BACK_S
        if self._is_set_back and not was:
            self._warn(
                f"the clock was set back by {ahead_s:.0f} s; until 'qvm-forward watch' is restarted, "
                "rules expire as if it had not been"
            )

    def _warn(self, text: str) -> None:
        for line in text.splitlines():
            self._session.warn(escaped(line))
        self._session.err.flush()


def _seen(planned: Plan) -> dict[tuple[str, str], tuple[State, Cause, str]]:
    """What became of each rule, and of what cannot be read as one."""
    seen: dict[tuple[str, str], tuple[State, Cause, str]] = {
        f.named.key: (f.state, f.cause, reasons.sentence(f)) for f in planned
    }
    for rule in planned.broken:
        seen[rule.target, rule.name] = State.BROKEN, Cause.UNREADABLE, f"{rule.problem}."
    return seen


def differing(before: Plan, after: Plan) -> Iterator[str]:
    """A sentence for each rule that came, went, or is in another state than before."""
    olds, news = _seen(before), _seen(after)
    for key in sorted(olds.keys() | news.keys()):
        old, new = olds.get(key), news.get(key)
        name = " ".join(key)
        if new is None:
            yield f"{name} is no longer there"
        elif old is None:
            yield f"{name} is new, and {new[0]}. {new[2]}"
        elif old[:2] != new[:2]:
            yield f"{name} was {old[0]} and is {new[0]}. {new[2]}"
