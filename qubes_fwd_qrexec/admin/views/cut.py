# SPDX-License-Identifier: GPL-2.0-or-later
"""The command cut: end connections to a forward where they are accepted, and leave its rule as it is.

So whoever is let in may connect again. What a qube answers is untrusted: if it lies, only closing the forward
ends what it carries to the target.
"""

from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from ipaddress import ip_network
from typing import Any, NamedTuple

from qubes_fwd_qrexec.admin.answers import AnswerError, at_once, reading
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.snapshot import Snapshot
from qubes_fwd_qrexec.admin.states import Forward, Plan, State
from qubes_fwd_qrexec.common.clientreport import CutReport, WhichClients
from qubes_fwd_qrexec.common.config import ForwardKey
from qubes_fwd_qrexec.common.errors import RefusedError, TextError, UsageError
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.report import DrainingReport, ForwardReport, QubeReport
from qubes_fwd_qrexec.common.rules import Mode
from qubes_fwd_qrexec.common.services import CUT_SERVICE
from qubes_fwd_qrexec.common.values import Proto, QubeName, unmapped

from . import carried
from .listeners import AFTER_S, Answer, ask_all, flows, listening
from .session import Session
from .tables import escaped

TOO_OLD = "is too old for that; update qubes-fwd-qrexec there and restart it"
# A number, and a text of at most 200 characters.
_ANSWER_MAX_BYTES = 1024
# A call takes some tenths of a second.
_TIMEOUT_S = 5.0
ForwardAt = tuple[QubeName, ForwardKey]
"""An exposed qube, and one protocol of a forward there."""
# A qube may name as many as it likes.
_NAMES_MAX = 20


class Cut(NamedTuple):
    """How many connections or flows ended at one place; ``problem`` is why others may go on."""

    exposed: QubeName
    key: ForwardKey
    ended: int = 0
    problem: str | None = None


def cut(args: Namespace, session: Session) -> int:
    """Cut clients where they are connected; exit status 1 if nobody was, or somebody may still be."""
    if args.client == "":  # such as a variable of a script that is not set
        raise UsageError("--client: an address is missing; without --client, all are cut")
    try:
        which = WhichClients.parse(args.client or "")
    except TextError as error:
        raise UsageError(f"--client: {error}") from None
    snapshot = session.look()
    target, planned = snapshot.check_qube(args.qube), snapshot.plan(session.now)
    answers = ask_all(session.backend, sorted(listening(snapshot.inventory)), AFTER_S)
    open_at = places(target, planned, snapshot.inventory, answers)
    silent = sorted(qube for qube, one in answers.items() if flows(qube, one, planned) is None)
    whom = ", ".join(silent)
    unknown = f"no answer from {whom}, where somebody may be connected" if silent else ""
    name = args.name or _only(target, open_at)
    forward = planned.find(target, name)
    if name not in open_at:
        raise RefusedError("; ".join(filter(None, (_why_closed(snapshot, forward, target, name), unknown))))
    found = cut_all(open_at[name], which, session.backend)
    after, way_out = _after(forward, which)
    problems = [one.problem for one in found if one.problem is not None]
    ended = _ended(found)
    status = 0 if ended and not problems else 1
    if session.is_json:
        data: dict[str, Any] = {"qube": target, "name": name, "client": str(which) or None}
        data["cut"] = sum(one.ended for one in found)
        data["at"] = [
            {"qube": one.exposed, "proto": one.key.proto, "cut": one.ended, "problem": one.problem}
            for one in found
        ]
        session.say_json({**data, "silent": silent, "ways_out": [way_out] if way_out else []})
        return status
    whose = f"{target} {name}{'' if which.address is None else f' from {which}'}"
    if ended:
        session.say_done(f"Cut {ended} of {whose}. {after}\n")
    elif not problems:
        shows = f"'qvm-forward status {target} --clients' shows who is"
        session.warn(f"nobody is connected to {whose}; {shows}")
    for problem in problems:
        session.warn(f"connections to {whose} may go on: {escaped(problem)}")
    if unknown:
        session.warn(unknown)
    return status


def cut_all(places: Collection[ForwardAt], which: WhichClients, backend: Backend) -> tuple[Cut, ...]:
    """Cut these clients at all places at once, and say of each what became of it. Raises nothing."""
    return tuple(at_once(lambda place: _cut(*place, which, backend), places).values())


