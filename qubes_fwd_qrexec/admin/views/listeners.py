# SPDX-License-Identifier: GPL-2.0-or-later
"""What listeners answer when dom0 asks them: which forwards they have open, and which connections of others.

Only a listener knows that another program holds a port, and which connections go on that dom0 cannot end.
What a qube says is untrusted: `common.report` checks it, users are told it, and it opens or closes nothing.
"""

from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import NamedTuple

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.answers import AnswerError, NotRunningError, ask_status, at_once
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.inventory import LISTENER_FEATURE, Inventory
from qubes_fwd_qrexec.admin.revoking import serving
from qubes_fwd_qrexec.admin.states import Forward, Key, Plan, State
from qubes_fwd_qrexec.common.config import ForwardKey, ListenerConfig, Service
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.report import ForwardReport, QubeReport
from qubes_fwd_qrexec.common.values import Proto, QubeName, RuleName

from . import carried
from .times import amount

Answer = QubeReport | AnswerError
"""What a qube says of itself, or why there is no answer."""

_WAITING = "its firewall lets nobody in to a port that the listener does not listen on"
# How long a change waits for what a qube makes of it; the qube itself waits a moment for its listener.
AFTER_S = 5.0


class Has(StrEnum):
    """Whether a listener has a forward open, or what keeps it from that.

    FIREWALL: its firewall lets nobody in to a port that it does not listen on. NO_SERVICE: the qube lacks
    our package.
    """

    OPEN = "open"
    IN_PART = "open-in-part"
    FIREWALL = "firewall"
    FAILED = "failed"
    NOT_YET = "not-yet"
    NO_LISTENER = "no-listener"
    NO_SERVICE = "no-service"
    NO_ANSWER = "no-answer"


class Uptake(NamedTuple):
    """What became of one forward at its listener, which has each protocol of it by itself.

    ``said`` is why it is not open, or why that is unknown. ``report`` is there if the listener has it.
    """

    has: Has
    said: str = ""
    report: ForwardReport | None = None
    proto: Proto = Proto.TCP

    @property
    def is_shut(self) -> bool:
        """Whether the listener has not opened it, or not entirely."""
        return self.has not in (Has.OPEN, Has.NO_ANSWER)

    def note(self, forward: Forward) -> str | None:
        """Why the forward is not open, and the command that says more; None if it is open or unknown."""
        helps = f"'qvm-forward diagnose {forward.named}' says what helps"
        return f"{self.said}; {helps}" if self.is_shut else None


class GoesOn(NamedTuple):
    """Connections of a forward that is closed, or flows, of ``proto``. ``connections`` is None where nobody
    tells how many.

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
    proto: Proto = Proto.TCP

    @property
    def counted(self) -> str:
        """How many go on, if known."""
        return carried.live(self.proto, self.connections)

    def __str__(self) -> str:
        """Which connections go on, and why."""
        over = f"over {Service.CONNECT_TCP}, which dom0 cannot end"
        if self.target is None:
            return f"{self.exposed} does not say whether it has connections {over}"
        what = f"{self.target} {self.name}: {self.counted}"
        if self.left_s is not None:
            now = f"'qvm-forward cut {self.target} {self.name}' ends that now"
            return f"{what} at {self.exposed} may go on for at most {amount(self.left_s)}; {now}"
        if self.service is not Service.CONNECT_TCP:
            over = "over a call that another forward needs, so that dom0 cannot end it"
        elif self.proto is Proto.UDP:
            over = "that should have ended"
        where = f"; {self.exposed} does not say" if self.connections is None else f" at {self.exposed}"
        return f"{what} {over}{where}"


class Heard(NamedTuple):
    """What listeners said after a change: of the forwards that they should have open, by target and name,
    and what goes on of those that they should not."""

    uptakes: Mapping[Key, tuple[Uptake, ...]]
    goes_on: tuple[GoesOn, ...] = ()


def ask_all(
    backend: Backend, qubes: Collection[QubeName], timeout_s: float | None = None, argument: str = ""
) -> dict[QubeName, Answer]:
    """The answer of each qube; one that is too old for the argument is asked without. All are asked at once,
    by threads that end before this returns.
    """

    def answer(qube: QubeName, argument: str = argument) -> Answer:
        try:
            return ask_status(backend, qube, argument, timeout_s)
        except AnswerError as error:
            return answer(qube, "") if argument and error.status == ExitStatus.BAD_ARGUMENT else error

    return at_once(answer, qubes)


def uptakes(forward: Forward, answer: Answer | None) -> tuple[Uptake, ...]:
    """What became of each protocol of a forward, by what its exposed qube says; None where that is halted."""
    configs = forward.listener_configs
    return tuple(
        _uptake(forward.exposed, config, answer, is_alone=len(configs) == 1)._replace(proto=config.proto)
        for config in configs
    )


def _uptake(
    exposed: QubeName | None, config: ListenerConfig, answer: Answer | None, *, is_alone: bool
) -> Uptake:
    if answer is None:
        return Uptake(Has.NO_ANSWER, f"{exposed} is halted")
    if isinstance(answer, AnswerError):
        if answer.status == ExitStatus.NO_SERVICE:
            lacks = "does not have qubes-fwd-qrexec, without which it does not listen"
            return Uptake(Has.NO_SERVICE, f"{exposed} {lacks}")
        return Uptake(Has.NO_ANSWER, str(answer))
    if answer.listener is None:
        why = answer.listener_problem or "no listener is running"
        return Uptake(Has.NO_LISTENER, f"{exposed} does not listen: {why}")
    report = answer.listener.find(config.target, config.name, config.proto)
    shut = f"{exposed} does not have {'it' if is_alone else f'its {config.proto.upper()}'} open"
    for problem in answer.listener.problems:
        if problem.key == config.key:
            return Uptake(Has.FAILED, f"{shut}: {problem.text}", report)
    if report is None:
        return Uptake(Has.NOT_YET, f"{shut} yet")
    if not report.is_listening:
        return Uptake(Has.IN_PART, f"{shut}: not all of its ports are open", report)
    if config.key in answer.firewall.waiting:
        return Uptake(Has.FIREWALL, f"{shut}: {_WAITING}", report)
    return Uptake(Has.OPEN, report=report)


def has_no_listener(answer: Answer) -> bool:
    """Whether an answer means that no listener of ours runs there."""
    if isinstance(answer, AnswerError):
        return isinstance(answer, NotRunningError) or answer.status == ExitStatus.NO_SERVICE
    return answer.listener is None and answer.listener_problem is None


def flows(exposed: QubeName, answer: Answer, planned: Plan) -> list[GoesOn] | None:
    """The connections that a qube has of forwards that the plan closes; None if it does not say."""
    if has_no_listener(answer):
        return []
    if isinstance(answer, AnswerError) or answer.listener is None:
        return None
    live = {(qube, config.key) for forward in planned.live for qube, config in forward.configs}
    found: dict[ForwardKey, tuple[int, int | None]] = {}
    for old in answer.listener.draining:
        key = ForwardKey(old.target, old.name, old.proto)
        count, left_s = found.get(key, (0, 0))
        found[key] = count + old.connections, max(left_s or 0, old.left_s)
    for forward in answer.listener.forwards:
        key = ForwardKey(forward.target, forward.name, forward.proto)
        if forward.connections and (exposed, str(key)) not in live:
            found[key] = found.get(key, (0, 0))[0] + forward.connections, None
    return [
        GoesOn(key.target, key.name, exposed, *counts, proto=key.proto)
        for key, counts in found.items()
        if counts[0]
    ]


def listening(inventory: Inventory) -> set[QubeName]:
    """Every running qube that listens, or may and drains: it goes on when its qube's flag is taken away."""
    flagged = {
        qube.name
        for qube in inventory.qubes.values()
        if qube.is_running and (qube.configured or qube.features.get(LISTENER_FEATURE))
    }
    return flagged | serving(inventory)


