# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is connected, in `status --clients`."""

import time
from dataclasses import replace
from ipaddress import ip_address

import pytest
from answered import REPORT, listening
from answering import Answering
from worlds import ADD, NOW, Command

from qubes_fwd_qrexec.admin.answers import AnswerError, NotRunningError
from qubes_fwd_qrexec.admin.states import Plan
from qubes_fwd_qrexec.admin.views.connected import connected
from qubes_fwd_qrexec.admin.views.tables import Style
from qubes_fwd_qrexec.common.clientreport import ClientReport
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.report import QubeReport
from qubes_fwd_qrexec.common.values import Proto, QubeName, RuleName
from qubes_fwd_qrexec.lab.directory import LabDirectory

PLAIN, ASKED = ("sys-net", "qubes.ForwardStatus+"), ("sys-net", "qubes.ForwardStatus+clients")
ONE = ClientReport(
    target=QubeName("work"),
    name=RuleName("web"),
    proto=Proto.TCP,
    address=ip_address("192.168.0.5"),
    port=50000,
    since=NOW - 60,
    sent=999,
    received=1536,
    idle_s=3,
)
OLD = replace(ONE, name=RuleName("gone"), address=ip_address("fe80::1%eth0"), is_draining=True, idle_s=7200)
FLOW = replace(ONE, proto=Proto.UDP, port=53)
OTHER = replace(ONE, target=QubeName("personal"))


def naming(*clients: ClientReport, left_out: int = 0) -> QubeReport:
    report = listening(REPORT)
    assert report.listener is not None
    listener = replace(report.listener, clients=clients, clients_left_out=left_out)
    return replace(report, listener=listener)


@pytest.fixture
def backend(lab: LabDirectory, over: Command) -> Answering:
    """A lab with a forward that is open at sys-net."""
    found = Answering(lab, {PLAIN: listening(REPORT)})
    assert over(found, *ADD).status == 0
    found.asked.clear()
    return found


def test_each_client_has_a_row_with_its_figures(backend: Answering, over: Command) -> None:
    backend.says[ASKED] = naming(FLOW, OLD, ONE)
    result = over(backend, "status", "--clients")
    assert result.status == 0
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(NOW - 60))
    _, shown, *rest = result.out.split("\n\n")
    assert [" ".join(line.split()) for line in shown.splitlines()] == [
        "QUBE NAME STATE AT CLIENT SINCE IDLE FROM CLIENT TO CLIENT",
        f"work gone draining sys-net [fe80::1%eth0]:50000 {since} 2 h 999 1.5 KiB",
        f"work web open sys-net 192.168.0.5:50000 {since} 3 s 999 1.5 KiB",
        f"work web open sys-net udp 192.168.0.5:53 {since} 3 s 999 1.5 KiB",
    ]
    assert "connected" not in "".join(rest)
    told = over(backend, "status", "--clients", "--json").json
    assert told["clients"] == [{"exposed": "sys-net", **one.as_json()} for one in (OLD, ONE, FLOW)]
    assert (told["clients_left_out"], told["clients_unknown"]) == ({}, [])


def test_nobody_is_asked_for_addresses_without_the_option(backend: Answering, over: Command) -> None:
    assert "CLIENT " not in over(backend, "status").out
    assert not {"clients", "clients_left_out"} & over(backend, "status", "--json").json.keys()
    assert ASKED not in [one[:2] for one in backend.asked]


def test_that_nobody_is_connected_is_said(backend: Answering, over: Command) -> None:
    backend.says[ASKED] = naming()
    assert "No listener reports a client.\n" in over(backend, "status", "--clients").out


def test_a_hundred_clients_take_twenty_rows_and_the_others_are_counted(
    backend: Answering, over: Command
) -> None:
    many = [replace(ONE, port=port) for port in range(1, 101)]
    backend.says[ASKED] = naming(*many, OLD, *(replace(FLOW, port=port) for port in range(1, 22)), left_out=7)
    result = over(backend, "status", "--clients").out
    # The listener tells first which moved last.
    assert "192.168.0.5:20 " in result
    assert "192.168.0.5:21 " not in result
    assert result.count("192.168.0.5:") == 40
    assert "work web: 80 more clients at sys-net; --json shows them.\n" in result
    assert "work web (udp): 1 more client at sys-net; --json shows them.\n" in result
    assert "sys-net has 7 more clients than it lists: the idlest are left out.\n" in result
    told = over(backend, "status", "--clients", "--json").json
    assert len(told["clients"]) == 122
    assert told["clients_left_out"] == {"sys-net": 7}


def test_those_of_other_forwards_are_not_shown_where_qubes_are_named(
    backend: Answering, over: Command
) -> None:
    backend.says[ASKED] = naming(ONE, OLD, OTHER)
    for qubes, targets in [
        (("work",), {"work"}),
        (("personal", "work"), {"work", "personal"}),
        (("sys-net",), {"work", "personal"}),
        # A rule of work passes through it.
        (("sys-firewall",), {"work"}),
    ]:
        told = over(backend, "status", "--clients", "--json", *qubes).json
        assert {client["target"] for client in told["clients"]} == targets


@pytest.mark.parametrize("is_known", [False, True])
def test_a_qube_that_is_too_old_to_tell_is_named_and_its_figures_are_shown(
    backend: Answering, over: Command, is_known: bool
) -> None:
    """Its service may not know the question, or its listener may have been started before the update."""
    backend.says[ASKED] = listening(REPORT) if is_known else AnswerError("x", ExitStatus.BAD_ARGUMENT)
    result = over(backend, "status", "--clients").out
    assert "work  web   active  sys-net:80  allows  open  3 " in result
    assert (
        "Who is connected at sys-net is unknown: it is too old for that; update qubes-fwd-qrexec there and "
        "restart it.\n"
    ) in result
    assert "names a client" not in result
    assert over(backend, "status", "--clients", "--json").json["clients_unknown"] == ["sys-net"]


def test_a_qube_that_does_not_answer_is_named_and_a_halted_one_is_not(
    backend: Answering, over: Command
) -> None:
    backend.says[ASKED] = AnswerError("x")
    result = over(backend, "status", "--clients").out
    assert "Who is connected at sys-net is unknown: no answer.\n" in result
    assert "names a client" not in result
    backend.says[ASKED] = QubeReport(program="1", listener_problem="the listener does not answer: timed out")
    assert "Who is connected at sys-net is unknown: no answer.\n" in over(backend, "status", "--clients").out
    for nobody in (NotRunningError("x"), QubeReport(program="1")):
        backend.says[ASKED] = nobody
        assert "No listener reports a client.\n" in over(backend, "status", "--clients").out


def test_that_nobody_tells_who_comes_by_nft_is_said(run: Command) -> None:
    run(*ADD)
    assert "Who is connected by nft is unknown: no qube reports it.\n" in run("status", "--clients").out
    assert "Who is" not in run("status").out


def test_a_narrow_terminal_keeps_who_and_for_how_long() -> None:
    answers = {QubeName("sys-net"): naming(replace(ONE, since=2**63 - 1))}
    found = connected(Plan(()), (), answers)
    assert "an unknown time" in found.table(Style(200))
    assert found.table(Style(60)) == (
        "QUBE  NAME  STATE  CLIENT             IDLE  TO CLIENT\n"
        "work  web   open   192.168.0.5:50000  3 s   1.5 KiB\n"
    )
