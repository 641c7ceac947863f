# SPDX-License-Identifier: GPL-2.0-or-later
"""What listeners answer: which of them are asked, and what goes on of what is closed."""

from dataclasses import replace
from threading import Barrier
from typing import Any

import pytest
from answered import REPORT
from bounds import BOUND_S
from worlds import NOW, OURS, only, qube, rule, world

from qubes_fwd_qrexec.admin.answers import AnswerError, NotRunningError, waiting
from qubes_fwd_qrexec.admin.inventory import LISTENER_FEATURE, Inventory
from qubes_fwd_qrexec.admin.plan import plan
from qubes_fwd_qrexec.admin.states import Plan
from qubes_fwd_qrexec.admin.views.listeners import (
    AFTER_S,
    GoesOn,
    Has,
    Heard,
    ask_after,
    ask_all,
    beyond_dom0,
    flows,
    listening,
    uptakes,
)
from qubes_fwd_qrexec.common.config import Service
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.report import (
    REPORT_MAX_BYTES,
    DrainingReport,
    FirewallReport,
    ForwardReport,
    ListenerReport,
    Problem,
    QubeReport,
    dump,
)
from qubes_fwd_qrexec.common.values import Proto, QubeName, RuleName

SYS_NET, PERSONAL, SSH = QubeName("sys-net"), QubeName("personal"), RuleName("ssh")
WORLD = world(qube("sys-net", features=OURS, provides_network=True))
STOCK = rule("srcports=22", target="personal", name="ssh")
WEB = ("work", "web")
KEY = (QubeName("work"), RuleName("web"))
CUTS = "'qvm-forward cut personal ssh' ends that now"
SILENT = AnswerError("it does not answer")


def planned(*rules: Any) -> Plan:
    return plan(rules, WORLD, NOW)


def report(target: str = "work", name: str = "web", connections: int = 0) -> ForwardReport:
    return replace(REPORT, target=QubeName(target), name=RuleName(name), connections=connections)


def drain(connections: int, left_s: int = 3000) -> DrainingReport:
    return DrainingReport(target=PERSONAL, name=SSH, connections=connections, left_s=left_s)


def answer(*forwards: ForwardReport, **more: Any) -> QubeReport:
    firewall = FirewallReport(waiting=more.pop("waiting", ()))
    listener = ListenerReport(since=0, forwards=forwards, **more)
    return QubeReport(program="x", listener=listener, firewall=firewall)


UDP = replace(report(), proto=Proto.UDP)
UDP_WORLD = world(
    qube("sys-net", features=OURS, provides_network=True), qube("work", "sys-firewall", features=OURS)
)
FIRE = "its firewall lets nobody in to a port that the listener does not listen on"
OPEN, NOTHING = answer(report()), answer()
BUSY = answer(problems=(Problem("fwd.work.web", "the port is in use by nginx"),))
PART = answer(replace(report(), is_listening=False))
SHUT = answer(report(), waiting=("fwd.work.web",))
DOWN = QubeReport(program="x", listener_problem="it is not enabled")
FLOWING, DRAINING = answer(report("personal", "ssh", 3)), answer(draining=(drain(2),))


class Qube:
    """sys-net, which is asked once, if it has an answer."""

    def __init__(self, answer: QubeReport | AnswerError | None = None) -> None:
        self._answer = answer
        self._asked = 0

    def ask(self, qube: QubeName, service: str, max_bytes: int, timeout_s: float) -> bytes:
        assert (qube, service, max_bytes) == ("sys-net", "qubes.ForwardStatus+", REPORT_MAX_BYTES)
        assert timeout_s == AFTER_S
        self._asked += 1
        assert self._answer is not None
        if isinstance(self._answer, AnswerError):
            raise self._answer
        return dump(self._answer.as_json())

    def heard(self, before: Plan, after: Plan, *keys: tuple[str, str], **more: Any) -> Heard:
        inventory = more.pop("inventory", WORLD)
        found = ask_after(before, after, keys, inventory, self, **more)  # type: ignore[arg-type]
        assert self._asked == (self._answer is not None)
        return found


