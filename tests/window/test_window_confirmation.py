# SPDX-License-Identifier: GPL-2.0-or-later
"""Nobody agrees to what he has not seen for a second; and nothing is removed or cut unasked."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from answered import REPORT, listening
from answering import Answering
from mainloop import MainLoop
from panes import PROBE, Told, button, looked, text
from screen import settle, until
from test_status_clients import ONE
from worlds import ADD, NOW, Command, content

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.states import Key
from qubes_fwd_qrexec.admin.views.connected import Client
from qubes_fwd_qrexec.common.clientreport import CutReport
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.window import widgets
from qubes_fwd_qrexec.window.dialogs import confirmation as confirmations
from qubes_fwd_qrexec.window.dialogs.confirmation import Confirmation
from qubes_fwd_qrexec.window.dialogs.cutting import Cutting
from qubes_fwd_qrexec.window.dialogs.question import WAIT_S
from qubes_fwd_qrexec.window.dialogs.removal import SHOWN_MAX, Removal
from qubes_fwd_qrexec.window.model.board import Board

WORK = QubeName("work")
KEY: Key = (WORK, "web")
LINE = "action=forward srcports=80 srchosts=10.0.0.0/8 owner=work"


@pytest.fixture
def loop() -> MainLoop:
    return MainLoop(NOW)


@pytest.fixture
def board(other_store: Callable[[], Backend], loop: MainLoop) -> Iterator[Board]:
    board = Board(other_store, widgets.deliver, loop.later, lambda: NOW)
    yield board
    board.close()


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def confirmation(board: Board, told: Told, loop: MainLoop) -> Iterator[Confirmation]:
    confirmation = Confirmation(board, told, later=loop.later)
    yield confirmation
    confirmation.widget.destroy()


@pytest.fixture
def removal(board: Board, told: Told) -> Iterator[Removal]:
    removal = Removal(board, told)
    yield removal
    removal.widget.destroy()


@pytest.fixture
def suspended(forward: Command, lab: LabDirectory, board: Board) -> None:
    forward(*ADD)
    move(lab, "sys-net")
    looked(board)


def move(lab: LabDirectory, netvm: str) -> None:
    lab.write_qube(replace(lab.qube("work"), netvm=QubeName(netvm)))


def open_confirmation(confirmation: Confirmation) -> None:
    confirmation.open(None, KEY)
    until(lambda: "After that: " in text(confirmation.widget))


@pytest.mark.usefixtures("suspended")
def test_confirming_shows_was_and_will_be_and_then_does_it(
    confirmation: Confirmation, told: Told, lab: LabDirectory, loop: MainLoop
) -> None:
    open_confirmation(confirmation)
    said = text(confirmation.widget).split("\n")
    at = said.index("Netvms of work")
    assert said[at + 1 : at + 3] == ["sys-firewall - sys-net", "→ sys-net"]
    assert "After that: OPEN. Connections to port 80 of sys-net (outer side) from 192.168.0.0/16" in text(
        confirmation.widget
    )
    loop.pass_time(WAIT_S)
    button(confirmation.widget, "Confirm").clicked()
    until(lambda: told)
    assert told[0].is_well
    assert "path=sys-net" in (lab.feature("work", "forward.web") or "")
    assert not confirmation.widget.get_visible()


def test_a_rule_that_would_let_in_anybody_says_so_on_its_button(
    confirmation: Confirmation, lab: LabDirectory, board: Board, forward: Command
) -> None:
    forward("add", "work", "80", "--from", "any", "--name", "web")
    move(lab, "sys-net")
    looked(board)
    open_confirmation(confirmation)
    yes = button(confirmation.widget, "Open to anybody")
    assert yes.get_style_context().has_class("anybody")
    forward("set", "work", "web", "srchosts=10.0.0.0/8")
    looked(board)
    until(lambda: "10.0.0.0/8" in text(confirmation.widget))
    assert button(confirmation.widget, "Confirm") is yes
    assert not yes.get_style_context().has_class("anybody")


@pytest.mark.usefixtures("suspended")
def test_for_a_second_nobody_can_agree(
    confirmation: Confirmation, told: Told, lab: LabDirectory, loop: MainLoop
) -> None:
    before = content(lab)
    open_confirmation(confirmation)
    yes = button(confirmation.widget, "Confirm")
    for _ in range(2):
        assert not yes.get_sensitive()
        yes.clicked()
        loop.pass_time(WAIT_S / 2 - 0.01)
    loop.pass_time(0.02)
    assert yes.get_sensitive()
    settle()
    assert (told, content(lab)) == ([], before)


@pytest.mark.usefixtures("suspended")
def test_what_changes_meanwhile_is_shown_and_needs_another_second(
    confirmation: Confirmation, told: Told, lab: LabDirectory, loop: MainLoop, board: Board
) -> None:
    open_confirmation(confirmation)
    yes = button(confirmation.widget, "Confirm")
    loop.pass_time(WAIT_S - 0.1)
    for netvm, path in (("sys-firewall", "sys-firewall - sys-net"), ("sys-net", "sys-net")):
        lab.set_feature("work", "forward.web", f"{LINE} path=vault")
        move(lab, netvm)
        looked(board)
        until(lambda path=path: f"→ {path}\n" in text(confirmation.widget))  # type: ignore[misc]
        loop.pass_time(0.2)
        assert not yes.get_sensitive()
        loop.pass_time(WAIT_S - 0.2)
        assert yes.get_sensitive()


@pytest.mark.usefixtures("suspended")
def test_what_changed_unseen_is_refused_and_both_stay_to_be_read(
    confirmation: Confirmation, told: Told, lab: LabDirectory, loop: MainLoop
) -> None:
    open_confirmation(confirmation)
    loop.pass_time(WAIT_S)
    move(lab, "sys-vpn")
    button(confirmation.widget, "Confirm").clicked()
    until(lambda: "were sys-net when you looked, and are sys-vpn" in text(confirmation.widget))
    assert told == []
    assert "path=sys-firewall" in (lab.feature("work", "forward.web") or "")


@pytest.mark.usefixtures("suspended")
def test_it_closes_when_the_rule_is_gone(
    confirmation: Confirmation, lab: LabDirectory, board: Board, forward: Command
) -> None:
    open_confirmation(confirmation)
    forward("remove", "work", "web")
    looked(board)
    until(lambda: not confirmation.widget.get_visible())


@pytest.mark.usefixtures("suspended")
def test_a_rule_that_cannot_be_confirmed_says_why(
    confirmation: Confirmation, lab: LabDirectory, board: Board, loop: MainLoop
) -> None:
    lab.write_qube(replace(lab.qube("sys-net"), netvm=WORK))
    looked(board)
    confirmation.open(None, KEY)
    until(lambda: "work web was not confirmed. " in text(confirmation.widget))
    loop.pass_time(WAIT_S)
    assert not button(confirmation.widget, "Confirm").get_sensitive()


def test_removing_asks_once_and_says_what_it_closes(
    removal: Removal, told: Told, board: Board, forward: Command, lab: LabDirectory
) -> None:
    forward(*ADD)
    looked(board)
    removal.open(None, [KEY])
    said = text(removal.widget)
    assert "Remove this forward?" in said
    assert "work web: OPEN. Connections to port 80 of sys-net (outer side) from 192.168.0.0/16" in said
    assert "Its connections are cut." in said
    button(removal.widget, "Remove").clicked()
    until(lambda: told)
    assert told[0].lines == ("Forward work web is removed and closed.",)
    assert lab.feature("work", "forward.web") is None


def test_many_rules_of_several_qubes_are_one_question_and_some_are_counted(
    removal: Removal, told: Told, board: Board, forward: Command, lab: LabDirectory
) -> None:
    line = "action=forward srcports={} srchosts=any enabled=no on-expire=drain"
    for number in range(SHOWN_MAX + 2):
        lab.set_feature("work", f"forward.r{number}", line.format(1000 + number))
    lab.set_feature("personal", "forward.bad", PROBE)
    looked(board)
    assert board.look is not None
    keys = sorted(board.look.snapshot.stored)
    removal.open(None, keys)
    said = text(removal.widget)
    assert f"Remove these {SHOWN_MAX + 3} forwards?" in said
    assert "personal bad: BROKEN. It is not open." in said
    assert "work r0: CLOSED. It is not open." in said
    assert "and 3 more" in said
    button(removal.widget, "Remove").clicked()
    until(lambda: told)
    assert len(told[0].lines) == SHOWN_MAX + 3
    looked(board)
    assert board.look.snapshot.stored == {}


def test_connections_that_may_finish_are_said_to(removal: Removal, board: Board, forward: Command) -> None:
    forward(*ADD, "--on-expire", "drain")
    looked(board)
    removal.open(None, [KEY])
    assert "Its connections may go on for up to an hour." in text(removal.widget)


def test_what_should_be_closed_and_is_in_force_is_said_to_be_open(
    removal: Removal, board: Board, forward: Command, lab: LabDirectory
) -> None:
    forward(*ADD)
    lab.set_feature("work", "forward.web", f"{lab.feature('work', 'forward.web')} enabled=no")
    looked(board)
    removal.open(None, [KEY])
    said = text(removal.widget)
    assert "work web: STILL OPEN. It should be closed but is still in force." in said
    assert "is not open" not in said


@pytest.mark.usefixtures("suspended")
def test_a_fault_while_it_is_computed_is_said_and_agrees_to_nothing(
    confirmation: Confirmation, loop: MainLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(confirmations, "agreement", lambda *_: 1 / 0)
        confirmation.open(None, KEY)
        until(lambda: "this is a fault of the window itself" in text(confirmation.widget))
        loop.pass_time(WAIT_S)
        assert not button(confirmation.widget, "Confirm").get_sensitive()


@pytest.mark.usefixtures("suspended")
def test_a_fault_that_passes_leaves_the_question_as_it_was(
    confirmation: Confirmation, board: Board, loop: MainLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_confirmation(confirmation)
    with monkeypatch.context() as patched:
        patched.setattr(confirmations, "agreement", lambda *_: 1 / 0)
        board.refresh()
        until(lambda: "this is a fault of the window itself" in text(confirmation.widget))
        loop.pass_time(WAIT_S)
        assert not button(confirmation.widget, "Confirm").get_sensitive()
    board.refresh()
    until(lambda: "this is a fault of the window itself" not in text(confirmation.widget))
    loop.pass_time(WAIT_S)
    assert button(confirmation.widget, "Confirm").get_sensitive()


def test_only_what_is_shown_is_removed(
    removal: Removal, told: Told, board: Board, forward: Command, lab: LabDirectory
) -> None:
    forward(*ADD)
    looked(board)
    removal.open(None, [KEY])
    forward("set", "work", "web", "comment=x")
    button(removal.widget, "Remove").clicked()
    until(lambda: "it is not what you saw" in text(removal.widget))
    assert (told, lab.feature("work", "forward.web") is None) == ([], False)
    forward("remove", "work", "web")
    board.refresh()
    until(lambda: not removal.widget.get_visible())


def test_one_client_or_all_are_cut_after_one_question(
    told: Told, loop: MainLoop, lab: LabDirectory, over: Command
) -> None:
    lab.set_feature("sys-net", "service.qubes-forward-listener", "1")
    cut = "qubes.ForwardCut+fwd.work.web"
    backend = Answering(
        lab, {("sys-net", "qubes.ForwardStatus+"): listening(REPORT), ("sys-net", cut): CutReport(1)}
    )
    over(backend, *ADD)
    board = Board(lambda: backend, widgets.deliver, loop.later, lambda: NOW)
    client = Client(QubeName("sys-net"), ONE)
    for which, question in (
        (client, "Cut the connection of 192.168.0.5:50000 to work web?"),
        (None, "Cut all connections of work web?"),
    ):
        cutting = Cutting(board, told)
        cutting.open(None, KEY, which)
        assert question in text(cutting.widget)
        told.clear()
        button(cutting.widget, "Cut").clicked()
        until(lambda: told)
        assert told[0].lines[0].startswith("Cut 1 connection of work web")
    assert [one.given for one in backend.asked if one.service == cut] == ["192.168.0.5:50000\n", "\n"]
    backend.says["sys-net", cut] = CutReport(0)
    told.clear()
    cutting = Cutting(board, told)
    cutting.open(None, KEY, None)
    button(cutting.widget, "Cut").clicked()
    until(lambda: "nobody is connected to work web" in text(cutting.widget))
    assert (told, cutting.widget.get_visible()) == ([], True)
    cutting.widget.destroy()
    board.close()
