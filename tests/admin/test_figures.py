# SPDX-License-Identifier: GPL-2.0-or-later
"""What dom0 makes of what qubes say of themselves."""

import pytest
from memory import Memory
from worlds import world

from qubes_fwd_qrexec.admin.answers import AnswerError
from qubes_fwd_qrexec.admin.figures import ask
from qubes_fwd_qrexec.common.report import (
    CallsReport,
    FirewallReport,
    ForwardReport,
    ListenerReport,
    Problem,
    QubeReport,
    dump,
)
from qubes_fwd_qrexec.common.values import QubeName


def listening(
    *forwards: ForwardReport, problems: tuple[Problem, ...] = (), waiting: tuple[str, ...] = ()
) -> bytes:
    listener = ListenerReport(since=1, forwards=forwards, problems=problems)
    firewall = FirewallReport(waiting=waiting)
    return dump(QubeReport(program="1", listener=listener, firewall=firewall).as_json())


def mux_calls(*found: CallsReport) -> bytes:
    return dump(QubeReport(program="1", listener_problem="no listener", calls=found).as_json())


class Saying(Memory):
    """A system whose qubes give one answer."""

    def __init__(self, answer: bytes) -> None:
        super().__init__(world())
        self._answer = answer

    def ask(
        self, qube: QubeName, service: str, max_bytes: int, timeout_s: float | None = None, given: str = ""
    ) -> bytes:
        assert (qube, service) == ("work", "qubes.ForwardStatus+80")
        return self._answer


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"\x1b[2J", "the answer is no JSON in ASCII"),
        (b"{}", "the answer: version is missing"),
    ],
)
def test_an_answer_that_cannot_be_read_is_none(answer: bytes, why: str) -> None:
    with pytest.raises(AnswerError, match=f"^what work says cannot be read: {why}$"):
        ask(Saying(answer), QubeName("work"), "80")
    assert ask(Saying(mux_calls()), QubeName("work"), "80").listener is None
