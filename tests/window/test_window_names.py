# SPDX-License-Identifier: GPL-2.0-or-later
"""Each control of every dialog says what it is for; what qubes and users wrote is shown letter by letter."""

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from listenersays import status
from stages import set_netvm
from stories import TITLE, Machine
from systems import QUBES
from worlds import ADD, NOW, Command

from qubes_fwd_qrexec.common.services import STATUS_SERVICE
from qubes_fwd_qrexec.lab.directory import LabDirectory

if TYPE_CHECKING:
    from reader import Reader

    Window = Callable[[], Reader]

pytestmark = pytest.mark.parametrize("kind", [QUBES], indirect=True)
# It is other text to whoever takes it for markup, and no markup at all to whoever checks that first.
PROBE = "<b>&amp;<i>"
BROKEN = f"action=forward srcport={PROBE}"


@pytest.fixture
def full(forward: Command, lab: LabDirectory, machine: Machine) -> None:
    """Rules in several states, with the probe wherever a text can be stored or said."""
    assert forward(*ADD, "--comment", f"for {PROBE}").status == 0
    assert forward("add", "personal", "81", "--from", "any").status == 0
    lab.set_feature("vault", "forward.typo", BROKEN)
    said = status(NOW)
    said["listener"]["problems"] = [{"key": "fwd.work.web", "text": f"a problem {PROBE}"}]
    said["listener"]["forwards"][1] |= {"last_error": f"an error {PROBE}", "last_error_at": 1}
    machine.answer("sys-net", f"{STATUS_SERVICE}+clients", json.dumps(said).encode())


def rule_dialogs(user: "Reader") -> Iterator[str]:
    """Each dialog that is about a rule, opened; its title."""
    for button, title in (
        ("Edit…", "Edit work web"),
        ("Diagnose…", "Diagnosis of work web"),
        ("Remove…", "Remove forwards"),
    ):
        user.press(button, TITLE)
        user.until(lambda title=title: user.seen(title), f"{title!r} is there")  # type: ignore[misc]
        yield title
        user.press("Close" if button == "Diagnose…" else "Cancel", title)
        user.until_gone(title)


def test_every_control_of_every_dialog_has_a_name(full: None, window: "Window", lab: LabDirectory) -> None:
    user = window()
    user.select("192.168.0.0/16", TITLE)
    assert user.nameless() == []
    for title in rule_dialogs(user):
        assert user.nameless() == [], title
    for button, title in (("Add…", "Add a forward"), ("Close everything…", "Close everything")):
        user.press(button, TITLE)
        user.find("Cancel", window=title)
        assert user.nameless() == [], title
        user.press("Cancel", title)
        user.until_gone(title)
    set_netvm(lab, "sys-net")
    user.reads("1 forward needs your decision", TITLE)
    user.press("Confirm…", TITLE)
    user.find("Cancel", window="Confirm a forward")
    assert user.nameless() == []


def test_what_is_stored_and_said_is_shown_letter_by_letter(full: None, window: "Window") -> None:
    user = window()
    user.select("192.168.0.0/16", TITLE)
    user.reads(f"an error {PROBE}", TITLE)
    user.reads(f"a problem {PROBE}", TITLE)
    user.press("Edit…", TITLE)
    user.reads(f"for {PROBE}", "Edit work web")
    user.press("Cancel", "Edit work web")
    user.until_gone("Edit work web")
    user.select("BROKEN", TITLE)
    user.reads(BROKEN, TITLE)
    user.press("Add…", TITLE)
    user.write("Server port", PROBE, "Add a forward")
    user.until(lambda: said(user, "Add a forward"), "the error says what was typed")


def said(user: "Reader", window: str) -> bool:
    """Whether a text of the window that nobody typed has the probe."""
    return any(seen.role == "label" and PROBE in seen.name for seen in user.seen(window))
