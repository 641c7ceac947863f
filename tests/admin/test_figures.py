# SPDX-License-Identifier: GPL-2.0-or-later
"""What dom0 makes of what qubes say of themselves: figures, or one reason why there are none."""

from dataclasses import replace

import pytest
from test_status import REPORT
from worlds import only, rule

from qubes_fwd_qrexec.admin.answers import AnswerError
from qubes_fwd_qrexec.admin.figures import Figures, QubeFigures, Unknown
from qubes_fwd_qrexec.common.report import (
    REPORT_MAX_BYTES,
    CallsReport,
    FirewallReport,
    ForwardReport,
    ListenerReport,
    Problem,
    QubeReport,
    dump,
)
from qubes_fwd_qrexec.common.values import QubeName, TargetPorts

FORWARD = only(rule())


class Qubes:
    """The qubes of a system, each of which may be asked once."""

    def __init__(self, **answers: bytes | AnswerError) -> None:
        self.answers = {name.replace("_", "-"): answer for name, answer in answers.items()}

    def ask(self, qube: QubeName, service: str, max_bytes: int, timeout_s: float | None) -> bytes:
        assert (service, max_bytes, timeout_s) == ("qubes.ForwardStatus+", REPORT_MAX_BYTES, None)
        answer = self.answers.pop(qube)
        if isinstance(answer, AnswerError):
            raise answer
        return answer


def figures(**answers: bytes | AnswerError) -> Figures | Unknown:
    source = QubeFigures(Qubes(**answers))  # type: ignore[arg-type]
    found = source.figures(FORWARD)
    assert source.figures(FORWARD) == found
    return found


def listening(
    *forwards: ForwardReport, problems: tuple[Problem, ...] = (), waiting: tuple[str, ...] = ()
) -> bytes:
    listener = ListenerReport(since=1, forwards=forwards, problems=problems)
    firewall = FirewallReport(waiting=waiting)
    return dump(QubeReport(program="1", listener=listener, firewall=firewall).as_json())


def mux_calls(*found: CallsReport) -> bytes:
    return dump(QubeReport(program="1", listener_problem="no listener", calls=found).as_json())


MISSING = AnswerError("x", 127)


def test_figures_are_those_of_the_listener_and_of_the_targets_mux_calls() -> None:
    ports = TargetPorts(80, 80)
    mine = CallsReport(source=QubeName("sys-net"), ports=ports, mux_calls=2)
    others = (
        CallsReport(source=QubeName("other"), ports=ports, mux_calls=5),
        CallsReport(source=mine.source, ports=TargetPorts(80, 81), mux_calls=7),
    )
    assert figures(sys_net=listening(REPORT), work=mux_calls(mine, *others)) == Figures(REPORT, None, 2)
    assert figures(sys_net=listening(REPORT), work=MISSING) == Figures(REPORT, None, None)


def test_bugs_of_either_program_are_told() -> None:
    listener = dump(
        QubeReport(program="1", listener=ListenerReport(since=1, forwards=(REPORT,), bugs=2)).as_json()
    )
    target = dump(QubeReport(program="1", bugs=3).as_json())
    found = figures(sys_net=listener, work=target)
    assert isinstance(found, Figures)
    assert (found.bugs, found.bugs_in_target) == (2, 3)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (MISSING, "sys-net does not have qubes-fwd-qrexec, without which it does not listen"),
        (AnswerError("the call did not end"), "the call did not end"),
        (b"\x1b[2J", "what sys-net says cannot be read: the answer is no JSON in ASCII"),
        (b"{}", "what sys-net says cannot be read: the answer: version is missing"),
    ],
)
def test_who_cannot_be_asked_is_unknown_for_that_reason(answer: bytes | AnswerError, reason: str) -> None:
    assert figures(sys_net=answer) == Unknown(reason, answer is MISSING)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (mux_calls(), "sys-net: no listener"),
        (listening(), "sys-net does not have work web open"),
        (
            listening(problems=(Problem("fwd.work.web", "the port is in use"), Problem("fwd.work.x", "y"))),
            "sys-net does not have work web open: the port is in use",
        ),
    ],
)
def test_a_listener_without_the_forward_is_trouble(answer: bytes, reason: str) -> None:
    assert figures(sys_net=answer) == Unknown(reason, is_trouble=True)


def test_a_forward_that_is_open_in_part_has_figures_and_a_problem() -> None:
    part = replace(REPORT, is_listening=False)
    found = figures(sys_net=listening(part), work=mux_calls())
    assert found == Figures(part, "not all of its ports are open", 0)
    problems = (Problem("fwd.work.web", "refused"),)
    found = figures(sys_net=listening(REPORT, problems=problems), work=mux_calls())
    assert found == Figures(REPORT, "refused", 0)


def test_a_forward_that_the_firewall_keeps_shut_for_its_listener_has_a_problem() -> None:
    words = "its firewall lets nobody in to a port that the listener does not listen on"
    for waiting, problem in ((("fwd.work.x", "fwd.work.web"), words), (("fwd.work.x",), None)):
        found = figures(sys_net=listening(REPORT, waiting=waiting), work=mux_calls())
        assert found == Figures(REPORT, problem, 0)
    problems = (Problem("fwd.work.web", "refused"),)
    answer = listening(REPORT, problems=problems, waiting=("fwd.work.web",))
    assert figures(sys_net=answer, work=mux_calls()) == Figures(REPORT, "refused", 0)
