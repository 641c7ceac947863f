# SPDX-License-Identifier: GPL-2.0-or-later
"""Connections to a forward are cut where they are accepted: what exposed qubes are told, and what came of it.

No rule changes by it, so whoever is let in may connect again. What a qube answers is untrusted: if it lies,
only closing the forward ends what it carries to the target.
"""

from collections.abc import Collection
from typing import NamedTuple

from qubes_fwd_qrexec.common.clientreport import CutReport, WhichClients
from qubes_fwd_qrexec.common.config import ForwardKey
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.services import CUT_SERVICE
from qubes_fwd_qrexec.common.values import QubeName

from .answers import AnswerError, at_once, reading
from .backend import Backend

TOO_OLD = "is too old for that; update qubes-fwd-qrexec there and restart it"
# A number, and a text of at most 200 characters.
_ANSWER_MAX_BYTES = 1024
# A call takes some tenths of a second.
_TIMEOUT_S = 5.0
ForwardAt = tuple[QubeName, ForwardKey]
"""An exposed qube, and one protocol of a forward there."""


class Cut(NamedTuple):
    """How many connections or flows ended at one place; ``problem`` is why others may go on."""

    exposed: QubeName
    key: ForwardKey
    ended: int = 0
    problem: str | None = None


def cut(places: Collection[ForwardAt], which: WhichClients, backend: Backend) -> tuple[Cut, ...]:
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
