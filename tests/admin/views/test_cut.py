# SPDX-License-Identifier: GPL-2.0-or-later
"""The command cut: whom it cuts, and what it says of who may connect again."""

from dataclasses import replace

import pytest
from answered import REPORT, listening
from answering import Answering
from fake_admin import FakeQubes
from worlds import ADD, Command

from qubes_fwd_qrexec.admin.answers import AnswerError, NotRunningError
from qubes_fwd_qrexec.admin.qubes.store import QubesStore
from qubes_fwd_qrexec.common.clientreport import CutReport
from qubes_fwd_qrexec.common.report import DrainingReport, ListenerReport, QubeReport, dump
from qubes_fwd_qrexec.common.values import Proto, QubeName, RuleName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.qube import QubeState

STATUS, TCP, UDP = "qubes.ForwardStatus+", "qubes.ForwardCut+fwd.work.web", "qubes.ForwardCut+udp.work.web"
FLAG = "service.qubes-forward-listener"
GONE = DrainingReport(target=QubeName("work"), name=RuleName("gone"), connections=2, left_s=3000)


@pytest.fixture
def backend(lab: LabDirectory, over: Command) -> Answering:
    """A lab with a forward that is open at sys-net, and of which three connections are cut there."""
    lab.set_feature("sys-net", FLAG, "1")
    found = Answering(lab, {("sys-net", STATUS): listening(REPORT), ("sys-net", TCP): CutReport(3)})
    assert over(found, *ADD).status == 0
    found.asked.clear()
    return found


def cuts(backend: Answering) -> list[tuple[str, str, str]]:
    """Whom qubes were told to cut."""
    return [(one.qube, one.service, one.given) for one in backend.asked if "ForwardCut" in one.service]


def test_all_clients_are_cut_where_the_forward_is_open(backend: Answering, over: Command) -> None:
    result = over(backend, "cut", "work", "web")
    assert (result.status, result.err) == (0, "")
    assert result.out == (
        "Cut 3 connections of work web. Whoever is let in may connect again; "
        "'qvm-forward disable work web' closes it.\n"
    )
    assert cuts(backend) == [("sys-net", TCP, "\n")]
    assert over(backend, "cut", "work", "web", "--json").json == {
        "version": 1,
        "qube": "work",
        "name": "web",
        "client": None,
        "cut": 3,
        "at": [{"qube": "sys-net", "proto": "tcp", "cut": 3, "problem": None}],
        "silent": [],
        "ways_out": [["qvm-forward", "disable", "work", "web"]],
    }


@pytest.mark.parametrize(
    ("srchosts", "client", "may"),
    [
        (
            "192.168.0.0/16",
            "192.168.0.5:1",
            "srchosts=192.168.0.0/16 lets it in, so it may connect again; "
            "'qvm-forward set work web srchosts=NETWORKS' changes that.",
        ),
        (
            "192.168.0.5,192.168.0.6",
            "192.168.0.5",
            "It may connect again; 'qvm-forward set work web srchosts-=192.168.0.5/32' keeps it out.",
        ),
        (
            "192.168.0.5",
            "192.168.0.5",
            "It may connect again; 'qvm-forward disable work web' closes it.",
        ),
        (
            "192.168.0.0/16,192.168.0.5",
            "192.168.0.5",
            "srchosts=192.168.0.0/16,192.168.0.5/32 lets it in, so it may connect again; "
            "'qvm-forward set work web srchosts=NETWORKS' changes that.",
        ),
        (
            "fd00::5,10.0.0.0/8",
            "[fd00::5]:99",
            "It may connect again; 'qvm-forward set work web srchosts-=fd00::5/128' keeps it out.",
        ),
    ],
)
def test_one_client_is_cut_and_the_command_that_keeps_it_out_is_said(
    backend: Answering, over: Command, srchosts: str, client: str, may: str
) -> None:
    over(backend, "set", "work", "web", f"srchosts={srchosts}")
    backend.asked.clear()
    result = over(backend, "cut", "work", "web", "--client", client)
    assert (result.status, result.out) == (0, f"Cut 3 connections of work web from {client}. {may}\n")
    assert cuts(backend) == [("sys-net", TCP, f"{client}\n")]
    told = over(backend, "cut", "work", "web", "--client", client, "--json").json
    assert told["client"] == client
    assert f"'{' '.join(told['ways_out'][0])}'" in may


