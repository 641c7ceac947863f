# SPDX-License-Identifier: GPL-2.0-or-later
"""What a qube says of itself when dom0 asks it by ``qubes.ForwardStatus``.

What it says is untrusted: `report` checks it, and nothing is decided by it.
"""

from qubes_fwd_qrexec.common.report import (
    REPORT_MAX_BYTES,
    ForwardReport,
    ListenerReport,
    QubeReport,
    ReportError,
)
from qubes_fwd_qrexec.common.services import STATUS_SERVICE
from qubes_fwd_qrexec.common.values import QubeName

from .answers import AnswerError
from .backend import Backend
from .states import Forward


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