@pytest.mark.parametrize(
    ("answer", "has"),
    [
        (OPEN, Has.OPEN),
        (SILENT, Has.NO_ANSWER),
        (AnswerError("none", ExitStatus.NO_SERVICE), Has.NO_SERVICE),
        (DOWN, Has.NO_LISTENER),
        (NOTHING, Has.NOT_YET),
        (BUSY, Has.FAILED),
        (PART, Has.IN_PART),
        (SHUT, Has.FIREWALL),
    ],
)
def test_a_listener_is_asked_once_whether_it_has_a_forward_open(
    answer: QubeReport | AnswerError, has: Has
) -> None:
    for before in (planned(), planned(rule("srcports=81"))):
        (took,) = Qube(answer).heard(before, planned(rule()), WEB).uptakes[KEY]
        assert took.has is has


def test_a_listener_that_gives_its_qube_no_answer_may_have_connections_unlike_none() -> None:
    hangs = QubeReport(program="x", listener_problem="the listener does not answer: timed out")
    (left,) = Qube(hangs).heard(planned(STOCK), planned(), (PERSONAL, SSH)).goes_on
    assert left == GoesOn(PERSONAL, SSH, SYS_NET, None)
    assert Qube(QubeReport(program="x")).heard(planned(STOCK), planned(), (PERSONAL, SSH)).goes_on == ()


def test_a_qube_is_asked_once_for_all_of_its_forwards() -> None:
    other = rule("srcports=81", name="other")
    asked = Qube(answer(report(), report(name="other")))
    found = asked.heard(planned(), planned(rule(), other), WEB, ("work", "other"))
    assert {key: [each.has for each in took] for key, took in found.uptakes.items()} == {
        WEB: [Has.OPEN],
        ("work", "other"): [Has.OPEN],
    }


def test_only_what_is_open_now_and_was_asked_for_is_a_question() -> None:
    assert Qube().heard(planned(), planned(rule())) == Heard({})
    halted = world(qube("sys-net", is_running=False, features=OURS, provides_network=True))
    after = plan([rule()], halted, NOW)
    assert Qube().heard(planned(), after, WEB, inventory=halted).uptakes == {}


NOTES: list[tuple[QubeReport | AnswerError | None, str | None]] = [
    (OPEN, None),
    (SILENT, None),
    (None, None),
    (NOTHING, "sys-net does not have it open yet"),
    (BUSY, "sys-net does not have it open: the port is in use by nginx"),
    (PART, "sys-net does not have it open: not all of its ports are open"),
    (
        SHUT,
        "sys-net does not have it open: its firewall lets nobody in to a port that the listener does not "
        "listen on",
    ),
    (
        AnswerError("none", ExitStatus.NO_SERVICE),
        "sys-net does not have qubes-fwd-qrexec, without which it does not listen",
    ),
    (DOWN, "sys-net does not listen: it is not enabled"),
    (QubeReport(program="x"), "sys-net does not listen: no listener is running"),
]


@pytest.mark.parametrize(("said", "text"), NOTES)
def test_what_keeps_a_forward_from_being_open_has_words(
    said: QubeReport | AnswerError | None, text: str | None
) -> None:
    forward = only(rule())
    helps = "; 'qvm-forward diagnose work web' says what helps"
    (took,) = uptakes(forward, said)
    assert took.note(forward) == (None if text is None else f"{text}{helps}")


@pytest.mark.parametrize(
    ("said", "notes"),
    [
        (answer(report(), UDP), [None, None]),
        (answer(report()), [None, "sys-net does not have its UDP open yet"]),
        (answer(UDP), ["sys-net does not have its TCP open yet", None]),
        (
            answer(report(), problems=(Problem("udp.work.web", "the port is in use by resolved"),)),
            [None, "sys-net does not have its UDP open: the port is in use by resolved"],
        ),
        (
            answer(report(), UDP, waiting=("udp.work.web",)),
            [None, f"sys-net does not have its UDP open: {FIRE}"],
        ),
        (DOWN, ["sys-net does not listen: it is not enabled"] * 2),
    ],
)
def test_each_protocol_of_a_forward_is_open_or_not_by_itself(
    said: QubeReport, notes: list[str | None]
) -> None:
    both = only(rule("proto=both"), UDP_WORLD)
    helps = "; 'qvm-forward diagnose work web' says what helps"
    assert [took.note(both) for took in uptakes(both, said)] == [note and f"{note}{helps}" for note in notes]
    assert [took.proto for took in uptakes(both, said)] == ["tcp", "udp"]
    alone = only(rule("proto=udp"), UDP_WORLD)
    (took,) = uptakes(alone, answer(report()))
    assert took.said == "sys-net does not have it open yet"