def test_the_command_that_keeps_it_out_does(backend: Answering, over: Command) -> None:
    over(backend, "set", "work", "web", "srchosts=192.168.0.5,192.168.0.6")
    told = over(backend, "cut", "work", "web", "--client", "192.168.0.5", "--json").json
    over(backend, *told["ways_out"][0][1:])
    assert over(backend, "show", "work", "web", "--json").json["rule"]["srchosts"] == "192.168.0.6/32"


def test_tcp_and_udp_are_both_cut(backend: Answering, over: Command) -> None:
    over(backend, "set", "work", "web", "proto=both")
    backend.says["sys-net", UDP] = CutReport(1)
    assert over(backend, "cut", "work", "web").out.startswith(
        "Cut 3 connections and 1 UDP flow of work web. "
    )
    backend.says["sys-net", UDP] = CutReport(0)
    assert over(backend, "cut", "work", "web").out.startswith("Cut 3 connections of work web. ")


def test_what_drains_can_be_cut_though_its_rule_is_removed(backend: Answering, over: Command) -> None:
    over(backend, "remove", "work", "web")
    flow = replace(GONE, proto=Proto.UDP, connections=1)
    listener = ListenerReport(since=1, forwards=(), draining=(GONE, GONE, flow))
    backend.says["sys-net", STATUS] = QubeReport(program="1", listener=listener)
    backend.says |= {
        ("sys-net", f"qubes.ForwardCut+{kind}.work.gone"): CutReport(1) for kind in ("fwd", "udp")
    }
    # Where nothing else is open, its name need not be said.
    for name in (["gone"], []):
        result = over(backend, "cut", "work", *name)
        assert (result.status, result.out) == (
            0,
            "Cut 1 connection and 1 UDP flow of work gone. "
            "Its forward is closed, so nobody can connect again.\n",
        )
    assert over(backend, "cut", "work", "--json").json["ways_out"] == []


def test_where_several_are_open_their_names_are_asked_for(backend: Answering, over: Command) -> None:
    listener = ListenerReport(since=1, forwards=(REPORT,), draining=(GONE,))
    backend.says["sys-net", STATUS] = QubeReport(program="1", listener=listener)
    assert "work has several forwards open; name one of them: gone, web\n" in over(backend, "cut", "work").err
    many = tuple(replace(GONE, name=RuleName(f"a{number}")) for number in range(30))
    listener = ListenerReport(since=1, forwards=(REPORT,), draining=many)
    backend.says["sys-net", STATUS] = QubeReport(program="1", listener=listener)
    assert over(backend, "cut", "work").err.count(",") == 19
    assert cuts(backend) == []


def test_nobody_to_cut_is_said_and_fails(backend: Answering, over: Command) -> None:
    backend.says["sys-net", TCP] = CutReport(0)
    result = over(backend, "cut", "work", "web", "--client", "192.168.0.5")
    assert (result.status, result.out) == (1, "")
    assert result.err == (
        "qvm-forward: nobody is connected to work web from 192.168.0.5; "
        "'qvm-forward status work --clients' shows who is\n"
    )
    told = over(backend, "cut", "work", "web", "--json")
    assert (told.status, told.json["cut"]) == (1, 0)


def test_an_empty_address_cuts_nobody(backend: Answering, over: Command) -> None:
    """A script may have a variable that is not set."""
    result = over(backend, "cut", "work", "web", "--client", "")
    assert (result.status, result.out) == (2, "")
    assert result.err == "qvm-forward cut: --client: an address is missing; without --client, all are cut\n"
    assert cuts(backend) == []


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (AnswerError("x", 127), "sys-net is too old for that; update qubes-fwd-qrexec there and restart it"),
        (NotRunningError("sys-net is not running"), "sys-net is not running"),
        (CutReport(0, "no listener is running"), "sys-net: no listener is running"),
    ],
)
def test_who_cannot_be_told_is_said_and_fails(
    backend: Answering, over: Command, answer: AnswerError | CutReport, problem: str
) -> None:
    backend.says["sys-net", TCP] = answer
    result = over(backend, "cut", "work", "web")
    assert (result.status, result.out) == (1, "")
    assert result.err == f"qvm-forward: connections to work web may go on: {problem}\n"
    told = over(backend, "cut", "work", "web", "--json")
    assert (told.status, told.json["at"][0]["problem"]) == (1, problem)


