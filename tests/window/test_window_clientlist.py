# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is connected is listed in the pane of a rule, and can be cut there."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from answered import REPORT, listening
from answering import Answering
from detailpane import CLIENTS, KEY, PLAIN, Pane
from mainloop import MainLoop
from panes import Heard, looked, of
from screen import until
from test_status_clients import ONE, naming
from worlds import ADD, NOW, Command

from qubes_fwd_qrexec.admin.views.connected import Client
from qubes_fwd_qrexec.common.report import ForwardReport
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.lab.directory import LabDirectory
from qubes_fwd_qrexec.window.clientlist import SHOWN_MAX
from qubes_fwd_qrexec.window.clientlist import words as client_words
from qubes_fwd_qrexec.window.gtk import Gtk
from qubes_fwd_qrexec.window.model.board import FIGURES_S


@pytest.fixture
def heard() -> Heard:
    return Heard()


class Listening:
    """A lab whose sys-net says who is connected, and a pane over it."""

    def __init__(self, lab: LabDirectory, over: Command, loop: MainLoop, heard: Heard, count: int) -> None:
        lab.set_feature("sys-net", "service.qubes-forward-listener", "1")
        self.backend = Answering(lab, {})
        self.connect(*range(1000, 1000 + count))
        over(self.backend, *ADD)
        self.pane = Pane(lambda: self.backend, loop, heard)
        looked(self.pane.board)
        self.pane.detail.show(KEY)
        self.pane.board.be_seen(True)

    def connect(self, *ports: int) -> None:
        """Let clients be connected from these ports."""
        clients = (replace(ONE, port=port) for port in ports)
        report: ForwardReport = replace(REPORT, connections=len(ports))
        self.backend.says |= {PLAIN: listening(report), CLIENTS: naming(*clients)}

    def ask(self) -> None:
        """Have the qubes asked again."""
        was = self.pane.board.figures
        self.pane.loop.pass_time(FIGURES_S)
        until(lambda: self.pane.board.figures is not was)


@pytest.fixture
def listen(
    lab: LabDirectory, over: Command, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[int], Listening]]:
    made: list[Listening] = []
    loop = MainLoop(NOW)

    def make(count: int) -> Listening:
        made.append(Listening(lab, over, loop, heard, count))
        return made[-1]

    monkeypatch.setattr(time, "monotonic", lambda: loop.now)
    yield make
    for each in made:
        each.pane.close()


def test_clients_are_shown_and_cut(listen: Callable[[int], Listening], heard: Heard) -> None:
    found = listen(2)
    found.pane.until("2 clients are connected:", "192.168.0.5:1001 at sys-net (tcp) since ")
    names = [each.get_accessible().get_name() for each in of(found.pane.detail.widget, Gtk.Button)]
    assert "Cut 192.168.0.5:1000" in names
    cut = [each for each in of(found.pane.detail.widget, Gtk.Button) if each.get_label() == "Cut…"]
    cut[1].clicked()
    ((name, key, client),) = heard.calls
    assert (name, key, client.report.port) == ("cut", KEY, 1001)
    heard.calls.clear()
    found.pane.button("Cut all…").clicked()
    assert heard.calls == [("cut", KEY, None)]


def test_a_client_that_may_finish_is_said_to() -> None:
    client = Client(QubeName("sys-net"), replace(ONE, is_draining=True))
    assert client_words(client) == (
        "192.168.0.5:50000 at sys-net (tcp) may finish; 999 from it, 1.5 KiB to it, idle for 3 s"
    )


def test_thousands_of_clients_are_counted(listen: Callable[[int], Listening]) -> None:
    found = listen(2000)
    found.pane.until("2000 clients are connected:", f"and {2000 - SHOWN_MAX} more")
    cuts = [each for each in of(found.pane.detail.widget, Gtk.Button) if each.get_label() == "Cut…"]
    assert len(cuts) == SHOWN_MAX


def test_a_client_that_stays_keeps_the_focus(listen: Callable[[int], Listening]) -> None:
    found = listen(3)
    found.pane.until("3 clients are connected:")
    named = {each.get_accessible().get_name(): each for each in of(found.pane.detail.widget, Gtk.Button)}
    named["Cut 192.168.0.5:1001"].grab_focus()
    found.connect(1002, 1001)
    found.ask()
    found.pane.until("2 clients are connected:")
    assert found.pane.window.get_focus() is named["Cut 192.168.0.5:1001"]
    found.connect()
    found.ask()
    until(lambda: "connected" not in found.pane.text)
    assert found.pane.window.get_focus() is not None
