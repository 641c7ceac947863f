# SPDX-License-Identifier: GPL-2.0-or-later
"""Live figures of a forward, as its listener tells them when it is asked by ``qubes.ForwardStatus``.

What a qube says is untrusted: `report` checks it, and nothing is decided by it. Each qube is asked once.
"""

from collections.abc import Collection
from typing import Any, NamedTuple, Protocol

from qubes_fwd_qrexec.common.report import (
    REPORT_MAX_BYTES,
    ForwardReport,
    ListenerReport,
    QubeReport,
    ReportError,
)
from qubes_fwd_qrexec.common.services import STATUS_SERVICE
from qubes_fwd_qrexec.common.values import QubeName

from .answers import NO_SERVICE, AnswerError, NotRunningError
from .backend import Backend
from .states import Forward

_AT_ONCE = 32


class Figures(NamedTuple):
    """What a listener counts: ``connections`` are open now, the others were since it began.

    ``problem`` is what keeps it from carrying connections, as far as it says so; ``muxpool`` is how many
    mux calls the target has of it, or None where it was not asked or has not answered.
    """

    report: ForwardReport
    problem: str | None = None
    mux_calls: int | None = None
    bugs: int = 0
    """Of the listener itself, of any of its forwards."""
    bugs_in_target: int = 0

    @property
    def refused(self) -> int:
        return sum(self.report.refused.values())

    def as_json(self) -> dict[str, Any]:
        return {
            "is_known": True,
            **self.report.as_json(),
            "problem": self.problem,
            "mux_calls_in_target": self.mux_calls,
            "bugs": self.bugs,
            "bugs_in_target": self.bugs_in_target,
        }


class Unknown(NamedTuple):
    """No figures, and one reason. ``is_trouble``: there should be some, and the listener is at fault."""

    reason: str
    is_trouble: bool = False

    def as_json(self) -> dict[str, Any]:
        return {"is_known": False, "reason": self.reason}


class FigureSource(Protocol):
    """Asks the listeners; it never raises, as what cannot be asked is unknown."""

    def figures(self, forward: Forward) -> Figures | Unknown:
        """The figures of one live forward."""

    def prepare(self, qubes: Collection[QubeName]) -> None:
        """Ask many qubes at once, so that nobody waits for one after the other."""

    def answer(self, qube: QubeName) -> QubeReport | None:
        """All that a qube says of itself, if it says anything."""


def ask(backend: Backend, qube: QubeName, argument: str = "", timeout_s: float | None = None) -> QubeReport:
    """What a qube says of itself. Raises `AnswerError`, also for what cannot be read."""
    service = f"{STATUS_SERVICE}+{argument}"
    untrusted_answer = backend.ask(qube, service, REPORT_MAX_BYTES, timeout_s)
    try:
        return QubeReport.parse(untrusted_answer)
    except ReportError as error:
        raise AnswerError(f"what {qube} says cannot be read: {error}") from error


def said_of(forward: Forward, listener: ListenerReport) -> tuple[ForwardReport | None, str | None]:
    """What a listener says of a forward, if it has it open, and of a port that it cannot open."""
    key = "" if forward.config is None else forward.config.key
    problem = next((problem.text for problem in listener.problems if problem.key == key), None)
    found = listener.find(forward.source.target, forward.source.name)
    if problem is None and found is not None and not found.is_listening:
        problem = "not all of its ports are open"
    return found, problem


class QubeFigures:
    """Figures from the qubes themselves, each asked at most once."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._answers: dict[QubeName, QubeReport | AnswerError] = {}

    def figures(self, forward: Forward) -> Figures | Unknown:
        if forward.exposed is None:
            return Unknown("no qube listens")
        answer = self._ask(forward.exposed)
        if isinstance(answer, AnswerError):
            if answer.status == NO_SERVICE:
                what = f"{forward.exposed} does not have qubes-fwd-qrexec, without which it does not listen"
                return Unknown(what, True)
            return Unknown(str(answer))
        if answer.listener is None:
            return Unknown(f"{forward.exposed}: {answer.listener_problem or 'no listener is running'}", True)
        found, problem = said_of(forward, answer.listener)
        if found is None:
            why = "" if problem is None else f": {problem}"
            return Unknown(f"{forward.exposed} does not have {forward.source} open{why}", True)
        if problem is None and forward.config is not None and forward.config.key in answer.firewall.waiting:
            problem = "its firewall lets nobody in to a port that the listener does not listen on"
        mux_calls = self._mux_calls(forward)
        return Figures(found, problem, mux_calls, answer.listener.bugs, self._bugs_in_target(forward))

    def _mux_calls(self, forward: Forward) -> int | None:
        target = forward.source.target
        if forward.config is None or forward.config.transport != "mux":
            return None
        answer = self._ask(target)
        if isinstance(answer, AnswerError):
            return None
        ports = forward.config.target_ports
        return sum(
            found.mux_calls
            for found in answer.calls
            if found.source == forward.exposed
            and (found.ports.first, found.ports.last) == (ports.first, ports.last)
        )

    def _bugs_in_target(self, forward: Forward) -> int:
        """Only where the target was asked anyway."""
        answer = self._answers.get(forward.source.target)
        return answer.bugs if isinstance(answer, QubeReport) else 0

    def prepare(self, qubes: Collection[QubeName]) -> None:
        from concurrent.futures import ThreadPoolExecutor

        if len(qubes) > 1:
            with ThreadPoolExecutor(min(_AT_ONCE, len(qubes))) as pool:
                list(pool.map(self._ask, qubes))

    def answer(self, qube: QubeName) -> QubeReport | None:
        found = self._ask(qube)
        if isinstance(found, NotRunningError) or (
            isinstance(found, AnswerError) and found.status == NO_SERVICE
        ):
            return QubeReport(program="")  # without our package no listener runs
        return None if isinstance(found, AnswerError) else found

    def _ask(self, qube: QubeName) -> QubeReport | AnswerError:
        if qube not in self._answers:
            try:
                self._answers[qube] = ask(self._backend, qube)
            except AnswerError as error:
                self._answers[qube] = error
        return self._answers[qube]