def test_a_qube_that_does_not_say_what_it_has_is_named(backend: Answering, over: Command) -> None:
    backend.says["sys-net", STATUS] = AnswerError("x")
    result = over(backend, "cut", "work", "web")
    assert (result.status, result.out.partition(".")[0]) == (0, "Cut 3 connections of work web")
    assert result.err == "qvm-forward: no answer from sys-net, where somebody may be connected\n"
    assert over(backend, "cut", "work", "web", "--json").json["silent"] == ["sys-net"]


@pytest.mark.parametrize(
    ("words", "status", "error"),
    [
        (("wrok",), 1, "there is no qube 'wrok'"),
        (("work", "wbe"), 1, "work has no forward 'wbe', only web"),
        (("vault",), 1, "vault has no forward open; there is nothing to cut"),
        (("vault", "web"), 1, "vault has no forwards"),
        (("work", "web", "--client", "home"), 2, "--client: 'home' is not an IPv4 or IPv6 address"),
        (("work", "web", "--client", "192.168.0.0/16"), 2, "--client: '192.168.0.0/16' is not"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(
    backend: Answering, over: Command, words: tuple[str, ...], status: int, error: str
) -> None:
    result = over(backend, "cut", *words)
    assert (result.status, result.out) == (status, "")
    assert result.err.startswith(f"qvm-forward cut: {error}")
    assert cuts(backend) == []


def test_a_forward_that_is_closed_has_nobody_to_cut(backend: Answering, over: Command) -> None:
    over(backend, "disable", "work", "web")
    backend.says["sys-net", STATUS] = listening(replace(REPORT, connections=0))
    assert over(backend, "cut", "work", "web").err == (
        "qvm-forward cut: work web is disabled, and none of its connections is draining; there is "
        "nothing to cut\n"
    )
    backend.says["sys-net", STATUS] = AnswerError("x")
    assert over(backend, "cut", "work", "web").err.endswith(
        "there is nothing to cut; no answer from sys-net, where somebody may be connected\n"
    )


def test_a_qube_that_is_halted_is_not_told_to_cut(
    backend: Answering, over: Command, lab: LabDirectory
) -> None:
    sys_net = lab.qube("sys-net")
    lab.write_qube(replace(sys_net, state=QubeState.HALTED))
    assert over(backend, "cut", "work", "web").err.startswith("qvm-forward cut: work web is waiting, and ")
    assert cuts(backend) == []


def test_a_rule_that_cannot_be_read_has_nobody_to_cut(backend: Answering, over: Command) -> None:
    backend.set_feature(QubeName("work"), "forward.bad", "x")
    assert (
        "work bad is broken, and none of its connections is draining"
        in over(backend, "cut", "work", "bad").err
    )


def test_by_nft_no_connection_is_cut_alone(run: Command) -> None:
    run(*ADD)
    result = run("cut", "work", "web")
    assert (result.status, result.err) == (
        1,
        "qvm-forward cut: work web goes by nft, where single connections cannot be cut; "
        "'qvm-forward disable work web' ends all of its connections\n",
    )


def test_qubesd_is_asked_for_it_as_root(over: Command, dom0: FakeQubes) -> None:
    """The fake system of qubes refuses any other user."""
    store = QubesStore(dom0.root)
    assert over(store, *ADD).status == 0
    dom0.lab.set_feature("sys-net", FLAG, "1")
    dom0.says |= {("sys-net", STATUS): dump(listening(REPORT).as_json())}
    dom0.says |= {("sys-net", TCP): dump(CutReport(3).as_json())}
    result = over(store, "cut", "work", "--client", "192.168.0.5")
    assert result.out.startswith("Cut 3 connections of work web from 192.168.0.5. ")
    assert dom0.process is not None
    assert dom0.process.given == b"192.168.0.5\n"
