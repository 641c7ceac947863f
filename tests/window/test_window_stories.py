# SPDX-License-Identifier: GPL-2.0-or-later
"""Whole stories of a user, each with the window as a program of its own, over a lab and over a Qubes system.

It is read and worked as assistive technology does, by the names of its controls. Rules and policy are then
looked at as the command line has them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from desktop import Desktop
from faulty import allowed
from stages import set_netvm
from stories import TITLE, Machine
from systems import LAB, QUBES
from worlds import ADD, NOW, Command

from qubes_fwd_qrexec.lab.directory import LabDirectory

if TYPE_CHECKING:
    from reader import Reader

    Window = Callable[[], Reader]

EDITOR, CONFIRMATION = "Add a forward", "Confirm a forward"
SENTENCE = "Connections to port 80 of sys-net (outer side) from 192.168.0.0/16 reach port 8080 of work."
HOUR = 3600


def test_a_forward_is_open_for_an_hour_and_closed_when_that_is_over(
    window: "Window", machine: Machine, forward: Command, lab: LabDirectory
) -> None:
    user = window()
    user.reads("Nothing on this machine can be reached")
    user.press("Add…", TITLE)
    user.write("Qube", "work", EDITOR)
    user.write("Server port", "8080", EDITOR)
    user.write("Exposed port", "80", EDITOR)
    user.choose("192.168.0.0/16", EDITOR)
    user.choose("1 hour", EDITOR)
    user.reads(SENTENCE, EDITOR)
    user.press("Open", EDITOR)
    user.until_gone(EDITOR)
    user.reads("1 port is open", TITLE)
    user.reads("in 60 min", TITLE)
    assert len(allowed(lab)) == 1
    machine.set_clock(NOW + HOUR + 1)
    assert forward("apply", now=NOW + HOUR + 1).status == 0  # as `watch` does then
    user.reads("Nothing is open", TITLE)
    assert not allowed(lab)


def test_a_forward_that_a_netvm_change_suspends_is_shown_at_once_and_opens_when_confirmed(
    window: "Window", forward: Command, lab: LabDirectory
) -> None:
    assert forward(*ADD).status == 0
    user = window()
    user.reads("1 port is open", TITLE)
    set_netvm(lab, "sys-net")
    user.reads("1 forward needs your decision", TITLE)
    assert forward("apply").status == 0  # as `watch` does then
    assert not allowed(lab)
    user.select("SUSPENDED", TITLE)
    user.press("Confirm…", TITLE)
    user.reads("sys-firewall - sys-net", CONFIRMATION)
    user.reads("→ sys-net", CONFIRMATION)
    user.press("Confirm", CONFIRMATION)
    user.until_gone(CONFIRMATION)
    user.reads("1 port is open", TITLE)
    assert len(allowed(lab)) == 1


def test_everything_is_closed_at_a_button_and_open_again_when_resumed(
    window: "Window", forward: Command, lab: LabDirectory
) -> None:
    assert forward(*ADD).status == 0
    assert forward("add", "personal", "81", "--from", "any").status == 0
    user = window()
    user.reads("2 ports are open", TITLE)
    user.press("Close everything…", TITLE)
    user.press("Close everything", "Close everything")
    user.reads("Everything is closed", "Close everything")
    assert not allowed(lab)
    user.press("Resume…", "Close everything")
    user.press("Resume: open to anybody", "Resume")
    user.until_gone("Resume")
    user.reads("2 ports are open", TITLE)
    assert len(allowed(lab)) == 2


@pytest.mark.parametrize("kind", [QUBES], indirect=True)
def test_an_edit_of_a_rule_that_somebody_else_changed_is_refused_and_shows_both(
    window: "Window", forward: Command, lab: LabDirectory
) -> None:
    assert forward(*ADD, "--comment", "as it was").status == 0
    user = window()
    user.select("OPEN", TITLE)
    user.press("Edit…", TITLE)
    editor = "Edit work web"
    user.write("Comment", "mine", editor)
    assert forward("set", "work", "web", "comment=theirs").status == 0
    user.reads("comment=as it was", editor)
    user.reads("comment=theirs", editor)
    assert not user.is_usable("Save", editor)
    user.press("Cancel", editor)
    assert "comment=theirs" in lab.features("work")["forward.web"]


@pytest.mark.parametrize("kind", [LAB], indirect=True)
def test_the_keyboard_alone_opens_a_forward(window: "Window", desktop: Desktop, lab: LabDirectory) -> None:
    user = window()
    user.enter(TITLE)
    user.reads("Nothing on this machine can be reached")
    desktop.key("alt+a")
    user.reads("Who may connect", EDITOR)
    user.enter(EDITOR)
    desktop.type("work")
    user.tab_to("Server port")
    desktop.type("8080")
    user.tab_to("Exposed port")
    desktop.type("80")
    user.tab_to("192.168.0.0/16")
    desktop.key("space")
    user.reads(SENTENCE, EDITOR)
    desktop.key("alt+o")
    user.until_gone(EDITOR)
    user.enter(TITLE)
    user.reads("1 port is open", TITLE)
    assert len(allowed(lab)) == 1
