# SPDX-License-Identifier: GPL-2.0-or-later
"""The command status: what is open now, with the figures of its listener, and what is still to be applied."""

import json
import select
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from qubes_fwd_qrexec.admin.apply import Step, differences
from qubes_fwd_qrexec.admin.backend import PolicyVerdict
from qubes_fwd_qrexec.admin.figures import Figures, FigureSource, QubeFigures, Unknown
from qubes_fwd_qrexec.admin.judged import judged
from qubes_fwd_qrexec.admin.leftovers import WAY_OUT, Drain, drains, leftovers, listening
from qubes_fwd_qrexec.admin.session import Session
from qubes_fwd_qrexec.admin.states import HELD, Cause, Forward, Plan, State
from qubes_fwd_qrexec.common.values import QubeName

from .render import escaped, exposed_at
from .showing import selected
from .tables import Colour, Table

_TITLES = (
    *("QUBE", "NAME", "STATE", "EXPOSED AT", "POLICY", "WAY", "OPEN NOW", "ACCEPTED", "REFUSED"),
    *("FROM CLIENTS", "TO CLIENTS"),
)
_UNKNOWN = "unknown"
_KIB = 1024
# Each look is a call to every qube that listens, and a person reads no faster.
WATCH_S = 2.0
# ECMA-48: the cursor goes home, and what stands behind it is erased.
_CLEAR = "\x1b[H\x1b[J"


class _Seen(NamedTuple):
    """One look at everything."""

    found: list[tuple[Forward, PolicyVerdict, Figures | Unknown]]
    planned: Plan
    due: list[Step]
    drains: list[Drain]
    silent: list[QubeName]
    """Qubes with a listener that do not answer: what drains there is not known."""

    @property
    def is_well(self) -> bool:
        lingers = any(drain.left_s is None for drain in self.drains)
        return (
            not self.due
            and not lingers
            and all(
                verdict.is_allowed is not False and _trouble(figures) is None
                for _, verdict, figures in self.found
            )
        )

    def as_json(self) -> dict[str, Any]:
        entries = [
            {
                "qube": forward.source.target,
                "name": forward.source.name,
                "state": _state(forward, figures),
                "reason": forward.reason if (trouble := _trouble(figures)) is None else trouble,
                "exposed": forward.exposed,
                "ports": forward.source.rule.listen_ports.brief(),
                "is_allowed": verdict.is_allowed,
                "policy": verdict.reason,
                "figures": figures.as_json(),
            }
            for forward, verdict, figures in self.found
        ]
        return {
            "leftovers": [leftover.as_json() for leftover in leftovers(self.due)],
            "draining": [drain.as_json() for drain in self.drains],
            "silent": self.silent,
            "forwards": entries,
            "due": [step.as_json() for step in self.due],
        }


def status(args: Namespace, session: Session, source: FigureSource | None = None) -> int:
    """Show the forwards that are live; status 1 if one of them is not as its rule asks for."""
    if args.watch:
        from qubes_fwd_qrexec.admin.ending import Ending

        with Ending() as ending:
            return _watch(args, session, lambda timeout_s: _is_over(ending, timeout_s))
    seen = _look(args, session, source or QubeFigures(session.backend))
    if session.is_json:
        session.say_json(seen.as_json())
    else:
        _show(session, seen)
    return 0 if seen.is_well else 1


def _is_over(ending: Any, timeout_s: float) -> bool:
    return bool(select.select([ending], [], [], timeout_s)[0])


def _watch(args: Namespace, session: Session, is_over: Callable[[float], bool]) -> int:
    """Show it again and again, until the end is asked for; the status is that of the last look."""
    while True:
        session = session._replace(now=time.time())
        seen = _look(args, session, QubeFigures(session.backend))
        if session.is_json:
            session.say(f"{json.dumps(seen.as_json() | {'time': session.now})}\n")
        else:
            session.say(_CLEAR if session.style.width is not None else "")
            _show(session, seen)
        session.out.flush()
        if is_over(WATCH_S):
            return 0 if seen.is_well else 1


def _look(args: Namespace, session: Session, source: FigureSource) -> _Seen:
    snapshot = session.look(with_config=True)
    planned = selected(args.qube, snapshot, session.now)
    verdicts = judged(planned.live, session.backend, snapshot.installed.text)
    qubes = listening(planned, snapshot.inventory, args.qube)
    source.prepare(qubes)
    found = [(forward, verdicts[forward.source[:2]], _ask(source, forward)) for forward in planned.live]
    # Of the whole system, whatever part of it is shown.
    everything = snapshot.plan(session.now)
    due = differences(everything, snapshot.inventory, snapshot.installed, session.now)
    asked = {qube: source.answer(qube) for qube in qubes}
    live = {qube: {f.source[:2] for f in everything.live if f.exposed == qube} for qube in asked}
    draining = [drain for qube, told in asked.items() if told for drain in drains(qube, told, live[qube])]
    # Of others the figures are said to be unknown.
    shown = {forward.exposed for forward, _, _ in found}
    silent = [qube for qube, answer in asked.items() if answer is None and qube not in shown]
    return _Seen(found, planned, list(due), draining, silent)


