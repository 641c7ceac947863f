# SPDX-License-Identifier: GPL-2.0-or-later
"""Each step of a diagnosis is shown as it comes, and closing the window leaves nothing to wait for."""

import threading
from collections.abc import Iterator

import pytest
from helpers import BOUND_S
from mainloop import MainLoop
from panes import PROBE, Heard, button, of, text
from screen import settle, until
from test_diagnose_udp import ADD, Asked
from worlds import NOW, Command

from qubes_fwd_qrexec.admin.states import Key
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.report import Answer, Trial
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.window import widgets
from qubes_fwd_qrexec.window.dialogs.diagnosis import Diagnosis
from qubes_fwd_qrexec.window.gtk import Gdk, Gtk
from qubes_fwd_qrexec.window.model.board import Board

KEY: Key = (QubeName("vault"), "dns")
WELL = "Everything on the way to the server works. Whether the server answers its clients was not tested."


class Slow(Asked):
    """Qubes that answer when the test lets them, if it holds them up."""

    def __init__(self, lab: LabDirectory) -> None:
        super().__init__(lab)
        self.may_answer = threading.Semaphore(1000)

    def ask(
        self, qube: QubeName, service: str, max_bytes: int, timeout_s: float | None = None, given: str = ""
    ) -> bytes:
        assert self.may_answer.acquire(timeout=BOUND_S)
        return super().ask(qube, service, max_bytes, timeout_s, given)


@pytest.fixture
def qubes(lab: LabDirectory) -> Slow:
    return Slow(lab)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def board(qubes: Slow) -> Iterator[Board]:
    loop = MainLoop(NOW)
    board = Board(lambda: qubes, widgets.deliver, loop.later, lambda: NOW)
    yield board
    board.close()


@pytest.fixture
def diagnosis(board: Board, heard: Heard, over: Command, qubes: Slow) -> Iterator[Diagnosis]:
    over(qubes, *ADD)
    qubes.asked.clear()
    diagnosis = Diagnosis(board, heard)
    yield diagnosis
    diagnosis.close()


def is_busy(diagnosis: Diagnosis) -> bool:
    return "Asking…" in text(diagnosis.widget)


def steps(diagnosis: Diagnosis) -> list[str]:
    """The names of the steps that are shown."""
    lines = text(diagnosis.widget).split("\n")
    return [lines[at + 1] for at, line in enumerate(lines) if line[:2] in ("✓ ", "! ", "✖ ", "? ")]


def test_all_steps_are_shown_with_what_follows(diagnosis: Diagnosis, qubes: Slow, over: Command) -> None:
    diagnosis.open(None, KEY)
    until(lambda: WELL in text(diagnosis.widget))
    printed = over(qubes, "diagnose", "vault", "dns")
    names = [check["step"] for check in over(qubes, "diagnose", "vault", "dns", "--json").json["steps"]]
    assert steps(diagnosis) == names
    assert diagnosis.text == printed.out
    assert not is_busy(diagnosis)


def test_a_step_is_shown_while_the_next_is_still_asked_for(diagnosis: Diagnosis, qubes: Slow) -> None:
    qubes.may_answer = threading.Semaphore(0)
    diagnosis.open(None, KEY)
    until(lambda: steps(diagnosis) == ["rule", "exposed qube", "applied"])
    assert is_busy(diagnosis)
    assert not button(diagnosis.widget, "Try again").get_sensitive()
    qubes.may_answer.release()
    until(lambda: "listener" in steps(diagnosis))
    qubes.may_answer.release(100)
    until(lambda: not is_busy(diagnosis))


def test_it_can_be_closed_while_a_qube_is_asked_and_asks_no_more(
    diagnosis: Diagnosis, qubes: Slow, board: Board
) -> None:
    qubes.may_answer = threading.Semaphore(0)
    diagnosis.open(None, KEY)
    until(lambda: steps(diagnosis) == ["rule", "exposed qube", "applied"])
    diagnosis.close()
    qubes.may_answer.release(1000)
    done: list[object] = []
    for number in range(20):
        board.ask(lambda _: None, done.append, done.append)
        until(lambda number=number: len(done) > number)  # type: ignore[misc]
        settle()
    assert len(qubes.asked) == 1


def test_what_helps_is_a_button_and_says_what_it_does(
    diagnosis: Diagnosis, over: Command, qubes: Slow, heard: Heard
) -> None:
    over(qubes, "disable", "vault", "dns")
    diagnosis.open(None, KEY)
    until(lambda: "What helps: 'qvm-forward enable vault dns'" in text(diagnosis.widget))
    helps = next(
        each
        for each in of(diagnosis.widget, Gtk.Button)
        if each.get_tooltip_text() == "qvm-forward enable vault dns"
    )
    helps.clicked()
    ((name, remedy),) = heard.calls
    assert (name, remedy.command) == ("remedy", "qvm-forward enable vault dns")


def test_trying_again_begins_anew_with_what_is_there_now(
    diagnosis: Diagnosis, over: Command, qubes: Slow
) -> None:
    over(qubes, "disable", "vault", "dns")
    diagnosis.open(None, KEY)
    until(lambda: not is_busy(diagnosis))
    assert steps(diagnosis) == ["rule"]
    over(qubes, "enable", "vault", "dns")
    qubes.may_answer = threading.Semaphore(0)
    button(diagnosis.widget, "Try again").clicked()
    until(lambda: steps(diagnosis) == ["rule", "exposed qube", "applied"])
    assert "What helps" not in text(diagnosis.widget)
    qubes.may_answer.release(1000)
    until(lambda: WELL in text(diagnosis.widget))


def test_a_rule_that_is_gone_and_one_that_is_broken_say_so(
    diagnosis: Diagnosis, over: Command, qubes: Slow
) -> None:
    qubes.set_feature(QubeName("vault"), "forward.dns", PROBE)
    diagnosis.open(None, KEY)
    until(lambda: "What helps: 'qvm-forward remove vault dns'" in text(diagnosis.widget))
    over(qubes, "remove", "vault", "dns")
    button(diagnosis.widget, "Try again").clicked()
    until(lambda: "vault has no forwards" in text(diagnosis.widget))
    assert not is_busy(diagnosis)
    assert button(diagnosis.widget, "Try again").get_sensitive()


def test_an_answer_of_a_qube_is_text(diagnosis: Diagnosis, qubes: Slow) -> None:
    qubes.trials["53"] = Trial(Answer.REFUSED, "no-server", PROBE)
    diagnosis.open(None, KEY)
    until(lambda: not is_busy(diagnosis))
    assert PROBE in text(diagnosis.widget)


def test_a_system_that_cannot_be_read_is_an_error(
    diagnosis: Diagnosis, qubes: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: bool) -> object:
        raise StoreError(f"qubesd is gone {PROBE}")

    monkeypatch.setattr(qubes, "inventory", fail)
    diagnosis.open(None, KEY)
    until(lambda: f"qubesd is gone {PROBE}" in text(diagnosis.widget))
    assert not is_busy(diagnosis)


def test_it_is_copied_as_text_and_closed_by_keyboard(diagnosis: Diagnosis) -> None:
    diagnosis.open(None, KEY)
    until(lambda: WELL in text(diagnosis.widget))
    button(diagnosis.widget, "Copy as text").clicked()
    assert Gtk.Clipboard.get(Gdk.SELECTION_CLIPBOARD).wait_for_text() == diagnosis.text
    assert diagnosis.widget.get_focus() is button(diagnosis.widget, "Close")
    diagnosis.widget.emit("close")
    settle()
    assert not diagnosis.widget.get_visible()
