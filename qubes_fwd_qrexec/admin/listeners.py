# SPDX-License-Identifier: GPL-2.0-or-later
"""What the listeners answer when dom0 asks them: which forwards they have open, and what goes on of others.

Of a port that another program holds, and of connections that dom0 cannot end, dom0 hears by this alone. What
a qube says is untrusted: `common.report` checks it, users are told it, and nothing is opened or closed by it.
"""

import time
from collections.abc import Callable, Collection, Mapping
from enum import StrEnum
from typing import NamedTuple

from qubes_fwd_qrexec.common.config import Service
from qubes_fwd_qrexec.common.report import REPORT_MAX_BYTES, ForwardReport, QubeReport, ReportError
from qubes_fwd_qrexec.common.services import STATUS_SERVICE
from qubes_fwd_qrexec.common.values import QubeName, RuleName

from . import policy
from .answers import NO_SERVICE, AnswerError, NotRunningError, at_once
from .backend import Backend
from .inventory import LISTENER_FEATURE, Inventory
from .revoking import serving
from .states import Forward, Plan, State

# A listener that reads QubesDB takes up a change within half a second; an earlier answer may be of the old.
ASKED_AT_S = (0.0, 0.7, 1.3)
# For all questions to one qube. An answer takes some tenths of a second.
BOUND_S = 2.0
_TIMEOUT_S = 1.0

Key = tuple[QubeName, RuleName]
"""Target and name of a rule."""
Answer = QubeReport | AnswerError
"""What a qube says of itself, or why there is no answer."""


class Has(StrEnum):
    """Whether a listener has a forward open, or what keeps it from that."""

    OPEN = "open"
    IN_PART = "open-in-part"
    FIREWALL = "firewall"
    """Its firewall lets nobody in to a port that the listener does not listen on."""
    FAILED = "failed"
    """It could not open it, and says why."""
    NOT_YET = "not-yet"
    NO_LISTENER = "no-listener"
    NO_SERVICE = "no-service"
    """The qube lacks our package."""
    NOT_OFFERED = "not-offered"
    """The qube was not asked, as it has not told dom0 that it has our package."""
    NO_ANSWER = "no-answer"


class Uptake(NamedTuple):
    """What became of one forward at its listener.

    ``said`` is why, as far as the qube or the call says so. ``report`` is there if the listener has it.
    """

    has: Has
    said: str = ""
    report: ForwardReport | None = None


class GoesOn(NamedTuple):
    """Connections of a forward that is closed. ``connections`` is None where nobody tells how many.

    ``target`` and ``name`` are None where the qube does not say of which forwards it has any. Within
    ``left_s`` seconds they may end by themselves, and are cut then; None: they should have been cut.
    ``service``: over what, if dom0 could not end them.
    """

    target: QubeName | None
    name: RuleName | None
    exposed: QubeName
    connections: int | None
    left_s: int | None = None
    service: Service = Service.CONNECT_TCP


class Heard(NamedTuple):
    """What listeners said after a change: of the forwards that they should have open, by target and name,
    and what goes on of those that they should not."""

    uptakes: Mapping[Key, Uptake]
    goes_on: tuple[GoesOn, ...] = ()


def ask(backend: Backend, qube: QubeName, argument: str = "", timeout_s: float | None = None) -> QubeReport:
    """What a qube says of itself. Raises `AnswerError`, also for what cannot be read."""
    service = f"{STATUS_SERVICE}+{argument}"
    untrusted_answer = backend.ask(qube, service, REPORT_MAX_BYTES, timeout_s)
    try:
        return QubeReport.parse(untrusted_answer)
    except ReportError as error:
        raise AnswerError(f"what {qube} says cannot be read: {error}") from error


def ask_all(backend: Backend, qubes: Collection[QubeName]) -> dict[QubeName, Answer]:
    """The answer of each qube. All are asked at once, by threads that end before this returns."""
    return at_once(lambda qube: _answer(backend, qube, None), qubes)


def _answer(backend: Backend, qube: QubeName, timeout_s: float | None) -> Answer:
    try:
        return ask(backend, qube, timeout_s=timeout_s)
    except AnswerError as error:
        return error


def is_without_listener(answer: Answer) -> bool:
    """Whether nothing of ours runs there that could have connections."""
    return isinstance(answer, NotRunningError) or (
        isinstance(answer, AnswerError) and answer.status == NO_SERVICE
    )


def uptake(forward: Forward, answer: Answer) -> Uptake:
    """What became of a forward, by the answer of its exposed qube."""
    if isinstance(answer, AnswerError):
        return Uptake(Has.NO_SERVICE if answer.status == NO_SERVICE else Has.NO_ANSWER, str(answer))
    if answer.listener is None:
        return Uptake(Has.NO_LISTENER, answer.listener_problem or "")
    key = "" if forward.config is None else forward.config.key
    report = answer.listener.find(*forward.source[:2])
    for problem in answer.listener.problems:
        if problem.key == key:
            return Uptake(Has.FAILED, problem.text, report)
    if report is None:
        return Uptake(Has.NOT_YET)
    if not report.is_listening:
        return Uptake(Has.IN_PART, report=report)
    return Uptake(Has.FIREWALL if key in answer.firewall.waiting else Has.OPEN, report=report)