def beyond_dom0(before: Plan, after: Plan) -> list[tuple[QubeName, ListenerConfig]]:
    """The protocols of forwards that were in force and are no more, and whose calls dom0 cannot end: those
    over the stock service, and those over calls that others need; with their exposed qubes. What is only
    changed may keep its connections.
    """
    still = {(*forward.named.key, forward.exposed) for forward in after.live}
    gone = [
        (forward.exposed, config, {*map(policy.calls_of, policy.lines_of(forward, config))})
        for forward in before.live
        if (*forward.named.key, forward.exposed) not in still and forward.state is State.ACTIVE
        for config in forward.listener_configs
    ]
    if not gone:
        return []
    # None stands for all calls of the stock service.
    lasting = {None, *(policy.calls_of(line) for forward in after.live for line in policy.lines(forward))}
    return [
        (exposed, config)
        for exposed, config, calls in gone
        if exposed is not None and not lasting.isdisjoint(calls)
    ]


def ask_after(
    before: Plan,
    after: Plan,
    keys: Collection[Key],
    inventory: Inventory,
    backend: Backend,
    *,
    is_everything: bool = False,
) -> Heard:
    """Ask the listeners that a change concerns, once and all at once, what they have made of it.

    ``keys`` are the rules that it was about: they are to be open now, or were closed before and may drain.
    What the change closed and dom0 cannot end is asked for in any case, and where ``is_everything`` all that
    goes on anywhere. The caller should not hold the lock. Raises nothing.
    """
    keys = frozenset(keys)
    opened = [f for f in after if f.named.key in keys and f.state is State.ACTIVE and f.listener_configs]
    over = beyond_dom0(before, after)
    closed = keys - {forward.named.key for forward in (*before.live, *after.live)}
    qubes = {forward.exposed for forward in opened if forward.exposed is not None} | {
        qube for qube, _ in over
    }
    qubes |= listening(inventory) if closed or is_everything else set()
    answers = ask_all(backend, sorted(qubes), AFTER_S)

    took: dict[Key, tuple[Uptake, ...]]
    took = {f.named.key: uptakes(f, answers[f.exposed]) for f in opened if f.exposed is not None}
    goes_on: list[GoesOn] = []
    for qube, answer in answers.items():
        configs = [config for exposed, config in over if exposed == qube]
        services: dict[tuple[str | None, ...], Service] = {
            (config.target, config.name, config.proto): config.service for config in configs
        }
        left = flows(qube, answer, after)
        if left is None:
            left = [GoesOn(config.target, config.name, qube, None, proto=config.proto) for config in configs]
            if is_everything and not left:
                left = [GoesOn(None, None, qube, None)]
        elif not is_everything:
            left = [each for each in left if each[:2] in closed or _about(each) in services]
        goes_on += [each._replace(service=services.get(_about(each), each.service)) for each in left]
    return Heard(took, tuple(goes_on))


def _about(left: GoesOn) -> tuple[QubeName | None, RuleName | None, Proto]:
    return left.target, left.name, left.proto
