# SPDX-License-Identifier: GPL-2.0-or-later
"""The command status: what is open, what is not known, and what is not in force yet."""

import io
import json
import time
from argparse import Namespace
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest
from worlds import ADD, NOW, Command

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.figures import Figures, Unknown
from qubes_fwd_qrexec.admin.session import Session
from qubes_fwd_qrexec.admin.states import Forward
from qubes_fwd_qrexec.admin.views.status import WATCH_S, _watch, size, status
from qubes_fwd_qrexec.admin.views.tables import Style
from qubes_fwd_qrexec.common.report import DrainingReport, ForwardReport, ListenerReport, QubeReport, Way
from qubes_fwd_qrexec.common.rules import Transport
from qubes_fwd_qrexec.common.values import QubeName, RuleName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.qube import QubeState


def test_figures_are_unknown_and_the_reason_is_said_once(forward: Command, kind: str) -> None:
    forward(*ADD)
    forward("add", "personal", "81", "--from", "any")
    result = forward("status")
    rows = [line.split() for line in result.out.splitlines()[1:3]]
    unknown = ["unknown"] * 6
    # A qube that lacks the package opens nothing; one that cannot be asked may have it open.
    state = "active" if kind == "lab" else "waiting"
    assert rows == [
        ["personal", "tcp-81", state, "sys-net:81", "allows", *unknown],
        ["work", "web", state, "sys-net:80", "allows", *unknown],
    ]
    lacking = "sys-net does not have qubes-fwd-qrexec, without which it does not listen"
    down = "qubes.ForwardStatus+ in sys-net: the lab is down; 'qvm-forward-lab up' starts it"
    assert result.out.splitlines()[3:] == (
        [f"Figures are unknown: {down}."]
        if kind == "lab"
        else [f"personal tcp-81: waiting: {lacking}.", f"work web: waiting: {lacking}."]
    )
    assert result.status == (0 if kind == "lab" else 1)
    narrow = forward("status", "work", style=Style(40)).out
    assert narrow.startswith(
        f"work web: {state}\n  exposed at sys-net:80\n  policy allows\n  way unknown\n  open now unknown\n"
    )


def test_nothing_open_is_said_with_what_is_closed(forward: Command) -> None:
    forward(*ADD, "--disabled")
    forward("apply")
    result = forward("status")
    assert (result.status, result.out) == (
        0,
        "Nothing is open.\nNot open: 1 disabled; 'qvm-forward list' says why.\n",
    )


def test_a_rule_that_cannot_be_read_is_not_open_and_said(forward: Command, lab: LabDirectory) -> None:
    forward(*ADD, "--disabled")
    lab.set_feature("work", "forward.bad", "action=drop")
    assert "Not open: 1 disabled, 1 broken; 'qvm-forward list' says why.\n" in forward("status").out
    assert "Not open" not in forward("status", "vault").out


def test_what_is_not_in_force_yet_is_counted_and_fails(forward: Command) -> None:
    forward("apply")
    forward(*ADD, "--no-apply")
    result = forward("status")
    assert result.status == 1
    assert "  sys-net:80  denies  " in result.out
    assert "work web: dom0 denies its calls: " in result.out
    assert "Not in force yet: 2 changes; 'qvm-forward apply' makes them.\n" in result.out
    data = forward("status", "vault", "--json")
    assert (data.status, data.json["forwards"]) == (1, [])
    assert [step["step"] for step in data.json["due"]] == ["open-policy", "set-config"]