def _cut(exposed: QubeName, key: ForwardKey, which: WhichClients, backend: Backend) -> Cut:
    service = f"{CUT_SERVICE}+{key}"
    try:
        with reading(exposed):
            untrusted_answer = backend.ask(exposed, service, _ANSWER_MAX_BYTES, _TIMEOUT_S, f"{which}\n")
            report = CutReport.parse(untrusted_answer)
    except AnswerError as error:
        is_old = error.status == ExitStatus.NO_SERVICE
        return Cut(exposed, key, problem=f"{exposed} {TOO_OLD}" if is_old else str(error))
    problem = None if report.problem is None else f"{exposed}: {report.problem}"
    return Cut(exposed, key, report.cut, problem)


def places(
    target: QubeName, planned: Plan, inventory: Inventory, answers: Mapping[QubeName, Answer]
) -> dict[str, list[ForwardAt]]:
    """Where there may be connections to each of a target's forwards: by the plan, and by what listeners say,
    which know those that drain.
    """
    found = {
        (forward.exposed, ForwardKey(config.target, config.name, config.proto))
        for forward in planned.live
        for config in forward.listener_configs
        if forward.exposed is not None and inventory.qubes[forward.exposed].is_running
    }
    for qube, answer in answers.items():
        if isinstance(answer, QubeReport) and answer.listener is not None:
            told: Sequence[ForwardReport | DrainingReport]
            told = (*answer.listener.forwards, *answer.listener.draining)
            found |= {(qube, ForwardKey(one.target, one.name, one.proto)) for one in told if one.connections}
    by_name: dict[str, list[ForwardAt]] = {}
    for place in sorted(found):
        if place[1].target == target:
            by_name.setdefault(place[1].name, []).append(place)
    return by_name


def _only(target: QubeName, open_at: Mapping[str, object]) -> str:
    """The one forward of a target that has connections. Raises `RefusedError` if there is another number."""
    if len(open_at) != 1:
        names = ", ".join([*open_at][:_NAMES_MAX])
        which = f"name one of them: {names}" if open_at else "there is nothing to cut"
        raise RefusedError(f"{target} has {'several forwards' if open_at else 'no forward'} open; {which}")
    return next(iter(open_at))


def _why_closed(snapshot: Snapshot, forward: Forward | None, target: QubeName, name: str) -> str:
    """Why nobody can be connected to a forward by qrexec. Raises `RefusedError` if there is none."""
    named = snapshot.find(target, name)
    if forward is not None and forward.is_live and forward.mode is Mode.NFT:
        ends = f"'qvm-forward disable {named}' ends all of its connections"
        return f"{named} goes by nft, where single connections cannot be cut; {ends}"
    state = State.BROKEN if forward is None else forward.state
    nothing = "none of its connections is draining; there is nothing to cut"
    return f"{target} {escaped(name)} is {state}, and {nothing}"


def _ended(found: Sequence[Cut]) -> str:
    """How many connections and flows ended; empty if none did."""
    numbers = {proto: sum(one.ended for one in found if one.key.proto is proto) for proto in Proto.BOTH.each}
    return " and ".join(carried.live(proto, number) for proto, number in numbers.items() if number)


def _after(forward: Forward | None, which: WhichClients) -> tuple[str, tuple[str, ...]]:
    """Whether clients may connect again, and the command that prevents it. One whom nothing but its own
    address lets in can be taken out.
    """
    if forward is None or not forward.is_live:
        return "Its forward is closed, so nobody can connect again.", ()
    (target, name, rule), who, does = forward.named, "Whoever is let in", "closes it"
    way_out: tuple[str, ...] = ("qvm-forward", "disable", target, name)
    if which.address is not None:
        who, address = "It", unmapped(which.address)
        alone = ip_network(address)
        if [network for network in rule.sources.networks if address in network] != [alone]:
            who = f"srchosts={rule.sources} lets it in, so it"
            does, way_out = "changes that", ("qvm-forward", "set", target, name, "srchosts=NETWORKS")
        elif str(rule.sources) != str(alone):
            does, way_out = "keeps it out", ("qvm-forward", "set", target, name, f"srchosts-={alone}")
    return f"{who} may connect again; '{' '.join(way_out)}' {does}.", way_out
