# SPDX-License-Identifier: GPL-2.0-or-later
"""The command status: the figures that qubes give of what is open, and what they say is wrong."""

import time
from dataclasses import replace

import pytest
from answered import REPORT, Saying, listening, look, row, shown
from faulty import Faulty
from worlds import ADD, NOW, Command

from qubes_fwd_qrexec.admin.answers import AnswerError
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.snapshot import look as read_system
from qubes_fwd_qrexec.admin.views.status import asked, size
from qubes_fwd_qrexec.common.report import (
    CallsReport,
    Problem,
    QubeReport,
    Way,
    dump,
)
from qubes_fwd_qrexec.common.values import QubeName, TargetPorts
from qubes_fwd_qrexec.lab.directory import LabDirectory


def test_figures_are_shown_where_the_listener_gives_them(forward: Command, store: Backend) -> None:
    forward(*ADD)
    found = look(store, sys_net=listening(REPORT))
    assert found.is_well
    assert [" ".join(line.split()) for line in shown(found).splitlines()][1:] == [
        "work web active sys-net:80 allows open 3 40 0 999 1.5 KiB"
    ]


def test_the_mux_calls_that_the_target_has_are_those_of_the_forward(forward: Command, store: Backend) -> None:
    forward(*ADD)
    ports = TargetPorts(8080, 8080)
    mine = CallsReport(source=QubeName("sys-net"), ports=ports, mux_calls=2)
    others = (
        CallsReport(source=QubeName("other"), ports=ports, mux_calls=5),
        CallsReport(source=mine.source, ports=TargetPorts(8080, 8081), mux_calls=7),
    )
    target = QubeReport(program="1", calls=(mine, *others))
    assert row(store, sys_net=listening(REPORT), work=target).mux_calls == 2
    assert row(store, sys_net=listening(REPORT), work=AnswerError("x")).mux_calls is None


def test_a_target_without_our_service_is_not_asked(forward: Command, store: Backend) -> None:
    forward(*ADD)
    forward("add", "personal", "81", "--from", "any")
    snapshot, system = read_system(store), Saying(store, {})
    asked(snapshot, snapshot.plan(NOW), NOW, system)
    assert "work" in system.asked
    assert "personal" not in system.asked


def test_refusals_and_the_last_error_are_said(forward: Command, store: Backend) -> None:
    forward(*ADD)
    refused = {"srchosts": 2, "policy": 3, "new-word": 4}
    report = replace(REPORT, refused=refused, last_error="no call", last_error_at=0, way=Way.REFUSED)
    found = look(store, sys_net=listening(report))
    assert found.is_well
    assert "allows refused 3 40 9 999" in " ".join(shown(found).split())
    assert "work web: refused: 4 new-word, 3 denied by dom0, 2 from sources that are not allowed.\n" in shown(
        found
    )
    at = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(0))
    assert f"work web: last error at {at}: no call.\n" in shown(found)
    report = replace(REPORT, last_error="x", last_error_at=2**63 - 1)
    assert "last error at an unknown time: x" in shown(look(store, sys_net=listening(report)))


def test_bugs_of_the_programs_in_the_qubes_are_said(forward: Command, store: Backend) -> None:
    forward(*ADD)
    found = look(store, sys_net=listening(REPORT, bugs=1), work=QubeReport(program="1", bugs=20))
    assert found.is_well  # each has ended no more than what it happened to
    assert shown(found).endswith(
        "sys-net: its listener has hit 1 bug; see its journal.\n"
        "work: its service has hit 20 bugs; see its journal.\n"
    )