def test_what_is_in_force_and_not_asked_for_is_said_first_with_what_ends_it(
    forward: Command, lab: LabDirectory
) -> None:
    forward(*ADD)
    forward("disable", "work", "web", "--no-apply")
    result = forward("status")
    assert result.status == 1
    first, second, *_ = result.out.splitlines()
    assert first.startswith("No rule asks for it: dom0's policy allows 'qubes.ForwardTCP +8080+mux sys-net")
    assert second == (
        "No rule asks for it: sys-net is told to listen for work web; 'qvm-forward apply' ends that."
    )
    assert "Nothing is open" not in result.out
    assert [entry["qube"] for entry in forward("status", "--json").json["leftovers"]] == [None, "sys-net"]
    assert first.join(("\x1b[31m", "\x1b[0m")) in forward("status", style=Style(has_colour=True)).out
    forward("apply")
    assert forward("status").out.startswith("Nothing is open.\n")
    # A rule whose qube is gone: nothing is left that would name it.
    lab.set_feature("sys-net", "vm-config.fwd.gone.web", "version=1")
    assert "sys-net is told to listen for gone web" in forward("status").out


def test_what_drains_is_shown_and_who_does_not_say_is_named(
    forward: Command, store: Backend, kind: str
) -> None:
    forward(*ADD)
    forward("disable", "work", "web")
    if kind != "lab":
        # In the lab it has our package, and may run without its flag until its qube is started again.
        store.set_feature(QubeName("sys-net"), "service.qubes-forward-listener", "1")
    drain = DrainingReport(target=QubeName("work"), name=RuleName("web"), connections=2, left_s=3000)
    last = replace(drain, connections=1, left_s=59)
    listener = ListenerReport(since=1, forwards=(), draining=(drain, last))
    report = QubeReport(program="1", listener=listener)
    shown = _with(store, Unknown("x"), report=report)[1]
    assert shown.splitlines()[:3] == [
        "work web is closed and draining: 2 connections at sys-net, cut in 50 min at the latest.",
        "work web is closed and draining: 1 connection at sys-net, cut in 59 s at the latest.",
        "No forward is open.",
    ]
    data = json.loads(_with(store, Unknown("x"), report=report, is_json=True)[1])
    assert [entry["connections"] for entry in data["draining"]] == [2, 1]
    shown = _with(store, Unknown("x"), report=None)[1]
    assert "No forward is open.\n" in shown
    assert "Whether anything drains is not known of sys-net, which does not answer.\n" in shown
    assert _with(store, Unknown("x"))[1].startswith("Nothing is open.\n")


def test_connections_of_a_closed_forward_that_its_listener_has_not_ended_are_said(
    forward: Command, store: Backend
) -> None:
    forward(*ADD)
    live = QubeReport(program="1", listener=ListenerReport(since=1, forwards=(REPORT,)))
    assert "to be closed" not in _with(store, Figures(REPORT), report=live)[1]
    forward("disable", "work", "web")
    store.set_feature(QubeName("sys-net"), "service.qubes-forward-listener", "1")
    code, shown = _with(store, Unknown("x"), report=live)
    assert code == 1
    assert shown.startswith(
        "work web is to be closed, and sys-net still has 3 connections of it.\nNo forward is open.\n"
    )


def test_another_policy_file_that_denies_or_cannot_be_read_is_named(
    forward: Command, lab: LabDirectory
) -> None:
    forward(*ADD)
    assert "denies" not in forward("list").out
    before = lab.policy_dir / "20-mine.policy"
    before.write_text("qubes.ForwardTCP  *  @anyvm  @anyvm  deny\n")
    for name in ("status", "list", "show"):
        words = ("show", "work", "web") if name == "show" else (name,)
        assert "20-mine.policy:1" in forward(*words).out, name
    assert forward("status").status == 1
    assert forward("status", "--json").json["forwards"][0]["is_allowed"] is False
    assert forward("list", "--json").json["forwards"][0]["is_allowed"] is False
    note = "Note: dom0 denies its calls: "
    for words in (("set", "work", "web", "comment=x"), ("add", "work", "81", "--from", "any")):
        assert note in (out := forward(*words).out), words
        assert "20-mine.policy:1" in out, words
    line = "work in action=forward srcports=82 srchosts=any"
    assert "work in: note: dom0 denies its calls: " in forward("import", stdin=line).out
    forward("panic")
    assert "Note: work web: dom0 denies its calls: " in forward("resume").out
    before.write_text("nonsense\n")
    assert "20-mine.policy" in forward("status").out
    assert "20-mine.policy" in forward("list").out


