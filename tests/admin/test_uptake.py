# SPDX-License-Identifier: GPL-2.0-or-later
"""What listeners say just after a change: when they are asked, for how long, and when it counts."""

from dataclasses import replace

import pytest
from test_figures import listening, mux_calls
from test_status import REPORT
from worlds import ADD, Command, Hands, only, qube, rule, world

from qubes_fwd_qrexec.admin import uptake
from qubes_fwd_qrexec.admin.answers import AnswerError
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.uptake import BOUND_S, can_be_asked, troubles
from qubes_fwd_qrexec.common.report import Problem
from qubes_fwd_qrexec.common.values import QubeName

FORWARD = only(rule())
OTHER = only(rule("srcports=81", name="other"))
NOTHING = listening()
OPEN = listening(REPORT)
HELD = listening(problems=(Problem("fwd.work.web", "the port is in use by nginx"),))
PART = listening(replace(REPORT, is_listening=False))
SILENT = AnswerError("it does not answer")
HELPS = "; 'qvm-forward diagnose work web' says what helps"


class Qube:
    """One exposed qube, which answers each question as it is told to, and time that passes by waiting."""

    def __init__(self, *answers: bytes | AnswerError, takes_s: float = 0.0) -> None:
        self._answers = list(answers)
        self._takes_s = takes_s
        self.hands = Hands(elapsed=100.0)
        self.asked_at: list[float] = []

    def ask(self, qube: QubeName, service: str, max_bytes: int, timeout_s: float) -> bytes:
        assert qube == "sys-net"
        self.asked_at.append(round(self.hands.elapsed - 100.0, 3))
        assert 0 < timeout_s <= BOUND_S - self.asked_at[-1] + 0.001
        self.hands.pass_by(min(self._takes_s, timeout_s))
        answer = self._answers.pop(0)
        if isinstance(answer, AnswerError):
            raise answer
        return answer

    def troubles(self, *forwards: object, is_renewed: bool = False) -> dict[tuple[str, str], str]:
        found = troubles(
            forwards or (FORWARD,),  # type: ignore[arg-type]
            [FORWARD] if is_renewed else [],
            self,  # type: ignore[arg-type]
            elapsed=lambda: self.hands.elapsed,
            rest=self.hands.pass_by,
        )
        assert not self._answers
        assert self.hands.elapsed - 100.0 <= BOUND_S
        return found


CASES: list[tuple[tuple[bytes | AnswerError, ...], bool, str | None]] = [
    ((OPEN,), False, None),
    ((SILENT,), False, None),
    ((NOTHING, OPEN), False, None),
    ((HELD, OPEN), False, None),
    ((OPEN, OPEN), True, None),
    ((NOTHING, SILENT), False, "sys-net does not have it open yet"),
    ((NOTHING, NOTHING, OPEN), False, None),
    ((NOTHING, NOTHING, NOTHING), False, "sys-net does not have it open yet"),
    ((NOTHING, HELD), False, "sys-net does not have it open: the port is in use by nginx"),
    ((OPEN, HELD), True, "sys-net does not have it open: the port is in use by nginx"),
    ((PART, PART), False, "sys-net does not have it open: not all of its ports are open"),
    ((mux_calls(),), False, "sys-net does not listen: no listener"),
    ((b"\x1b[2J",), False, None),
]


@pytest.mark.parametrize(("answers", "is_renewed", "text"), CASES)
def test_what_counts_is_what_is_said_when_it_can_be_of_the_change(
    answers: tuple[bytes | AnswerError, ...], is_renewed: bool, text: str | None
) -> None:
    asked = Qube(*answers)
    expected = {} if text is None else {("work", "web"): f"{text}{HELPS}"}
    assert asked.troubles(is_renewed=is_renewed) == expected
    assert asked.asked_at == [0.0, 0.7, 1.3][: len(answers)]


def test_a_qube_is_asked_once_for_all_of_its_forwards() -> None:
    asked = Qube(OPEN, NOTHING, NOTHING)
    found = asked.troubles(FORWARD, OTHER)
    assert found.keys() == {("work", "other")}


@pytest.mark.parametrize("takes_s", [5.0, 1.5])
def test_a_qube_that_is_slow_is_not_waited_for(takes_s: float) -> None:
    answers = [NOTHING] if takes_s > BOUND_S else [NOTHING, NOTHING]
    assert Qube(*answers, takes_s=takes_s).troubles().keys() == {("work", "web")}


@pytest.mark.parametrize(
    ("text", "inventory", "is_asked"),
    [
        ("", world(qube("sys-net", features={"supported-rpc.qubes.ForwardTCP": "1"})), True),
        ("", world(), False),
        ("enabled=no", world(qube("sys-net", features={"supported-rpc.qubes.ForwardTCP": "1"})), False),
        ("via=gone", world(), False),
        (
            "",
            world(qube("sys-net", is_running=False, features={"supported-rpc.qubes.ForwardTCP": "1"})),
            False,
        ),
    ],
)
def test_only_a_qube_that_runs_and_has_our_services_is_asked(
    text: str, inventory: Inventory, is_asked: bool
) -> None:
    assert can_be_asked(only(rule(text), inventory), inventory) is is_asked


def test_a_qube_without_our_package_is_said_not_to_listen(forward: Command) -> None:
    note = (
        "Note: personal has not told dom0 that it has qubes-fwd-qrexec, without which it does not listen; "
        "'qvm-forward diagnose work web' says what helps.\n"
    )
    added = forward(*ADD, "--via", "personal")
    assert (added.status, note in added.out) == (0, True)
    assert "Note: personal" not in forward("set", "work", "web", "comment=x", "--no-apply").out
    assert "Note: personal" not in forward("set", "work", "web", "via=sys-net").out


def test_a_change_tells_it_and_does_not_fail(
    forward: Command, store: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked: list[bool] = []

    def answer(store: Backend, *_: object, **__: object) -> bytes:
        with store.locked():  # or else this would be waited for in vain
            locked.append(True)
        return HELD

    monkeypatch.setattr(type(store), "ask", answer)
    monkeypatch.setattr(uptake, "ASKED_AT_S", (0.0, 0.0))
    note = f"Note: sys-net does not have it open: the port is in use by nginx{HELPS}.\n"
    added = forward(*ADD)
    assert (added.status, note in added.out) == (0, True)
    changed = forward("set", "work", "web", "comment=x", "--json")
    assert (changed.status, changed.json["forwards"][0]["warnings"][0]) == (0, note[6:-2])
    for words in (("disable", "work", "web"), ("set", "work", "web", "comment=y", "--no-apply")):
        locked.clear()
        assert "Note: sys-net" not in forward(*words).out
        assert not locked
    assert note in forward("enable", "work", "web").out
    assert note in forward("confirm", "work", "web").out