def _show(session: Session, seen: _Seen) -> None:
    over = list(leftovers(seen.due))
    for leftover in over:
        words = f"No rule asks for it: {leftover.words()}; '{WAY_OUT}' ends that."
        session.say(f"{session.style.colour(Colour.RED, escaped(words))}\n")
    for drain in seen.drains:
        session.say(f"{session.style.colour(Colour.YELLOW, drain.words())}.\n")
    if seen.found:
        states = [_state(forward, figures) for forward, _, figures in seen.found]
        table = Table(_TITLES, [_row(*entry) for entry in seen.found], states)
        session.say(table.text(session.style) or table.blocks(session.style))
    else:
        nothing = "No forward is open" if over or seen.drains or seen.silent else "Nothing is open"
        session.say(f"{nothing}.{f' {HELD}.' if seen.planned.is_held else ''}\n")
    session.say("".join(f"{remark}\n" for remark in _remarks(seen)))


def _ask(source: FigureSource, forward: Forward) -> Figures | Unknown:
    if forward.cause is Cause.EXPOSED_HALTED:
        return Unknown(f"{forward.exposed} is halted")
    return source.figures(forward)


def _trouble(figures: Figures | Unknown) -> str | None:
    """Why its listener does not have a forward open, or not wholly."""
    if isinstance(figures, Figures):
        return figures.problem
    return figures.reason if figures.is_trouble else None


def _state(forward: Forward, figures: Figures | Unknown) -> State:
    """That of the plan, unless the forward waits for its listener."""
    return forward.state if _trouble(figures) is None else State.WAITING


_WORDS = {True: "allows", False: "denies", None: "allows?"}


def _row(forward: Forward, verdict: PolicyVerdict, figures: Figures | Unknown) -> tuple[str, ...]:
    if isinstance(figures, Unknown):
        counts = (_UNKNOWN,) * 6
    else:
        report = figures.report
        counts = (
            str(report.way),
            str(report.connections),
            str(report.total),
            str(figures.refused),
            size(report.sent),
            size(report.received),
        )
    return (
        forward.source.target,
        forward.source.name,
        _state(forward, figures),
        exposed_at(forward),
        _WORDS[verdict.is_allowed],
        *counts,
    )


def size(count: int) -> str:
    """A number of bytes for people: ``0``, ``999``, ``1.5 KiB``, ``12 MiB``."""
    if count < _KIB:
        return str(count)
    value, unit = float(count), ""
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):  # noqa: B007
        value /= _KIB
        if value < _KIB:
            break
    return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"


def _remarks(seen: _Seen) -> Iterable[str]:
    found, planned, silent, due = seen.found, seen.planned, seen.silent, len(seen.due)
    reasons: dict[str, None] = {}
    bugs: dict[tuple[str, str], int] = {}
    doubts: dict[str, None] = {}
    for forward, verdict, figures in found:
        if verdict.is_allowed is False:
            yield f"{forward.source}: dom0 denies its calls: {escaped(verdict.reason)}."
        elif verdict.is_allowed is None:
            doubts[verdict.reason] = None
        trouble = _trouble(figures)
        if trouble is not None:
            yield f"{forward.source}: {State.WAITING}: {trouble}."
        if isinstance(figures, Unknown):
            if trouble is None:
                reasons[figures.reason] = None
            continue
        report = figures.report
        bugs[str(forward.exposed), "listener"] = figures.bugs
        bugs[forward.source.target, "service"] = figures.bugs_in_target
        if report.refused:
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(report.refused.items()))
            yield f"{forward.source}: refused: {counts}."
        if report.last_error is not None:
            at = "" if report.last_error_at is None else f" at {_local(report.last_error_at)}"
            yield f"{forward.source}: last error{at}: {report.last_error}."
    for (qube, program), count in sorted(bugs.items()):
        if count:
            times = "a bug" if count == 1 else f"{count} bugs"
            yield f"{qube}: its {program} has met {times} of its own; the journal there says more."
    if doubts:
        yield f"Whether another policy file denies it is not known: {'; '.join(map(escaped, doubts))}."
    if reasons:
        yield f"Figures are unknown: {'; '.join(reasons)}."
    closed = Counter(forward.state for forward in planned if not forward.is_live)
    closed[State.BROKEN] += len(planned.broken)
    counts = ", ".join(f"{closed[state]} {state}" for state in State if closed[state])
    if counts:
        yield f"Not open: {counts}; 'qvm-forward list' says why."
    if silent:
        yield f"Whether anything drains is not known of {', '.join(silent)}, which does not answer."
    if due:
        yield f"Not in force yet: {due} change{'' if due == 1 else 's'}; 'qvm-forward apply' makes them."


def _local(untrusted_seconds: int) -> str:
    """A time as a qube tells it, which may be none that there is; as all times here, that of this machine."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(untrusted_seconds))
    except (OverflowError, ValueError, OSError):
        return "an unknown time"
