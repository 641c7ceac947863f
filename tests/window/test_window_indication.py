# SPDX-License-Identifier: GPL-2.0-or-later
"""The indicator never says that nothing is open where that is not known."""

from pathlib import Path

import pytest
from looks import look
from worlds import rule

from qubes_fwd_qrexec.window.model.indication import indication
from qubes_fwd_qrexec.window.model.look import Look
from qubes_fwd_qrexec.window.model.summary import summary

LAN = "srchosts=192.168.0.0/16"
ICONS = Path(__file__).parents[2] / "icons/hicolor/scalable/apps"


@pytest.mark.parametrize(
    ("seen", "icon"),
    [
        (look(rule(LAN)), "qubes-forward-open"),
        (look(rule(LAN), rule("srcports=81", name="all")), "qubes-forward-anybody"),
        (look(rule(), is_held=True), "qubes-forward-held"),
        (look(rule(f"{LAN} enabled=no"), before=(rule(LAN),)), "qubes-forward-unknown"),
    ],
)
def test_its_icon_and_its_text_are_those_of_what_is_open(seen: Look, icon: str) -> None:
    assert indication(seen, None) == (icon, summary(seen).text)
    assert (ICONS / f"{icon}.svg").exists()


@pytest.mark.parametrize("seen", [None, look(), look(rule("enabled=no"))])
def test_where_nothing_is_open_and_before_the_first_look_it_is_not_there(seen: Look | None) -> None:
    assert indication(seen, None).icon == ""


@pytest.mark.parametrize("seen", [look(), look(rule(LAN))])
def test_while_the_system_cannot_be_read_it_says_so_and_what_was_before(seen: Look) -> None:
    icon, text = indication(seen, "<b>qubesd\x1b is gone")
    assert icon == "qubes-forward-unknown"
    assert text.splitlines() == [
        r"What is open is unknown: <b>qubesd\x1b is gone",
        f"Last known: {summary(seen).text}",
    ]
    assert indication(None, "no") == (icon, "What is open is unknown: no")


def test_a_long_error_is_cut() -> None:
    assert len(indication(None, "x" * 100_000).text) < 600
