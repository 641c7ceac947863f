# SPDX-License-Identifier: GPL-2.0-or-later
"""Nothing is called closed while something flows: what remove, disable and panic say, and their status."""

import json
from dataclasses import replace

import pytest
from answered import REPORT
from faulty import Faulty
from worlds import ADD, Command

from qubes_fwd_qrexec.admin.inventory import LISTENER_FEATURE
from qubes_fwd_qrexec.common.report import DrainingReport, ForwardReport, ListenerReport, QubeReport
from qubes_fwd_qrexec.common.rules import Transport
from qubes_fwd_qrexec.common.services import REVOKE_SERVICE
from qubes_fwd_qrexec.common.values import QubeName, RuleName
from qubes_fwd_qrexec.lab.directory import LabDirectory

PERSONAL, NAME = QubeName("personal"), RuleName("ssh")
NOTHING = json.dumps(QubeReport(program="1").as_json()).encode()


def report(connections: int | None = None, draining: int | None = None) -> bytes:
    forwards = [] if connections is None else [forward(connections)]
    drains = (
        []
        if draining is None
        else [DrainingReport(target=PERSONAL, name=NAME, connections=draining, left_s=3000)]
    )
    listener = ListenerReport(since=0, forwards=tuple(forwards), draining=tuple(drains))
    return json.dumps(QubeReport(program="x", listener=listener).as_json()).encode()


def forward(connections: int) -> ForwardReport:
    return replace(REPORT, target=PERSONAL, name=NAME, connections=connections, transport=Transport.CALL)


class Flowing(Faulty):
    """A system whose targets let ``draining`` calls go on, and whose listener says ``listener``."""

    def __init__(self, lab: LabDirectory, draining: int = 0, listener: bytes = b"") -> None:
        super().__init__(lab)
        self._draining = draining
        self._listener = listener

    def ask(
        self, qube: QubeName, service: str, max_bytes: int, timeout_s: float | None = None, given: str = ""
    ) -> bytes:
        if service != REVOKE_SERVICE:
            return self._listener if qube == "sys-net" else NOTHING
        drains = self._draining if qube == "work" else 0
        return f"version=1 ended=0 draining={drains}\n".encode()


@pytest.mark.parametrize(("command", "done"), [("remove", "removed"), ("disable", "disabled")])
def test_calls_that_drain_are_said_and_no_failure(
    forward: Command, over: Command, lab: LabDirectory, command: str, done: str
) -> None:
    forward(*ADD, "--on-expire", "drain")
    result = over(Flowing(lab, draining=1, listener=report()), command, "work", "web")
    assert result.status == 0
    assert f"work web is {done} and accepts no new connections; open ones may go on." in result.out
    assert "\nwork: 1 call may go on for a while.\n" in result.out


@pytest.mark.parametrize("command", ["remove", "disable"])
def test_connections_that_dom0_cannot_end_are_a_failure(
    forward: Command, over: Command, lab: LabDirectory, command: str
) -> None:
    forward("add", "personal", "22", "--from", "any", "--name", "ssh")
    result = over(Flowing(lab, listener=report(connections=3)), command, "personal", "ssh")
    assert result.status == 1
    assert "and closed" not in result.out
    assert (
        "still open: personal ssh: 3 connections over qubes.ConnectTCP, which dom0 cannot end" in result.err
    )


@pytest.mark.parametrize(("command", "done"), [("remove", "removed"), ("disable", "disabled already")])
def test_what_was_closed_before_and_still_drains_is_not_called_closed(
    forward: Command, over: Command, lab: LabDirectory, command: str, done: str
) -> None:
    forward("add", "personal", "22", "--from", "any", "--name", "ssh", "--on-expire", "drain")
    forward("disable", "personal", "ssh")
    result = over(Flowing(lab, listener=report(draining=2)), command, "personal", "ssh")
    assert result.status == 0
    assert f"personal ssh is {done} and accepts no new connections; open ones may go on." in result.out
    assert "still open: personal ssh: 2 connections at sys-net may go on for at most 50 min; " in result.err


def test_what_drains_over_a_call_that_another_forward_needs_is_not_called_closed(
    forward: Command, over: Command, lab: LabDirectory
) -> None:
    # The target goes on with the call and ends nothing of it.
    for name, port in (("ssh", "22"), ("other", "23:22")):
        forward("add", "work", port, "--from", "any", "--name", name, "--on-expire", "drain")
    said = report(draining=1).replace(b'"personal"', b'"work"')
    result = over(Flowing(lab, listener=said), "disable", "work", "ssh")
    assert "work ssh is disabled and accepts no new connections; open ones may go on." in result.out
    assert "still open: work ssh: 1 connection at sys-net may go on for at most 50 min; " in result.err


def test_what_drains_after_a_mark_is_not_called_closed(
    forward: Command, over: Command, lab: LabDirectory
) -> None:
    forward(*ADD, "--on-expire", "drain")
    result = over(Flowing(lab, draining=1, listener=report()), "tunnel", "mark", "sys-firewall")
    assert result.status == 0
    assert "\nClosed to new connections at sys-net: work web. work is behind a tunnel" in result.out


def test_what_a_mark_could_not_end_is_not_called_closed(
    forward: Command, over: Command, lab: LabDirectory
) -> None:
    forward("add", "personal", "22", "--from", "any", "--name", "ssh")
    result = over(Flowing(lab, listener=report(connections=3)), "tunnel", "mark", "sys-firewall")
    assert result.status == 1
    assert "\nClosed to new connections at sys-net: personal ssh. " in result.out
    assert "still open: personal ssh: 3 connections over qubes.ConnectTCP" in result.err


def test_panic_says_how_many_they_are(forward: Command, over: Command, lab: LabDirectory) -> None:
    forward("add", "personal", "22", "--from", "any", "--name", "ssh")
    result = over(Flowing(lab, listener=report(connections=3)), "panic")
    assert result.status == 1
    assert result.out.startswith("NOT EVERYTHING IS CLOSED.\n")
    assert "still open: personal ssh: 3 connections over qubes.ConnectTCP" in result.err
    assert "'qvm-shutdown personal' ends these connections at once\n" in result.err
    forward("resume")
    result = over(Flowing(lab, listener=report()), "panic")
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith("Everything is closed and held")


@pytest.mark.parametrize("flag", ["1", ""])
def test_panic_says_what_drains_of_rules_that_are_gone(over: Command, lab: LabDirectory, flag: str) -> None:
    # A listener goes on without its flag until its qube is started again.
    lab.set_feature("sys-net", LISTENER_FEATURE, flag)
    result = over(Flowing(lab, listener=report(draining=2)), "panic")
    assert result.status == 1
    assert "still open: personal ssh: 2 connections at sys-net may go on for at most 50 min; " in result.err
