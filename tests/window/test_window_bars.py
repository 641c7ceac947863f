# SPDX-License-Identifier: GPL-2.0-or-later
"""The bars above the list."""

from collections.abc import Iterator

import pytest
from onscreen import inside, texts
from screen import settle, until

from qubes_fwd_qrexec.window.bars import AlertBars, SummaryBar
from qubes_fwd_qrexec.window.gtk import Gtk
from qubes_fwd_qrexec.window.model.alerts import Alert, Way
from qubes_fwd_qrexec.window.model.summary import Summary, Tone
from qubes_fwd_qrexec.window.widgets import column

HELD = Alert("held", "Everything is held.", (), Way.RESUME, "_Resume…")
OLD = Alert("trouble", "It is old.", ("no <b>qubesd</b> & co",), Way.LOOK, "Re_load", is_bad=True)
READ = Alert("read-only", "Nothing can be changed.")


class Bars:
    """The bars of alerts in a window, and which ways were taken."""

    def __init__(self) -> None:
        self.taken: list[Way] = []
        self.bars = AlertBars(self.taken.append)
        self.window = Gtk.Window(default_width=800, default_height=600)
        self.window.add(column(self.bars.widget))
        self.window.show_all()
        settle()

    def infos(self) -> list[Gtk.InfoBar]:
        return [*inside(self.bars.widget, Gtk.InfoBar)]


@pytest.fixture
def shown() -> Iterator[Bars]:
    made = Bars()
    yield made
    made.window.destroy()
    settle()


def test_nothing_is_there_until_something_applies(shown: Bars) -> None:
    assert not shown.bars.widget.get_visible()
    shown.bars.show([READ])
    assert texts(shown.bars.widget) == ["Nothing can be changed."]
    shown.bars.show([])
    assert not shown.bars.widget.get_visible()
    assert shown.infos() == []


def test_bars_come_in_the_order_of_the_alerts(shown: Bars) -> None:
    shown.bars.show([READ])
    shown.bars.show([OLD, HELD, READ])
    assert texts(shown.bars.widget) == [
        *("It is old.", "no <b>qubesd</b> & co", "Reload"),
        *("Everything is held.", "Resume…"),
        "Nothing can be changed.",
    ]
    kinds = [info.get_message_type() for info in shown.infos()]
    assert kinds == [Gtk.MessageType.ERROR, Gtk.MessageType.WARNING, Gtk.MessageType.INFO]


def test_a_button_goes_the_way_of_its_alert(shown: Bars) -> None:
    shown.bars.show([OLD, HELD])
    for pressed in inside(shown.bars.widget, Gtk.Button):
        pressed.clicked()
    assert shown.taken == [Way.LOOK, Way.RESUME]


def test_a_bar_that_says_the_same_stays_with_the_focus_in_it(shown: Bars) -> None:
    shown.bars.show([HELD])
    (pressed,) = inside(shown.bars.widget, Gtk.Button)
    pressed.grab_focus()
    shown.bars.show([OLD, HELD, READ])
    assert pressed.is_focus()
    shown.bars.show([HELD._replace(text="Other words.")])
    assert texts(shown.bars.widget) == ["Other words.", "Resume…"]


def test_bars_take_the_room_of_their_texts_and_no_more(shown: Bars) -> None:
    shown.bars.show([HELD])
    height = shown.bars.widget.get_allocated_height
    until(lambda: shown.bars.widget.get_allocated_width() >= 800)
    until(lambda: height() == shown.infos()[0].get_allocated_height())
    assert height() < 60
    shown.bars.show([HELD, OLD])
    until(lambda: height() == sum(info.get_allocated_height() for info in shown.infos()))


def test_many_bars_leave_room_for_the_list(shown: Bars) -> None:
    shown.bars.show([Alert(str(number), "words " * 40, ("more",) * 5) for number in range(6)])
    until(lambda: shown.bars.widget.get_allocated_height() > 100)
    settle()
    assert shown.bars.widget.get_allocated_height() <= 200


def test_the_summary_says_by_word_sign_and_colour_who_can_come_in() -> None:
    bar = SummaryBar(lambda: None)
    bar.widget.show_all()
    labels = [*inside(bar.widget, Gtk.Label)]
    for tone, sign, style in (
        (Tone.OPEN, "●", "open"),
        (Tone.ANYBODY, "▲", "anybody"),
        (Tone.CLOSED, "○", ""),
    ):
        bar.show(Summary("<b>2</b> ports", tone, 0))
        labels = [*inside(bar.widget, Gtk.Label)]
        assert [label.get_text() for label in labels] == [sign, "<b>2</b> ports"]
        styles = {"open", "anybody", "note"} & {*labels[1].get_style_context().list_classes()}
        assert styles == ({style} if style else set())


def test_what_waits_for_a_word_can_be_shown() -> None:
    pressed: list[str] = []
    bar = SummaryBar(lambda: pressed.append("show"))
    bar.widget.show_all()
    assert [*inside(bar.widget, Gtk.Button)] == []
    bar.show(Summary("1 waits", Tone.OPEN, 1))
    (show,) = inside(bar.widget, Gtk.Button)
    show.clicked()
    assert pressed == ["show"]
    bar.show(Summary("0 wait", Tone.OPEN, 0))
    assert [*inside(bar.widget, Gtk.Button)] == []


def test_it_says_while_a_change_is_made() -> None:
    bar = SummaryBar(lambda: None)
    bar.widget.show_all()
    bar.be_busy(is_busy=True)
    assert texts(bar.widget) == ["Working…"]
    (spinner,) = inside(bar.widget, Gtk.Spinner)
    assert spinner.props.active
    bar.be_busy(is_busy=False)
    assert texts(bar.widget) == []
    assert not spinner.get_visible()