def test_a_halted_listener_is_not_asked(forward: Command, lab: LabDirectory) -> None:
    forward(*ADD)
    lab.set_state("sys-net", QubeState.HALTED)
    assert "Figures are unknown: sys-net is halted.\n" in forward("status").out
    assert forward("status", "--json").json["forwards"] == [
        {
            "qube": "work",
            "name": "web",
            "state": "waiting",
            "reason": "sys-net is halted and will listen when it starts: 'qvm-start sys-net'.",
            "exposed": "sys-net",
            "ports": "80",
            "is_allowed": True,
            "policy": "dom0 allows the call",
            "figures": {"is_known": False, "reason": "sys-net is halted"},
        }
    ]


NOTHING = QubeReport(program="1", listener=ListenerReport(since=1, forwards=()))


class Asked:
    """A source that knows one forward, and refuses to be asked about others."""

    def __init__(self, answer: Figures | Unknown, report: QubeReport | None) -> None:
        self._answer = answer
        self._report = report

    def figures(self, forward: Forward) -> Figures | Unknown:
        assert str(forward.source) == "work web"
        return self._answer

    def answer(self, qube: QubeName) -> QubeReport | None:
        return self._report if qube == "sys-net" else QubeReport(program="1")

    def prepare(self, qubes: Collection[QubeName]) -> None:
        assert "sys-net" in qubes


def _with(
    store: Backend, answer: Figures | Unknown, *, is_json: bool = False, report: QubeReport | None = NOTHING
) -> tuple[int, str]:
    out = io.StringIO()
    session = Session(store, NOW, {}, io.StringIO(), out, io.StringIO(), Style(), is_json)
    return status(Namespace(qube=[], watch=False), session, Asked(answer, report)), out.getvalue()


REPORT = ForwardReport(
    target=QubeName("work"),
    name=RuleName("web"),
    since=1,
    connections=3,
    total=40,
    refused={},
    sent=999,
    received=1536,
    transport=Transport.MUX,
    way=Way.OPEN,
    mux_calls=1,
    is_listening=True,
)


def test_figures_are_shown_where_a_source_has_them(forward: Command, store: Backend) -> None:
    forward(*ADD)
    code, shown = _with(store, Figures(REPORT))
    assert (code, len(shown.splitlines())) == (0, 2)
    row = " ".join(shown.splitlines()[1].split())
    assert row == "work web active sys-net:80 allows open 3 40 0 999 1.5 KiB"


def test_refusals_and_the_last_error_are_said(forward: Command, store: Backend) -> None:
    forward(*ADD)
    refused = {"source": 2, "policy": 3}
    report = replace(REPORT, refused=refused, last_error="no tunnel", last_error_at=0, way=Way.REFUSED)
    code, shown = _with(store, Figures(report))
    assert code == 0
    assert "allows refused 3 40 5 999" in " ".join(shown.split())
    assert "work web: refused: 3 policy, 2 source.\n" in shown
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(0))
    assert f"work web: last error at {at}: no tunnel.\n" in shown
    report = replace(REPORT, last_error="x", last_error_at=2**63 - 1)
    assert "last error at an unknown time: x" in _with(store, Figures(report))[1]


def test_bugs_of_the_programs_in_the_qubes_are_said(forward: Command, store: Backend) -> None:
    forward(*ADD)
    code, shown = _with(store, Figures(REPORT, None, 1, 1, 20))
    assert code == 0  # each has ended no more than what it happened to
    assert shown.endswith(
        "sys-net: its listener has met a bug of its own; the journal there says more.\n"
        "work: its service has met 20 bugs of its own; the journal there says more.\n"
    )


