# SPDX-License-Identifier: GPL-2.0-or-later
"""The command status: what is open, what is not known, and what is not in force yet."""

from dataclasses import replace

from answered import NOTHING, REPORT, listening, look, shown
from worlds import ADD, Command

from qubes_fwd_qrexec.admin.answers import AnswerError, NotRunningError
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.views.tables import Style
from qubes_fwd_qrexec.common.report import (
    DrainingReport,
    ListenerReport,
    QubeReport,
)
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
        ["", f"Figures are unknown: {down}."]
        if kind == "lab"
        else [
            "",
            *(
                f"{name} is waiting: {lacking}; 'qvm-forward diagnose {name}' says what helps."
                for name in ("personal tcp-81", "work web")
            ),
        ]
    )
    assert result.status == (0 if kind == "lab" else 1)
    narrow = forward("status", "work", style=Style(48)).out
    assert narrow.startswith(f"QUBE  NAME  STATE{' ' * (len(state) - 3)}EXPOSED AT  OPEN NOW\n")
    narrow = forward("status", "work", style=Style(30)).out
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
    assert "Not in force yet: 2 changes; run 'qvm-forward apply'.\n" in result.out
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
    assert first.startswith("No rule asks for this: dom0's policy allows 'qubes.ForwardTCP +8080+mux sys-net")
    assert second == (
        "No rule asks for this: sys-net is told to listen for fwd.work.web; 'qvm-forward apply' ends it."
    )
    assert "\nNo other forward is open.\n" in result.out
    assert "Nothing is open" not in result.out
    due = [step["step"] for step in forward("status", "--json").json["due"]]
    assert due == ["close-policy", "revoke", "remove-config"]
    assert first.join(("\x1b[31m", "\x1b[0m")) in forward("status", style=Style(has_colour=True)).out
    forward("apply")
    assert forward("status").out.startswith("Nothing is open.\n")
    # A rule whose qube is gone: nothing is left that would name it.
    lab.set_feature("sys-net", "vm-config.fwd.gone.web", "version=1")
    assert "sys-net is told to listen for fwd.gone.web" in forward("status").out


def test_what_drains_is_shown_and_who_does_not_say_is_named(
    forward: Command, store: Backend, kind: str
) -> None:
    forward(*ADD)
    forward("disable", "work", "web")
    if kind != "lab":
        # In the lab it has our package, and may run without its flag until its qube is started again.
        store.set_feature(QubeName("sys-net"), "service.qubes-forward-listener", "1")
    drain = DrainingReport(target=QubeName("work"), name=RuleName("web"), connections=2, left_s=3000)
    last = replace(drain, name=RuleName("old"), connections=1, left_s=59)
    listener = ListenerReport(since=1, forwards=(), draining=(drain, last))
    found = look(store, sys_net=QubeReport(program="1", listener=listener))
    assert shown(found).splitlines()[:4] == [
        "No forward is open.",
        "QUBE  NAME  STATE     AT       OPEN NOW       CUT",
        "work  web   draining  sys-net  2 connections  in 50 min",
        "work  old   draining  sys-net  1 connection   in 59 s",
    ]
    assert [entry["connections"] for entry in found.as_json()["draining"]] == [2, 1]
    words = shown(look(store, sys_net=AnswerError("x")))
    assert "No forward is open.\n" in words
    assert "What is draining at sys-net is unknown: no answer.\n" in words
    for answer in (NOTHING, AnswerError("x", 127), NotRunningError("x")):
        assert shown(look(store, sys_net=answer)).startswith("Nothing is open.\n")


def test_connections_of_a_closed_forward_that_its_listener_has_not_ended_are_said(
    forward: Command, store: Backend
) -> None:
    forward(*ADD)
    assert look(store, sys_net=listening(REPORT)).goes_on == ()
    forward("disable", "work", "web")
    store.set_feature(QubeName("sys-net"), "service.qubes-forward-listener", "1")
    found = look(store, sys_net=listening(REPORT))
    assert not found.is_well
    assert shown(found).startswith(
        "work web should be closed, but sys-net still has 3 connections of it.\nNo other forward is open.\n"
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
    (planned,) = forward("plan", "--json").json["forwards"]
    assert (planned["state"], planned["cause"]) == ("waiting", "exposed-halted")
    assert forward("status", "--json").json["forwards"] == [
        planned
        | {
            "proto": "tcp",
            "ports": "80",
            "is_allowed": True,
            "policy": "dom0 allows the call",
            "figures": {"is_known": False, "reason": "sys-net is halted"},
        }
    ]
