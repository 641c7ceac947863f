# SPDX-License-Identifier: GPL-2.0-or-later
"""Cutting clients: what exposed qubes are told, and what is made of their answers."""

from ipaddress import ip_address

import pytest
from answering import LACKS, Answering

from qubes_fwd_qrexec.admin.answers import AnswerError
from qubes_fwd_qrexec.admin.views.cut import Cut, cut_all
from qubes_fwd_qrexec.common.clientreport import CutReport, WhichClients
from qubes_fwd_qrexec.common.config import ForwardKey
from qubes_fwd_qrexec.common.values import Proto, QubeName, RuleName
from qubes_fwd_qrexec.lab.directory import LabDirectory

SYS_NET, SYS_VPN = QubeName("sys-net"), QubeName("sys-vpn")
WEB = ForwardKey(QubeName("work"), RuleName("web"), Proto.TCP)
TCP, UDP = "qubes.ForwardCut+fwd.work.web", "qubes.ForwardCut+udp.work.web"
ALL = WhichClients()


def test_each_place_is_told_on_its_line_whom_to_cut(lab: LabDirectory) -> None:
    places = [(SYS_NET, WEB), (SYS_NET, WEB._replace(proto=Proto.UDP)), (SYS_VPN, WEB)]
    backend = Answering(
        lab,
        {
            ("sys-net", TCP): CutReport(2),
            ("sys-net", UDP): CutReport(0, "it is stuck"),
            ("sys-vpn", TCP): CutReport(1),
        },
    )
    which = WhichClients(ip_address("fe80::1%eth0"), 5000)
    assert cut_all(places, which, backend) == (
        Cut(SYS_NET, WEB, 2),
        Cut(SYS_NET, WEB._replace(proto=Proto.UDP), 0, "sys-net: it is stuck"),
        Cut(SYS_VPN, WEB, 1),
    )
    assert {question.given for question in backend.asked} == {"[fe80::1%eth0]:5000\n"}
    cut_all(places[:1], ALL, backend)
    # An empty line stands for all. No line would be a call that died.
    assert backend.asked[-1] == ("sys-net", TCP, 5.0, "\n")


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (LACKS, "sys-net is too old for that; update qubes-fwd-qrexec there and restart it"),
        (AnswerError("it is halted"), "it is halted"),
        (b"{}", "the answer of sys-net cannot be read: the answer to a cut: version is missing"),
        (
            b'{"version":1,"cut":-1,"problem":null}',
            "the answer of sys-net cannot be read: the answer to a cut: cut",
        ),
    ],
)
def test_an_answer_that_is_none_cuts_nobody_and_says_why(
    lab: LabDirectory, answer: AnswerError | bytes, problem: str
) -> None:
    (found,) = cut_all([(SYS_NET, WEB)], ALL, Answering(lab, {("sys-net", TCP): answer}))
    assert found.ended == 0
    assert (found.problem or "").startswith(problem)
