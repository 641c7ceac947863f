# SPDX-License-Identifier: GPL-2.0-or-later
"""What drains, in `list`: rows of its own, of closed and of removed rules, from the qubes that listen."""

from dataclasses import replace

import pytest
from answered import REPORT, listening
from answering import LACKS, Answering
from faulty import Faulty
from worlds import ADD, Command

from qubes_fwd_qrexec.admin.answers import AnswerError, NotRunningError
from qubes_fwd_qrexec.common.report import DrainingReport, ListenerReport, QubeReport
from qubes_fwd_qrexec.common.values import Proto, QubeName, RuleName
from qubes_fwd_qrexec.lab.directory import LabDirectory

SYS_NET, FLAG = QubeName("sys-net"), "service.qubes-forward-listener"
WEB = DrainingReport(target=QubeName("work"), name=RuleName("web"), connections=2, left_s=3000)
GONE = replace(WEB, name=RuleName("gone"), connections=1, left_s=59, proto=Proto.UDP)


def asked(lab: LabDirectory, answer: QubeReport | AnswerError) -> Answering:
    """A lab whose sys-net says this of its listener, and of its firewall."""
    firewall = answer if isinstance(answer, AnswerError) else LACKS
    return Answering(
        lab, {("sys-net", "qubes.ForwardStatus+"): answer, ("sys-net", "qubes.ForwardNft"): firewall}
    )


@pytest.fixture
def disabled(over: Command, lab: LabDirectory) -> LabDirectory:
    """A lab with one rule, which is disabled; sys-net listens."""
    over(Faulty(lab), *ADD, "--disabled")
    lab.set_feature(SYS_NET, FLAG, "1")
    return lab


def draining(*some: DrainingReport) -> QubeReport:
    return QubeReport(program="1", listener=ListenerReport(since=1, forwards=(), draining=some))


def test_what_drains_has_rows_with_its_number_and_its_time(disabled: LabDirectory, over: Command) -> None:
    backend = asked(disabled, draining(WEB, GONE))
    listed = over(backend, "list")
    assert listed.status == 0
    assert listed.out.splitlines()[2:] == [
        "",
        "QUBE  NAME  STATE     AT       OPEN NOW       CUT",
        "work  web   draining  sys-net  2 connections  in 50 min",
        "work  gone  draining  sys-net  1 UDP flow     in 59 s",
    ]
    assert backend.asked == [("sys-net", "qubes.ForwardStatus+", 2.0, "")]
    told = over(backend, "list", "--json").json
    assert [(each["name"], each["connections"], each["left_s"]) for each in told["draining"]] == [
        ("web", 2, 3000),
        ("gone", 1, 59),
    ]
    assert told["silent"] == []


def test_a_forward_that_should_have_been_cut_does_not_drain(disabled: LabDirectory, over: Command) -> None:
    backend = asked(disabled, listening(REPORT))
    assert "draining" not in over(backend, "list").out
    assert over(backend, "list", "--json").json["draining"] == []


def test_a_qube_that_names_a_thousand_fills_no_screen(disabled: LabDirectory, over: Command) -> None:
    many = [replace(WEB, name=RuleName(f"a{number}")) for number in range(1000)]
    backend = asked(disabled, draining(*many))
    listed = over(backend, "list").out.splitlines()
    assert len(listed) == 2 + 2 + 50 + 1
    assert listed[-1] == "And 950 more; --json shows them."
    assert len(over(backend, "list", "--json").json["draining"]) == 1000


@pytest.mark.parametrize(
    ("answer", "is_silent"),
    [(AnswerError("x"), True), (NotRunningError("x"), False), (AnswerError("x", 127), False)],
)
def test_a_qube_that_does_not_say_is_named_on_one_line(
    disabled: LabDirectory, over: Command, answer: AnswerError, is_silent: bool
) -> None:
    backend = asked(disabled, answer)
    # By nft it may have some, too, and is named once.
    backend.set_feature(SYS_NET, "service.qubes-forward-nft", "1")
    listed = over(backend, "list").out.splitlines()
    assert listed[2:] == ["What is draining at sys-net is unknown: no answer."] * is_silent
    assert {question.service for question in backend.asked} == {"qubes.ForwardStatus+", "qubes.ForwardNft"}
    assert over(backend, "list", "--json").json["silent"] == ["sys-net"] * is_silent


def test_who_has_nothing_to_do_with_the_named_qubes_is_not_asked(
    disabled: LabDirectory, over: Command
) -> None:
    backend = asked(disabled, draining(WEB))
    assert "draining" not in over(backend, "list", "vault").out
    assert backend.asked == []
    assert "draining" in over(backend, "list", "work").out
    assert "draining" in over(backend, "list", "sys-net").out


def test_the_exposed_qube_of_a_rule_is_asked_also_without_its_service(
    disabled: LabDirectory, over: Command
) -> None:
    disabled.remove_feature(SYS_NET, FLAG)
    assert "draining" in over(asked(disabled, draining(WEB)), "list").out


def test_where_no_qube_listens_nothing_is_asked(lab: LabDirectory, over: Command) -> None:
    backend = asked(lab, draining(WEB))
    assert "draining" not in over(backend, "list").out
    assert backend.asked == []