def test_flows_of_udp_are_told_from_connections() -> None:
    drains = (replace(drain(2), proto=Proto.UDP), drain(1))
    said = answer(replace(UDP, connections=5), report(connections=4), draining=drains)
    found = flows(SYS_NET, said, plan([rule()], UDP_WORLD, NOW))
    assert [str(each) for each in found or ()] == [
        f"personal ssh: 2 UDP flows at sys-net may go on for at most 50 min; {CUTS}",
        f"personal ssh: 1 connection at sys-net may go on for at most 50 min; {CUTS}",
        "work web: 5 UDP flows that should have ended at sys-net",
    ]
    assert (
        flows(SYS_NET, answer(replace(UDP, connections=5)), plan([rule("proto=udp")], UDP_WORLD, NOW)) == []
    )


def test_what_has_ended_beyond_dom0_is_found_and_no_other() -> None:
    other = rule("srcports=23", target="personal", name="other")
    (found,) = beyond_dom0(planned(STOCK, rule(), other), planned(other))
    assert (found[0], found[1].name) == ("sys-net", "ssh")
    assert beyond_dom0(planned(), planned(STOCK)) == []
    both = (rule(), rule("srcports=81 dstports=80", name="shares"))
    assert [config.name for _, config in beyond_dom0(planned(*both), planned(both[1]))] == ["web"]
    assert beyond_dom0(planned(rule()), planned(rule("srchosts=10.0.0.0/8"))) == []


def test_dom0_may_be_able_to_end_one_protocol_alone() -> None:
    """What carries UDP is never the stock service, and each protocol has calls of its own."""
    offers = {"supported-rpc.qubes.ForwardUDP": "1"}
    stock = world(qube("personal", "sys-firewall", features=offers))
    before = plan([rule("srcports=22 proto=both", target="personal", name="ssh")], stock, NOW)
    assert [config.proto for _, config in beyond_dom0(before, planned())] == ["tcp"]
    assert list(Qube(SILENT).heard(before, planned()).goes_on) == [GoesOn(PERSONAL, SSH, SYS_NET, None)]
    carries = answer(report("personal", "ssh", 3), replace(report("personal", "ssh", 5), proto=Proto.UDP))
    assert list(Qube(carries).heard(before, planned()).goes_on) == [GoesOn(PERSONAL, SSH, SYS_NET, 3)]
    shared = rule("srcports=81 dstports=80 proto=udp", name="shares")
    both = plan([rule("proto=both"), shared], UDP_WORLD, NOW)
    assert [config.proto for _, config in beyond_dom0(both, plan([shared], UDP_WORLD, NOW))] == ["udp"]


LEAVING: list[tuple[QubeReport | AnswerError, list[GoesOn]]] = [
    (answer(), []),
    (answer(report("personal", "ssh", 0)), []),
    (DRAINING, [GoesOn(PERSONAL, SSH, SYS_NET, 2, 3000)]),
    (FLOWING, [GoesOn(PERSONAL, SSH, SYS_NET, 3)]),
    (NotRunningError("down"), []),
    (AnswerError("none", ExitStatus.NO_SERVICE), []),
    (SILENT, [GoesOn(PERSONAL, SSH, SYS_NET, None)]),
]


@pytest.mark.parametrize(("answer", "left"), LEAVING)
def test_a_listener_is_asked_once_whether_it_has_ended_what_dom0_cannot(
    answer: QubeReport | AnswerError, left: list[GoesOn]
) -> None:
    assert list(Qube(answer).heard(planned(STOCK), planned(), ("personal", "ssh")).goes_on) == left


