# SPDX-License-Identifier: GPL-2.0-or-later
"""What came of a change stays to be read, selected and closed."""

import time
from collections.abc import Iterator

import pytest
from panes import PROBE, button, of, shown, text
from screen import settle
from worlds import NOW

from qubes_fwd_qrexec.common.errors import RefusedError
from qubes_fwd_qrexec.window.gtk import Atk, Gtk
from qubes_fwd_qrexec.window.model.actions import Done
from qubes_fwd_qrexec.window.outcome import LINES_MAX, Outcome
from qubes_fwd_qrexec.window.widgets import column

AT = time.strftime("%H:%M", time.localtime(NOW))


@pytest.fixture
def outcome() -> Outcome:
    return Outcome(lambda: NOW)


@pytest.fixture(autouse=True)
def window(outcome: Outcome) -> Iterator[Gtk.Window]:
    window = shown(column(outcome.widget))
    yield window
    window.destroy()


def test_there_is_nothing_before_there_is_an_outcome(outcome: Outcome) -> None:
    assert not outcome.widget.get_visible()


@pytest.mark.parametrize(
    ("done", "head", "look"),
    [
        (Done(("all",), (), is_well=True), f"✓ Done. ({AT})", Gtk.MessageType.INFO),
        (
            Done(("all",), ("a",), is_well=False),
            f"! Not everything went well. ({AT})",
            Gtk.MessageType.WARNING,
        ),
    ],
)
def test_how_it_is_shows_by_words_and_not_by_colour_alone(
    outcome: Outcome, done: Done, head: str, look: Gtk.MessageType
) -> None:
    outcome.show(done)
    assert text(outcome.widget).split("\n") == [head, *done.warnings, *done.lines]
    assert outcome.widget.get_message_type() is look


def test_an_error_is_shown_with_its_reason_and_no_text_is_markup(outcome: Outcome) -> None:
    outcome.show_error(RefusedError(f"{PROBE}\nmore"))
    assert text(outcome.widget) == f"✖ Not done. ({AT})\n{PROBE}\nmore"
    assert outcome.widget.get_message_type() is Gtk.MessageType.ERROR


def test_it_is_an_alert_that_says_all_of_it_and_shows_up_anew_each_time(outcome: Outcome) -> None:
    times: list[int] = []
    outcome.widget.connect("show", lambda _: times.append(1))
    for number in (1, 2):
        outcome.show(Done((f"line {number}",), (PROBE,), is_well=True))
        accessible = outcome.widget.get_accessible()
        assert accessible.get_role() is Atk.Role.ALERT
        assert accessible.get_name() == f"✓ Done. ({AT}) {PROBE} line {number}"
        assert len(times) == number


def test_the_text_can_be_selected_and_the_bar_closed(outcome: Outcome) -> None:
    outcome.show(Done(("line",), (), is_well=True))
    lines = next(label for label in of(outcome.widget, Gtk.Label) if label.get_text() == "line")
    assert lines.get_selectable()
    close = button(outcome.widget, "")
    assert close.get_accessible().get_name() == "Close this message"
    close.clicked()
    settle()
    assert not outcome.widget.get_visible()
    outcome.show(Done(("line",), (), is_well=True))
    outcome.widget.emit("close")
    assert not outcome.widget.get_visible()


def test_a_thousand_lines_leave_room_for_the_rest(outcome: Outcome) -> None:
    outcome.show(Done(("line",) * 1000, ("a warning",), is_well=True))
    assert outcome.widget.get_preferred_height()[1] < 300
    said = text(outcome.widget).split("\n")
    assert (said[1], len(said), said[-1]) == ("a warning", 2 + LINES_MAX, "and 981 more")
