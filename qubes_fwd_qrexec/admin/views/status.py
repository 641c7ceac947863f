# SPDX-License-Identifier: GPL-2.0-or-later
"""The command status: what is open now, what the qubes say of it, and what is not in force yet.

What a qube says is untrusted: `common.report` checks it, and nothing is decided by it.
"""

import io
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from qubes_fwd_qrexec.admin import confirming
from qubes_fwd_qrexec.admin.answers import both
from qubes_fwd_qrexec.admin.apply import Kind, Step, differences
from qubes_fwd_qrexec.admin.backend import Backend, PolicyVerdict
from qubes_fwd_qrexec.admin.snapshot import Snapshot
from qubes_fwd_qrexec.admin.states import Forward, Plan, State, Verdict
from qubes_fwd_qrexec.common.clientreport import CLIENTS
from qubes_fwd_qrexec.common.config import ForwardKey, ListenerConfig
from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.nftconfig import is_nft_key
from qubes_fwd_qrexec.common.report import QubeReport
from qubes_fwd_qrexec.common.rules import Mode, Transport
from qubes_fwd_qrexec.common.values import Proto, QubeName
from qubes_fwd_qrexec.system.ending import Ending

from . import carried, connected, drains, nftstatus, reasons, steps, travel
from .connected import Connected
from .judged import judged_apart
from .listeners import Answer, GoesOn, Has, Uptake, ask_all, flows, listening, uptakes
from .nftstatus import NftStatus
from .render import exposed_at, forward_as_json
from .session import Session
from .showing import selected
from .tables import Style, Table, counted, escaped, size, terminal_size
from .times import local

_TITLES = (
    *("QUBE", "NAME", "STATE", "EXPOSED AT", "POLICY", "WAY", "OPEN NOW", "ACCEPTED", "REFUSED"),
    *("FROM CLIENTS", "TO CLIENTS"),
)
# In a narrow terminal. What dom0 denies and listeners refuse is said below the table, too.
_LEAVING = ("ACCEPTED", "WAY", "POLICY", "FROM CLIENTS", "TO CLIENTS", "REFUSED")
# Seconds between looks: each one calls every qube that listens, and nobody reads faster.
WATCH_S = 2.0
# ECMA-48: the cursor goes to the first column of the first line; the rest of a line, of all lines, is erased.
_HOME, _END_LINE, _END_ALL = "\x1b[H", "\x1b[K", "\x1b[J"


class Row(NamedTuple):
    """One protocol of a live forward, with dom0's verdict on its calls and what its listener and its target
    say of it.

    ``mux_calls`` are those that the target has of it; None if that is unknown, or it has another transport.
    """

    forward: Forward
    config: ListenerConfig
    verdict: PolicyVerdict
    uptake: Uptake
    mux_calls: int | None = None
    bugs: int = 0
    bugs_in_target: int = 0

    @property
    def problem(self) -> str | None:
        return self.uptake.note(self.forward) or self.uptake.said or None

    @property
    def state(self) -> State:
        return State.WAITING if self.uptake.is_shut else self.forward.state

    def as_json(self) -> dict[str, Any]:
        figures: dict[str, Any] = {"is_known": False, "reason": self.problem}
        if self.uptake.report is not None:
            figures = {
                "is_known": True,
                **self.uptake.report.as_json(),
                "problem": self.problem,
                "mux_calls_in_target": self.mux_calls,
                "bugs": self.bugs,
                "bugs_in_target": self.bugs_in_target,
            }
        at_listener = {"state": self.state, "cause": self.uptake.has, "reason": self.problem}
        return {
            **forward_as_json(self.forward),
            "service": self.config.service,
            "transport": self.config.transport,
            "transport_reason": travel.transport_reason(self.forward, self.config.proto),
            **(at_listener if self.uptake.is_shut else {}),
            "proto": self.uptake.proto,
            "ports": self.forward.named.rule.listen_ports.brief(),
            "is_allowed": self.verdict.is_allowed,
            "policy": self.verdict.reason,
            "figures": figures,
        }


