# SPDX-License-Identifier: GPL-2.0-or-later
"""A lab whose qubes answer as a test wants it, without a program in any of them."""

from collections.abc import Mapping
from typing import NamedTuple

from faulty import Faulty

from qubes_fwd_qrexec.admin.answers import AnswerError
from qubes_fwd_qrexec.common.clientreport import CutReport
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.report import QubeReport, dump
from qubes_fwd_qrexec.common.services import REVOKE_SERVICE
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory

LACKS = AnswerError("it lacks the service", ExitStatus.NO_SERVICE)


class Question(NamedTuple):
    qube: str
    service: str
    timeout_s: float | None
    given: str


class Answering(Faulty):
    """``says`` are the answers by qube and service; all others lack the service. ``asked`` are the questions,
    but those that revoke calls.
    """

    def __init__(
        self, lab: LabDirectory, says: Mapping[tuple[str, str], QubeReport | CutReport | bytes | AnswerError]
    ) -> None:
        super().__init__(lab)
        self.says = dict(says)
        self.asked: list[Question] = []

    def ask(
        self, qube: QubeName, service: str, max_bytes: int, timeout_s: float | None = None, given: str = ""
    ) -> bytes:
        if service == REVOKE_SERVICE:
            return super().ask(qube, service, max_bytes, timeout_s, given)
        self.asked.append(Question(qube, service, timeout_s, given))
        answer = self.says.get((qube, service), LACKS)
        if isinstance(answer, AnswerError):
            raise answer
        untrusted = answer if isinstance(answer, bytes) else dump(answer.as_json())
        assert len(untrusted) <= max_bytes
        return untrusted
