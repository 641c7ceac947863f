# SPDX-License-Identifier: GPL-2.0-or-later
"""The command status of forwards that carry UDP over qrexec: each protocol by itself, and drops."""

from dataclasses import replace
from typing import Any

from answered import REPORT, Saying, listening, look, shown
from worlds import ADD, NOW, Command

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.snapshot import look as read_system
from qubes_fwd_qrexec.admin.views.status import Status, asked
from qubes_fwd_qrexec.common.report import CallsReport, Problem, QubeReport
from qubes_fwd_qrexec.common.values import Proto, QubeName, TargetPorts
from qubes_fwd_qrexec.lab.directory import LabDirectory

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
        "work web (udp): refused: 4 over the rate limit.",
        "work web (udp): 1 datagram from clients, 118 to clients.",
        "work web (udp): datagrams dropped: 1 that came too fast, 2 that waited too long.",
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


def test_single_calls_are_those_of_tcp_alone(forward: Command, store: Backend) -> None:
    forward(*ADD_BOTH, "--transport", "call")
    calls = CallsReport(
        source=QubeName("sys-net"), ports=TargetPorts(8080, 8080), proto=Proto.UDP, mux_calls=1
    )
    target = QubeReport(program="1", calls=(calls,))
    found = look(store, sys_net=listening(REPORT, UDP), work=target)
    assert [row.mux_calls for row in found.rows] == [None, 1]
    told = [[row[key] for key in ("service", "transport", "transport_reason")] for row in rows_of(found)]
    offers = "work has qubes-fwd-qrexec"
    assert told == [["qubes.ForwardTCP", "call", "the rule says so"], ["qubes.ForwardUDP", "mux", offers]]
    explained = forward("plan").out
    assert "  transport call over qubes.ForwardTCP: the rule says so.\n" in explained
    assert f"  transport mux over qubes.ForwardUDP: {offers}.\n" in explained


def test_the_target_is_asked_for_the_calls_of_udp(forward: Command, store: Backend) -> None:
    forward(*ADD_BOTH, "--transport", "call")
    snapshot, system = read_system(store, with_config=True), Saying(store, {})
    asked(snapshot, snapshot.plan(NOW), NOW, system, ["sys-net"])
    assert system.asked == {"sys-net", "work"}


def test_a_verdict_is_about_one_protocol(forward: Command, store: Backend, lab: LabDirectory) -> None:
    forward(*ADD_BOTH)
    (lab.policy_dir / "20-mine.policy").write_text("qubes.ForwardUDP  *  @anyvm  @anyvm  deny\n")
    found = look(store, sys_net=listening(REPORT, UDP))
    assert not found.is_well
    assert [row["is_allowed"] for row in rows_of(found)] == [True, False]
    assert "work web (udp): dom0 denies its calls: " in shown(found)
    assert "work web: dom0 denies" not in shown(found)
    for command in ("list", "show work web", "set work web comment=x"):
        assert "(udp alone)" in forward(*command.split()).out, command
    (lab.policy_dir / "20-mine.policy").write_text("qubes.ForwardTCP  *  @anyvm  @anyvm  deny\n")
    assert "(tcp alone)" in forward("list").out
    (lab.policy_dir / "20-mine.policy").write_text("nonsense\n")
    assert "alone)" not in forward("list").out


def rows_of(found: Status) -> list[dict[str, Any]]:
    return [row.as_json() for row in found.rows]