HELPS = "; 'qvm-forward diagnose work web' says what helps"
SHUT = "its firewall lets nobody in to a port that the listener does not listen on"
MINE, OTHER = Problem("fwd.work.web", "refused"), Problem("fwd.work.x", "y")


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (listening(REPORT, problems=(OTHER, MINE)), "refused"),
        (listening(replace(REPORT, is_listening=False)), "not all of its ports are open"),
        (listening(REPORT, waiting=("fwd.work.x", "fwd.work.web")), SHUT),
        (listening(REPORT, waiting=("fwd.work.x",)), None),
        (listening(REPORT, problems=(MINE,), waiting=("fwd.work.web",)), "refused"),
        (listening(REPORT, problems=(Problem("fwd.work.web", ""),)), ""),
    ],
)
def test_what_keeps_a_forward_from_being_open_wholly_is_said_and_fails(
    forward: Command, store: Backend, answer: QubeReport, problem: str | None
) -> None:
    forward(*ADD)
    found = look(store, sys_net=answer)
    if problem is None:
        assert found.is_well
        return
    assert not found.is_well
    problem = f"sys-net does not have it open: {problem}{HELPS}"
    assert f"work web is waiting: {problem}.\n" in shown(found)
    assert "work web waiting sys-net:80 allows open" in " ".join(shown(found).split())
    (entry,) = found.as_json()["forwards"]
    assert (entry["state"], entry["reason"]) == ("waiting", problem)
    report = answer.listener.forwards[0].as_json() if answer.listener else {}
    assert entry["figures"] == {
        **report,
        "is_known": True,
        "problem": problem,
        "mux_calls_in_target": 0,
        "bugs": 0,
        "bugs_in_target": 0,
    }


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (QubeReport(program="1", listener_problem="it crashed"), "does not listen: it crashed"),
        (QubeReport(program="1"), "does not listen: no listener is running"),
        (listening(), "does not have it open yet"),
        (listening(problems=(MINE, OTHER)), "does not have it open: refused"),
        (AnswerError("x", 127), "does not have qubes-fwd-qrexec, without which it does not listen"),
    ],
)
def test_a_forward_that_its_listener_does_not_have_open_is_waiting(
    forward: Command, store: Backend, answer: QubeReport | AnswerError, problem: str
) -> None:
    forward(*ADD)
    problem = f"sys-net {problem}{HELPS}"
    found = look(store, sys_net=answer)
    assert not found.is_well
    assert "work web waiting sys-net:80 allows unknown" in " ".join(shown(found).split())
    assert shown(found).endswith(f"\nwork web is waiting: {problem}.\n")
    (entry,) = found.as_json()["forwards"]
    assert (entry["state"], entry["reason"]) == ("waiting", problem)
    assert entry["figures"] == {"is_known": False, "reason": problem}


def test_a_qube_that_says_nothing_makes_nothing_wait(forward: Command, store: Backend) -> None:
    forward(*ADD)
    found = look(store, sys_net=AnswerError("no answer"))
    assert found.is_well
    assert "work web active" in " ".join(shown(found).split())
    assert shown(found).endswith("\nFigures are unknown: no answer.\n")
    assert found.as_json()["forwards"][0]["reason"].startswith("Connections to port 80 of sys-net ")


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0"),
        (1023, "1023"),
        (1024, "1.0 KiB"),
        (10 * 1024, "10 KiB"),
        (5 * 1024**3, "5.0 GiB"),
        (2**63 - 1, "8192 PiB"),
    ],
)
def test_bytes_are_for_people(count: int, shown: str) -> None:
    assert size(count) == shown


class Answering(Faulty):
    """A system whose sys-net gives one answer; the other qubes cannot be read."""

    def __init__(self, lab: LabDirectory, answer: QubeReport) -> None:
        super().__init__(lab)
        self._answer = dump(answer.as_json())

    def ask(
        self, qube: QubeName, service: str, max_bytes: int, timeout_s: float | None = None, given: str = ""
    ) -> bytes:
        assert service == "qubes.ForwardStatus+"
        return self._answer if qube == "sys-net" else b"\x1b[2J"


def test_what_a_qube_says_is_read_with_care(forward: Command, over: Command, lab: LabDirectory) -> None:
    forward(*ADD)
    result = over(Answering(lab, listening(REPORT)), "status", "--json")
    assert result.status == 0
    assert result.json["forwards"][0]["figures"]["mux_calls_in_target"] is None
    assert "work" in result.json["silent"]
