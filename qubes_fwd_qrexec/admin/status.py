# SPDX-License-Identifier: GPL-2.0-or-later
"""The command status: what is open now, with the figures of its listener, and what is still to be applied."""

from argparse import Namespace
from collections.abc import Iterable

from . import policy
from .apply import differences
from .figures import Figures, FigureSource, NoFigures, Unknown
from .render import exposed_at
from .session import Session
from .showing import selected
from .states import Cause, Forward, State
from .tables import Table

_TITLES = ("QUBE", "NAME", "STATE", "EXPOSED AT", "POLICY", "OPEN NOW", "ACCEPTED", "REFUSED")
_UNKNOWN = "unknown"


def status(args: Namespace, session: Session, source: FigureSource | None = None) -> int:
    """Show the forwards that are live; status 1 if one of them is not as its rule asks for."""
    source = source or NoFigures()
    snapshot = session.look(with_config=True)
    planned = selected(args.qube, snapshot, session.now)
    installed = session.backend.read_policy()
    allowed = policy.allowing(installed.text)
    found = [
        (forward, allowed >= set(policy.lines(forward)), _ask(source, forward)) for forward in planned.live
    ]
    # Of the whole system, whatever part of it is shown.
    due = differences(snapshot.plan(session.now), snapshot.inventory, installed, session.now)
    is_well = not due and not any(isinstance(f, Figures) and f.problem for _, _, f in found)
    if session.is_json:
        entries = [
            {
                "qube": forward.source.target,
                "name": forward.source.name,
                "state": forward.state,
                "exposed": forward.exposed,
                "ports": forward.source.rule.listen_ports.brief(),
                "is_allowed": is_allowed,
                "figures": figures.as_json(),
            }
            for forward, is_allowed, figures in found
        ]
        session.say_json({"forwards": entries, "due": [step.as_json() for step in due]})
        return 0 if is_well else 1
    if found:
        table = Table(_TITLES, [_row(*entry) for entry in found], [forward.state for forward, *_ in found])
        session.say(table.text(session.style) or table.blocks(session.style))
    else:
        session.say("Nothing is open.\n")
    session.say("".join(f"{remark}\n" for remark in _remarks(found, planned, len(due))))
    return 0 if is_well else 1


def _ask(source: FigureSource, forward: Forward) -> Figures | Unknown:
    if forward.cause is Cause.EXPOSED_HALTED:
        return Unknown(f"{forward.exposed} is halted")
    return source.figures(forward)


def _row(forward: Forward, is_allowed: bool, figures: Figures | Unknown) -> tuple[str, ...]:
    if isinstance(figures, Unknown):
        counts = (_UNKNOWN,) * 3
    else:
        counts = (str(figures.connections), str(figures.accepted), str(figures.refused))
    return (
        forward.source.target,
        forward.source.name,
        forward.state,
        exposed_at(forward),
        "allows" if is_allowed else "denies",
        *counts,
    )


def _remarks(
    found: Iterable[tuple[Forward, bool, Figures | Unknown]], planned: Iterable[Forward], due: int
) -> Iterable[str]:
    reasons: dict[str, None] = {}
    for forward, _, figures in found:
        if isinstance(figures, Unknown):
            reasons[figures.reason] = None
        elif figures.problem is not None:
            yield f"{forward.source}: {figures.problem}."
    if reasons:
        yield f"Figures are unknown: {'; '.join(reasons)}."
    closed = [forward for forward in planned if not forward.is_live]
    if closed:
        states = [state for state in State if any(forward.state is state for forward in closed)]
        counts = ", ".join(f"{sum(f.state is state for f in closed)} {state}" for state in states)
        yield f"Not open: {counts}; 'qvm-forward list' says why."
    if due:
        yield f"Not in force yet: {due} change{'' if due == 1 else 's'}; 'qvm-forward apply' makes them."