class Status(NamedTuple):
    """The forwards that are live, and all that is not as the rules ask for.

    ``plan`` and ``rows`` are about the qubes that the user named, ``due`` is about the whole system.
    ``goes_on`` are connections of forwards that are closed. ``silent`` are qubes with a listener that did not
    answer: what goes on there is unknown.
    """

    plan: Plan
    rows: tuple[Row, ...]
    goes_on: tuple[GoesOn, ...]
    silent: tuple[QubeName, ...]
    due: tuple[Step, ...]
    by_nft: NftStatus
    clients: Connected | None

    @property
    def is_well(self) -> bool:
        """Whether nothing is known to be other than the rules ask for; what drains may."""
        return (
            not self.due
            and self.by_nft.is_well
            and all(left.left_s is not None for left in self.goes_on)
            and not any(row.uptake.is_shut or row.verdict.is_allowed is False for row in self.rows)
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "leftovers": [
                *({"qube": qube, "what": what} for qube, what in _leftovers(self.due)),
                *({"qube": doubt.qube, "what": doubt.key} for doubt in self.by_nft.leftovers),
            ],
            "draining": [left._asdict() for left in (*self.goes_on, *self.by_nft.draining)],
            "silent": sorted({*self.silent, *self.by_nft.silent}),
            "problems": dict(self.by_nft.problems),
            "forwards": [*(row.as_json() for row in self.rows), *(row.as_json() for row in self.by_nft.rows)],
            "due": [steps.as_json(step) for step in self.due],
            **({} if self.clients is None else self.clients.as_json()),
        }


def _rows(
    forward: Forward, verdicts: Mapping[ForwardKey, PolicyVerdict], answers: Mapping[QubeName, Answer]
) -> Iterator[Row]:
    answer = None if forward.exposed is None else answers.get(forward.exposed)
    target = answers.get(forward.named.target)
    for config, took in zip(forward.listener_configs, uptakes(forward, answer), strict=True):
        row = Row(forward, config, verdicts[ForwardKey(*forward.named.key, took.proto)], took)
        if isinstance(answer, QubeReport) and answer.listener is not None:
            row = row._replace(bugs=answer.listener.bugs)
        if answer is not None and isinstance(target, QubeReport):
            mine = (forward.exposed, forward.named.rule.target_ports, took.proto)
            of_mine = (c.mux_calls for c in target.calls if (c.source, c.ports, c.proto) == mine)
            mux_calls = sum(of_mine) if config.transport is Transport.MUX else None
            row = row._replace(bugs_in_target=target.bugs, mux_calls=mux_calls)
        yield row


def status(args: Namespace, session: Session) -> int:
    """Show what is open; exit status 1 if something is not as the rules ask for."""
    if args.watch:
        with Ending() as ending:
            return watch(args, session, ending)
    found = _look(args, session)
    if session.is_json:
        session.say_json(found.as_json())
    else:
        session.say(text(found, session.style))
    return 0 if found.is_well else 1


def watch(args: Namespace, session: Session, ending: Ending) -> int:
    """Show the status again and again until SIGINT or SIGTERM; the last look gives the exit status. An error
    is printed and ends only one look: the next may go better.
    """
    while True:
        # Warnings stand below what is shown, which would clear them away.
        warnings = io.StringIO()
        look = session._replace(now=time.time(), err=warnings, warned=set())
        is_well = False
        try:
            found = _look(args, look)
        except (ForwardError, OSError) as error:
            look.warn(reasons.error_text(error))
        else:
            is_well = found.is_well
            if session.is_json:
                session.say_json(found.as_json() | {"time": look.now}, is_line=True)
            else:
                session.say(_screen(found, session))
        session.err.write(warnings.getvalue())
        session.err.flush()
        if ending.is_asked(WATCH_S):
            return 0 if is_well else 1