def flows(answer: QubeReport, live: Collection[Key]) -> dict[Key, tuple[int, int | None]]:
    """The connections that a qube has of forwards that are closed, and the seconds that are left to them:
    None where they should have been cut. ``live`` are the forwards that it should have.
    """
    found: dict[Key, tuple[int, int | None]] = {}
    listener = answer.listener
    for old in () if listener is None else listener.draining:
        count, left_s = found.get((old.target, old.name), (0, 0))
        if old.connections:
            found[old.target, old.name] = count + old.connections, max(left_s or 0, old.left_s)
    for forward in () if listener is None else listener.forwards:
        key = (forward.target, forward.name)
        if forward.connections and key not in live:
            found[key] = found.get(key, (0, 0))[0] + forward.connections, None
    return found


def listening(planned: Plan, inventory: Inventory, qubes: Collection[str] = ()) -> list[QubeName]:
    """Every running qube that listens, or may have and drains; of some ``qubes``, those that serve them.

    A listener goes on when its qube's flag is taken away, so all that have our package count.
    """
    exposed = {forward.exposed for forward in planned}
    able = serving(inventory)
    return sorted(
        qube.name
        for qube in inventory.qubes.values()
        if qube.is_running
        and (qube.told or qube.features.get(LISTENER_FEATURE) or qube.name in able)
        and (not qubes or qube.name in qubes or qube.name in exposed)
    )


def beyond_dom0(before: Plan, after: Plan) -> list[Forward]:
    """The forwards that were in force and are no more, and whose calls dom0 cannot end: those over the stock
    service, and those over calls that others need. What is only changed may keep its connections.
    """
    still = {(*forward.source[:2], forward.exposed) for forward in after.live}
    needed = {policy.calls_of(line) for forward in after.live for line in policy.lines(forward)}
    return [
        forward
        for forward in before.live
        if forward.state is State.ACTIVE
        and (*forward.source[:2], forward.exposed) not in still
        and (
            forward.service is Service.CONNECT_TCP
            or not needed.isdisjoint(map(policy.calls_of, policy.lines(forward)))
        )
    ]


def ask_after(
    before: Plan,
    after: Plan,
    keys: Collection[tuple[str, str]],
    inventory: Inventory,
    backend: Backend,
    *,
    everything_at: Collection[QubeName] = (),
    elapsed: Callable[[], float] = time.monotonic,
    rest: Callable[[float], None] = time.sleep,
) -> Heard:
    """Ask the listeners that a change concerns, all at once, what they have made of it: 2 s at most.

    ``keys`` are the rules that it was about: they are to be open now, or were closed before and may drain.
    What the change closed and dom0 cannot end is asked for in any case, and all that goes on at the qubes
    ``everything_at``. The caller should not hold the lock. Raises nothing.
    """
    fresh = [f for f in after if f.source[:2] in keys and f.state is State.ACTIVE and f.exposed is not None]
    uptakes = {f.source[:2]: Uptake(Has.NOT_OFFERED) for f in fresh if not _is_able(f, inventory)}
    asked = [forward for forward in fresh if forward.source[:2] not in uptakes]
    was = {forward.source[:2]: forward.config for forward in before.live}
    renewed = {f.exposed for f in asked if was.get(f.source[:2], f.config) != f.config}
    over = beyond_dom0(before, after)
    closed = set(keys) - {forward.source[:2] for forward in (*before.live, *after.live)}
    qubes = {*everything_at, *(listening(after, inventory) if closed else ())}
    qubes |= {forward.exposed for forward in (*asked, *over) if forward.exposed is not None}

    def heard(qube: QubeName, answer: Answer) -> Heard:
        services = {f.source[:2]: f.service or Service.CONNECT_TCP for f in over if f.exposed == qube}
        live = [forward.source[:2] for forward in after.live if forward.exposed == qube]
        if isinstance(answer, QubeReport):
            left = [
                GoesOn(*key, qube, *counts, services.get(key, Service.CONNECT_TCP))
                for key, counts in flows(answer, live).items()
                if key in closed or key in services or qube in everything_at
            ]
        elif is_without_listener(answer):
            left = []
        else:
            left = [GoesOn(*key, qube, None, None, service) for key, service in services.items()]
            left = left or [GoesOn(None, None, qube, None) for each in everything_at if each == qube]
        return Heard({f.source[:2]: uptake(f, answer) for f in asked if f.exposed == qube}, tuple(left))

    def ask_until_settled(qube: QubeName) -> Heard:
        begun, said = elapsed(), Heard({})
        for at in ASKED_AT_S[qube in renewed :]:
            rest(max(0.0, begun + at - elapsed()))
            left_s = begun + BOUND_S - elapsed()
            if left_s > 0:
                said = heard(qube, _answer(backend, qube, min(_TIMEOUT_S, left_s)))
            if _is_settled(said, is_everything=qube in everything_at):
                break
        return said

    all_heard = at_once(ask_until_settled, sorted(qubes)).values()
    for each in all_heard:
        uptakes |= each.uptakes
    return Heard(uptakes, tuple(left for each in all_heard for left in each.goes_on))


def _is_able(forward: Forward, inventory: Inventory) -> bool:
    exposed = forward.exposed
    return exposed is not None and inventory.offers(exposed)


def _is_settled(heard: Heard, *, is_everything: bool) -> bool:
    """Whether a later answer would say the same."""
    if any(
        each.has in (Has.NOT_YET, Has.FAILED, Has.IN_PART, Has.FIREWALL) for each in heard.uptakes.values()
    ):
        return False
    return not heard.goes_on if is_everything else all(each.left_s is not None for each in heard.goes_on)
