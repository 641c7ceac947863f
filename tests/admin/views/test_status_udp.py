# SPDX-License-Identifier: GPL-2.0-or-later
"""The command status of forwards that carry UDP over qrexec: each protocol by itself, and drops."""

from dataclasses import replace

from answered import REPORT, listening, look, shown
from worlds import ADD, Command

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.common.report import CallsReport, Problem, QubeReport
from qubes_fwd_qrexec.common.values import Proto, QubeName, TargetPorts

UDP = replace(
    REPORT,
    proto=Proto.UDP,
    connections=2,
    total=7,
    datagrams_sent=1,
    datagrams_received=118,
    dropped={"old": 2, "full": 0, "kernel": 1},
)
ADD_BOTH = (*ADD, "--proto", "both", "--mode", "qrexec")


def test_a_forward_of_both_has_a_row_for_each_protocol(forward: Command, store: Backend) -> None:
    forward(*ADD_BOTH)
    found = look(store, sys_net=listening(REPORT, replace(UDP, refused={"rate": 4})))
    assert found.is_well
    assert [" ".join(line.split()) for line in shown(found).splitlines()][1:] == [
        "work web active sys-net:80 allows open 3 40 0 999 1.5 KiB",
        "work web active sys-net:80 udp allows open 2 7 4 999 1.5 KiB",
        "",
        "work web (udp): refused: 4 rate.",
        "work web (udp): 1 datagram from clients, 118 to clients.",
        "work web (udp): datagrams dropped: 1 kernel, 2 old.",
    ]
    first, second = found.as_json()["forwards"]
    assert (first["proto"], second["proto"]) == ("tcp", "udp")
    assert "dropped" not in first["figures"]
    assert second["figures"]["dropped"] == {"old": 2, "full": 0, "kernel": 1}


def test_where_one_protocol_is_not_open_the_other_is_shown_as_it_is(forward: Command, store: Backend) -> None:
    forward(*ADD_BOTH)
    found = look(store, sys_net=listening(REPORT, problems=(Problem("udp.work.web", "it is in use"),)))
    assert not found.is_well
    assert [row.state for row in found.rows] == ["active", "waiting"]
    helps = "; 'qvm-forward diagnose work web' says what helps"
    assert f"work web is waiting: sys-net does not have its UDP open: it is in use{helps}.\n" in shown(found)


def test_what_is_true_of_both_is_said_once(forward: Command, store: Backend) -> None:
    forward(*ADD_BOTH)
    said = shown(look(store, sys_net=QubeReport(program="1", listener_problem="it crashed")))
    assert said.count("work web is waiting: sys-net does not listen: it crashed") == 1


def test_the_calls_of_udp_are_counted_apart(forward: Command, store: Backend) -> None:
    forward(*ADD_BOTH)
    calls = CallsReport(source=QubeName("sys-net"), ports=TargetPorts(8080, 8080), mux_calls=2)
    target = QubeReport(program="1", calls=(calls, replace(calls, mux_calls=1, proto=Proto.UDP)))
    found = look(store, sys_net=listening(REPORT, UDP), work=target)
    assert [row.mux_calls for row in found.rows] == [2, 1]