def test_what_a_listener_complains_of_is_shown_and_fails(forward: Command, store: Backend) -> None:
    forward(*ADD)
    trouble = Figures(REPORT, "another program has port 80 of sys-net", 1)
    assert _with(store, trouble)[0] == 1
    assert "work web: waiting: another program has port 80 of sys-net.\n" in _with(store, trouble)[1]
    assert "work web waiting sys-net:80 allows open" in " ".join(_with(store, trouble)[1].split())
    data: Any = json.loads(_with(store, trouble, is_json=True)[1])
    assert (data["forwards"][0]["state"], data["forwards"][0]["reason"]) == (
        "waiting",
        "another program has port 80 of sys-net",
    )
    assert data["forwards"][0]["figures"] == {
        "is_known": True,
        **REPORT.as_json(),
        "problem": "another program has port 80 of sys-net",
        "mux_calls_in_target": 1,
        "bugs": 0,
        "bugs_in_target": 0,
    }


def test_a_forward_that_its_listener_does_not_have_open_is_waiting(forward: Command, store: Backend) -> None:
    forward(*ADD)
    reason = "sys-net does not have work web open: the port is in use"
    code, shown = _with(store, Unknown(reason, is_trouble=True))
    assert (code, len(shown.splitlines())) == (1, 3)
    assert "work web waiting sys-net:80 allows unknown" in " ".join(shown.split())
    assert shown.endswith(f"\nwork web: waiting: {reason}.\n")
    data: Any = json.loads(_with(store, Unknown(reason, is_trouble=True), is_json=True)[1])
    assert (data["forwards"][0]["state"], data["forwards"][0]["reason"]) == ("waiting", reason)


def test_a_listener_that_gives_no_reason_is_waited_for_too(forward: Command, store: Backend) -> None:
    forward(*ADD)
    code, shown = _with(store, Figures(REPORT, ""))
    assert (code, shown.splitlines()[-1]) == (1, "work web: waiting: .")
    assert "work web waiting" in " ".join(shown.split())
    data: Any = json.loads(_with(store, Figures(REPORT, ""), is_json=True)[1])
    assert (data["forwards"][0]["state"], data["forwards"][0]["reason"]) == ("waiting", "")


def test_a_qube_that_says_nothing_makes_nothing_wait(forward: Command, store: Backend) -> None:
    forward(*ADD)
    code, shown = _with(store, Unknown("no answer"))
    assert code == 0
    assert "work web active" in " ".join(shown.split())
    assert shown.endswith("\nFigures are unknown: no answer.\n")
    data: Any = json.loads(_with(store, Unknown("no answer"), is_json=True)[1])
    assert data["forwards"][0]["reason"].startswith("Connections to port 80 of sys-net (outer side) from ")


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


def test_a_watch_looks_again_until_the_end_is_asked_for(forward: Command, store: Backend, kind: str) -> None:
    forward(*ADD)
    waits: list[float] = []

    def is_over(timeout_s: float) -> bool:
        waits.append(timeout_s)
        return len(waits) == 2

    for is_json, style in ((False, Style()), (False, Style(200)), (True, Style())):
        waits.clear()
        out = io.StringIO()
        session = Session(store, NOW, {}, io.StringIO(), out, io.StringIO(), style, is_json)
        assert _watch(Namespace(qube=[]), session, is_over) == (kind == "qubes")  # a qube without the package
        assert waits == [WATCH_S, WATCH_S]
        if is_json:
            first, second = map(json.loads, out.getvalue().splitlines())
            assert (
                first.keys()
                == second.keys()
                == {"leftovers", "draining", "silent", "forwards", "due", "time"}
            )
        else:
            assert out.getvalue().count("QUBE ") == 2
            assert out.getvalue().count("\x1b[H\x1b[J") == (2 if style.width else 0)