def _screen(found: Status, session: Session) -> str:
    """The status in place of what the terminal shows, in the size that it has now: what is too much for its
    lines is left out, and counted."""
    terminal = terminal_size(session.out, session.environ)
    if terminal is None or 0 in terminal:  # one that nobody has told its size
        return text(found, session.style)
    style = session.style._replace(width=terminal.columns)
    lines, plain = (text(found, each).splitlines() for each in (style, Style(terminal.columns)))
    # A line is left for a warning, and one for the cursor; what is wider than the terminal takes several.
    room, shown = terminal.lines - 2, list[str]()
    for number, line in enumerate(lines):
        room -= max(1, -(-len(plain[number]) // terminal.columns))
        if room < (1 if number + 1 < len(lines) else 0):
            shown.append(f"... {counted(len(lines) - number, 'more line')}; 'qvm-forward status' shows all")
            break
        shown.append(line)
    return _HOME + "".join(f"{line}{_END_LINE}\n" for line in shown) + _END_ALL


def _look(args: Namespace, session: Session) -> Status:
    snapshot = session.look(with_config=True)
    planned = selected(args.qube, snapshot, session.now)
    return asked(snapshot, planned, session.now, session.backend, args.qube, with_clients=args.clients)


def asked(
    snapshot: Snapshot,
    planned: Plan,
    now: float,
    backend: Backend,
    qubes: Collection[str] = (),
    *,
    with_clients: bool = False,
    verdicts: Mapping[ForwardKey, PolicyVerdict] | None = None,
) -> Status:
    """How a system is, as its qubes say, which are asked at once. ``planned`` is the part of its plan that
    concerns ``qubes``, all of it without any; ``verdicts`` are those of dom0's policy, if they are known.
    """
    if verdicts is None:
        verdicts = judged_apart(planned.live, backend, snapshot.installed)
    everything, inventory = snapshot.plan(now, known=planned) if qubes else planned, snapshot.inventory
    over_qrexec = [forward for forward in planned.live if forward.mode is Mode.QREXEC]
    may_listen = drains.concerned(listening(inventory), planned, qubes)
    configs = (config for forward in over_qrexec for config in forward.listener_configs)
    wanted = {*may_listen, *(config.target for config in configs if config.transport is Transport.MUX)}
    wanted |= {forward.exposed for forward in over_qrexec if forward.exposed is not None}
    running = sorted(qube for qube in wanted if inventory.qubes[qube].is_running)
    answers, told = both(
        partial(ask_all, backend, running, argument=CLIENTS if with_clients else ""),
        partial(confirming.ask_all, backend, nftstatus.to_ask(planned, inventory, qubes)),
    )
    rows = tuple(row for forward in over_qrexec for row in _rows(forward, verdicts, answers))
    goes_on, silent = list[GoesOn](), list[QubeName]()
    for qube in may_listen:
        found = flows(qube, answers[qube], everything)
        goes_on += found or ()
        if found is None and all(row.forward.exposed != qube for row in rows):
            silent.append(qube)  # of others the figures are unknown, and that is said already
    due = differences(everything, inventory, snapshot.installed)
    by_nft = nftstatus.nft_status(planned, everything, inventory, told, now)
    clients = connected.connected(planned, qubes, answers) if with_clients else None
    return Status(planned, rows, tuple(goes_on), tuple(silent), due, by_nft, clients)


def text(found: Status, style: Style) -> str:
    heads = [style.state(Verdict.STOPS, head) for head in left(found.due, found)]
    tables = [
        Table(_TITLES, [*map(_cells, found.rows)], {}, _LEAVING, ("EXPOSED AT",)).text(style),
        found.by_nft.table(style),
        drains.table((*found.goes_on, *found.by_nft.draining), style),
        "" if found.clients is None else found.clients.table(style),
    ]
    if not found.rows and not found.by_nft.rows:
        nothing = "No forward is open." if any((*tables, found.silent)) else "Nothing is open."
        nothing = "No other forward is open." if heads else nothing
        heads.append(f"{nothing} {reasons.HELD}." if found.plan.is_held else nothing)
    body, remarks = "\n".join(filter(None, tables)), [*_remarks(found), *found.by_nft.remarks()]
    parts = (*(f"{head}\n" for head in heads), body, "\n" if body and remarks else "")
    return "".join((*parts, *(f"{remark}\n" for remark in remarks)))


def left(due: Collection[Step], found: Status | None) -> Iterator[str]:
    """A sentence for each thing that is in force, or goes on, and should not."""
    for qube, what in _leftovers(due):
        does = "forward" if is_nft_key(what) else "listen for"
        has = f"dom0's policy allows '{what}'" if qube is None else f"{qube} is told to {does} {what}"
        yield escaped(f"No rule asks for this: {has}; 'qvm-forward apply' ends it.")
    if found is not None:
        yield from found.by_nft.left()
        for each in found.goes_on:
            if each.left_s is None:
                has = f"{each.exposed} still has {each.counted} of it"
                yield f"{each.target} {each.name} should be closed, but {has}."


def _leftovers(due: Collection[Step]) -> Iterator[tuple[QubeName | None, str]]:
    """What no rule asks for: lines of dom0's policy (no qube), and what a qube is told to listen for."""
    for step in due:
        if step.kind is Kind.CLOSE_POLICY:
            yield from ((None, " ".join(line.split())) for line in step.lines)
        elif step.kind is Kind.REMOVE_CONFIG:
            yield step.qube, step.key


_VERDICTS = {True: "allows", False: "denies", None: "allows?"}


def _cells(row: Row) -> tuple[str, ...]:
    named, report = row.forward.named, row.uptake.report
    at = f"{exposed_at(row.forward)}{' udp' if row.uptake.proto is Proto.UDP else ''}"
    cells = (named.target, named.name, row.state, at, _VERDICTS[row.verdict.is_allowed])
    if report is None:
        return (*cells, *("unknown",) * 6)
    counts = (report.connections, report.total, sum(report.refused.values()))
    return (*cells, report.way, *map(str, counts), size(report.sent), size(report.received))


def _remarks(found: Status) -> Iterator[str]:
    # A rule that forwards both has two rows.
    yield from dict.fromkeys(remark for row in found.rows for remark in about(row))
    bugs = {(str(row.forward.exposed), "listener"): row.bugs for row in found.rows}
    bugs |= {(row.forward.named.target, "service"): row.bugs_in_target for row in found.rows}
    for (qube, program), count in sorted(bugs.items()):
        if count:
            yield f"{qube}: its {program} has hit {counted(count, 'bug')}; see its journal."
    doubts = dict.fromkeys(row.verdict.reason for row in found.rows if row.verdict.is_allowed is None)
    if doubts:
        yield f"Whether another policy file denies it is unknown: {'; '.join(map(escaped, doubts))}."
    unknown = dict.fromkeys(row.uptake.said for row in found.rows if row.uptake.has is Has.NO_ANSWER)
    if unknown:
        yield f"Figures are unknown: {'; '.join(unknown)}."
    closed = Counter(forward.state for forward in found.plan if not forward.is_live)
    closed[State.BROKEN] += len(found.plan.broken)
    counts = ", ".join(f"{closed[state]} {state}" for state in State if closed[state])
    if counts:
        yield f"Not open: {counts}; 'qvm-forward list' says why."
    if found.clients is not None:
        yield from found.clients.remarks()
        if found.by_nft.rows:
            yield "Who is connected by nft is unknown: no qube reports it."
    if found.silent:
        yield drains.unknown(found.silent)
    if found.due:
        yield f"Not in force yet: {counted(len(found.due), 'change')}; run 'qvm-forward apply'."


def about(row: Row) -> Iterator[str]:
    """What is not as it should be with a forward, or is counted and no column has it, in a sentence each."""
    name, report = row.forward.named, row.uptake.report
    whose = f"{name}{' (udp)' if row.uptake.proto is Proto.UDP else ''}"
    if row.verdict.is_allowed is False:
        yield f"{whose}: dom0 denies its calls: {escaped(row.verdict.reason)}."
    if row.uptake.is_shut:
        yield f"{name} is {State.WAITING}: {row.problem}."
    if report is None:
        return
    if refused := carried.refused(report.refused):
        yield f"{whose}: refused: {refused}."
    if report.datagrams_sent or report.datagrams_received:
        sent, received = report.datagrams_sent, report.datagrams_received
        yield f"{whose}: {counted(sent, 'datagram')} from clients, {received} to clients."
    if dropped := carried.refused(report.dropped):
        yield f"{whose}: datagrams dropped: {dropped}."
    if report.last_error is not None:
        at = "" if report.last_error_at is None else f" at {local(report.last_error_at)}"
        yield f"{whose}: last error{at}: {report.last_error}."
