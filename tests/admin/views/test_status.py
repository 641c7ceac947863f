# SPDX-License-Identifier: GPL-2.0-or-later
"""The command status: what is open, what is not known, and what is not in force yet."""

import io
import json
import time
from argparse import Namespace
from dataclasses import replace

import pytest
from faulty import Faulty
from stages import END
from worlds import ADD, NOW, Command

from qubes_fwd_qrexec.admin.answers import AnswerError, NotRunningError
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.snapshot import look as read_system
from qubes_fwd_qrexec.admin.views.judged import judged
from qubes_fwd_qrexec.admin.views.session import Session
from qubes_fwd_qrexec.admin.views.status import (
    WATCH_S,
    Row,
    Status,
    size,
    status,
    status_of,
    text,
    to_ask,
    watch,
)
from qubes_fwd_qrexec.admin.views.tables import Style
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.report import (
    CallsReport,
    DrainingReport,
    FirewallReport,
    ForwardReport,
    ListenerReport,
    Problem,
    QubeReport,
    Way,
    dump,
)
from qubes_fwd_qrexec.common.rules import Transport
from qubes_fwd_qrexec.common.values import QubeName, RuleName, TargetPorts
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.lab.qube import QubeState
from qubes_fwd_qrexec.lab.store import LabStore
from qubes_fwd_qrexec.system.ending import Ending


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
    assert shown(found).splitlines()[:3] == [
        "Draining: work web: 2 connections at sys-net may go on for at most 3000 s.",
        "Draining: work old: 1 connection at sys-net may go on for at most 59 s.",
        "No forward is open.",
    ]
    assert [entry["connections"] for entry in found.as_json()["draining"]] == [2, 1]
    words = shown(look(store, sys_net=AnswerError("x")))
    assert "No forward is open.\n" in words
    assert "What drains at sys-net is unknown: no answer.\n" in words
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
        "work web should be closed, but sys-net still has 3 connections of it.\nNo forward is open.\n"
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


NOTHING = QubeReport(program="1", listener=ListenerReport(since=1, forwards=()))


def look(store: Backend, **answers: QubeReport | AnswerError) -> Status:
    """The status of a system whose other qubes answer that they have no listener."""
    snapshot = read_system(store, with_config=True)
    planned = snapshot.plan(NOW)
    asked: dict[QubeName, QubeReport | AnswerError] = dict.fromkeys(
        to_ask(planned, snapshot.inventory, ()), QubeReport(program="1")
    )
    asked |= {QubeName(name.replace("_", "-")): answer for name, answer in answers.items()}
    return status_of(snapshot, planned, NOW, judged(planned.live, store, snapshot.installed), asked)


def row(store: Backend, **answers: QubeReport | AnswerError) -> Row:
    (found,) = look(store, **answers).rows
    return found


def shown(found: Status) -> str:
    return text(found, Style())


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


def listening(
    *forwards: ForwardReport, problems: tuple[Problem, ...] = (), waiting: tuple[str, ...] = (), bugs: int = 0
) -> QubeReport:
    listener = ListenerReport(since=1, forwards=forwards, problems=problems, bugs=bugs)
    return QubeReport(program="1", listener=listener, firewall=FirewallReport(waiting=waiting))


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
    snapshot = read_system(store)
    asked = to_ask(snapshot.plan(NOW), snapshot.inventory, ())
    assert "work" in asked
    assert "personal" not in asked


def test_refusals_and_the_last_error_are_said(forward: Command, store: Backend) -> None:
    forward(*ADD)
    refused = {"source": 2, "policy": 3}
    report = replace(REPORT, refused=refused, last_error="no call", last_error_at=0, way=Way.REFUSED)
    found = look(store, sys_net=listening(report))
    assert found.is_well
    assert "allows refused 3 40 5 999" in " ".join(shown(found).split())
    assert "work web: refused: 3 policy, 2 source.\n" in shown(found)
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(0))
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


class Looks(Ending):
    """An end that is asked for after some looks; none of them is waited for."""

    def __init__(self, count: int) -> None:
        self._count = count

    def is_asked(self, within_s: float = 0.0) -> bool:
        assert within_s == WATCH_S
        self._count -= 1
        return self._count == 0


ALL = Namespace(qube=[], watch=True)
PLAIN = Style()


def session_of(backend: Backend, style: Style = PLAIN, *, is_json: bool = False) -> Session:
    return Session(backend, NOW, {}, io.StringIO(), io.StringIO(), io.StringIO(), style, is_json, set())


def printed(session: Session) -> tuple[str, str]:
    assert isinstance(session.out, io.StringIO)
    assert isinstance(session.err, io.StringIO)
    return session.out.getvalue(), session.err.getvalue()


@pytest.mark.parametrize(("style", "clears"), [(Style(), 0), (Style(200), 2)])
def test_a_watch_shows_it_again_and_ends_with_the_status_of_the_last_look(
    forward: Command, store: Backend, kind: str, style: Style, clears: int
) -> None:
    forward(*ADD)
    session = session_of(store, style)
    assert watch(ALL, session, Looks(2)) == (kind == "qubes")  # there sys-net is without the package
    out, err = printed(session)
    assert (out.count("QUBE "), out.count("\x1b[H\x1b[J"), err) == (2, clears, "")


def test_a_watch_in_json_has_one_object_a_line_with_its_time(forward: Command, store: Backend) -> None:
    forward(*ADD)
    session = session_of(store, is_json=True)
    begun = time.time()
    watch(ALL, session, Looks(2))
    first, second = map(json.loads, printed(session)[0].splitlines())
    assert first.keys() == second.keys() == {*forward("status", "--json").json, "time"}
    assert begun <= first["time"] <= second["time"] <= time.time()


@pytest.mark.parametrize("is_json", [False, True])
def test_a_watch_goes_on_after_an_error_and_says_it(
    forward: Command, lab: LabDirectory, is_json: bool
) -> None:
    class Away(LabStore):
        looks = 0

        def inventory(self, *, with_config: bool = True) -> Inventory:
            self.looks += 1
            if self.looks == 1:
                raise StoreError("away")
            return super().inventory(with_config=with_config)

    forward(*ADD, "--disabled")
    forward("apply")
    session = session_of(Away(lab), is_json=is_json)
    assert watch(ALL, session, Looks(2)) == 0
    out, err = printed(session)
    assert (out.count('"due": []') if is_json else out.count("Nothing is open.")) == 1
    assert err == "qvm-forward: away\n"
    session = session_of(Away(lab), is_json=is_json)
    assert (watch(ALL, session, Looks(1)), printed(session)[0]) == (1, "")


def test_a_watch_ends_by_a_signal_once_the_look_is_done(forward: Command, lab: LabDirectory) -> None:
    class Interrupted(LabStore):
        def inventory(self, *, with_config: bool = True) -> Inventory:
            END()
            return super().inventory(with_config=with_config)

    forward(*ADD, "--disabled")
    forward("apply")
    session = session_of(Interrupted(lab))
    assert status(ALL, session) == 0
    assert printed(session)[0].startswith("Nothing is open.\n")