def test_what_was_closed_before_and_still_drains_is_found_wherever_it_is() -> None:
    (found,) = (
        Qube(DRAINING).heard(planned(), planned(), ("personal", "ssh"), inventory=only_sys_net()).goes_on
    )
    assert (found.connections, found.left_s) == (2, 3000)
    assert Qube(DRAINING).heard(planned(), planned(), ("work", "x"), inventory=only_sys_net()).goes_on == ()


def only_sys_net() -> Inventory:
    return Inventory({SYS_NET: WORLD.qubes[SYS_NET]})


def test_all_that_goes_on_anywhere_is_asked_for() -> None:
    def left(answer: QubeReport | AnswerError) -> tuple[GoesOn, ...]:
        asked = Qube(answer)
        return asked.heard(planned(), planned(), inventory=only_sys_net(), is_everything=True).goes_on

    assert left(answer()) == ()
    assert left(DRAINING) == (GoesOn(PERSONAL, SSH, SYS_NET, 2, 3000),)
    (found,) = left(SILENT)
    assert found == GoesOn(None, None, SYS_NET, None)
    assert str(found).startswith("sys-net does not say whether it has connections over qubes.Conn")


def test_several_drains_of_a_forward_are_one_and_what_is_live_is_none() -> None:
    said = answer(report(connections=1), report("personal", "ssh", 4), draining=(drain(2), drain(1, 59)))
    assert flows(SYS_NET, said, planned(STOCK)) == [
        GoesOn(PERSONAL, SSH, SYS_NET, 3, 3000),
        GoesOn(QubeName("work"), RuleName("web"), SYS_NET, 1),
    ]
    assert flows(SYS_NET, said, planned(rule())) == [GoesOn(PERSONAL, SSH, SYS_NET, 7)]
    assert flows(SYS_NET, QubeReport(program="x"), planned()) == []
    assert flows(SYS_NET, SILENT, planned()) is None


@pytest.mark.parametrize(
    ("left", "text"),
    [
        (
            GoesOn(PERSONAL, SSH, SYS_NET, 3),
            "3 connections over qubes.ConnectTCP, which dom0 cannot end at sys-net",
        ),
        (
            GoesOn(PERSONAL, SSH, SYS_NET, 1, 3000),
            f"1 connection at sys-net may go on for at most 50 min; {CUTS}",
        ),
        (
            GoesOn(PERSONAL, SSH, SYS_NET, None),
            "connections over qubes.ConnectTCP, which dom0 cannot end; sys-net does not say",
        ),
        (
            GoesOn(PERSONAL, SSH, SYS_NET, 3, None, Service.FORWARD_TCP),
            "3 connections over a call that another forward needs, so that dom0 cannot end it at sys-net",
        ),
    ],
)
def test_what_goes_on_has_words(left: GoesOn, text: str) -> None:
    assert str(left) == f"personal ssh: {text}"


def test_all_qubes_are_asked_at_once() -> None:
    together = Barrier(3, timeout=BOUND_S)

    class Slow:
        def ask(self, qube: QubeName, *_: object, **__: object) -> bytes:
            with waiting():
                together.wait()
            if qube == "vault":
                raise SILENT
            return dump(OPEN.as_json())

    names = [QubeName(name) for name in ("work", "vault", "sys-net")]
    found = ask_all(Slow(), names)  # type: ignore[arg-type]
    assert found == {"work": OPEN, "vault": SILENT, "sys-net": OPEN}


def test_whoever_has_our_package_may_listen_whatever_its_flag_says() -> None:
    flagged = world(
        qube("sys-net", features=OURS, provides_network=True),
        qube("sys-firewall", "sys-net", features={LISTENER_FEATURE: "1"}, provides_network=True),
        qube("hidden", "sys-vpn", is_running=False, features=OURS),
        without=("work", "vault"),
    )
    assert listening(flagged) == {"sys-firewall", "sys-net"}
