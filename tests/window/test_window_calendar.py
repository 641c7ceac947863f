# SPDX-License-Identifier: GPL-2.0-or-later
"""The calendar and clock from which the end of a forward can be chosen."""

from collections.abc import Iterator

import pytest
from controls import find
from screen import settle, until
from zones import zone

from qubes_fwd_qrexec.window.dialogs.calendar import Calendar
from qubes_fwd_qrexec.window.gtk import Gtk

AT = 1896112837  # 2030-01-31 18:00:37 UTC


class Shown:
    """A calendar that is open in a window."""

    def __init__(self) -> None:
        self.chosen: list[int] = []
        self.calendar = Calendar(self.chosen.append)
        self.calendar.begin_at(AT)
        self.window = Gtk.Window()
        self.window.set_default_size(500, 400)
        self.window.add(self.calendar.widget)
        self.window.show_all()
        self.popover = self.calendar.widget.get_popover()
        self.open()

    def open(self) -> None:
        self.calendar.widget.set_active(True)
        until(self.popover.get_mapped)

    def close(self) -> None:
        self.calendar.widget.set_active(False)
        until(lambda: not self.popover.get_mapped())

    @property
    def day(self) -> Gtk.Calendar:
        return find(self.popover, Gtk.Calendar, "Day")

    def spin(self, name: str) -> Gtk.SpinButton:
        return find(self.popover, Gtk.SpinButton, name)


@pytest.fixture
def shown() -> Iterator[Shown]:
    with zone("UTC"):
        shown = Shown()
        yield shown
        shown.window.destroy()
        settle()


def test_it_begins_where_it_is_told_and_chooses_nothing_by_itself(shown: Shown) -> None:
    assert shown.day.get_date() == (2030, 0, 31)
    assert (shown.spin("Hour").get_value(), shown.spin("Minute").get_value()) == (18, 0)
    assert shown.chosen == []


def test_a_day_an_hour_and_a_minute_are_told_as_a_time(shown: Shown) -> None:
    shown.day.select_day(30)
    shown.spin("Hour").set_value(7)
    shown.spin("Minute").spin(Gtk.SpinType.STEP_FORWARD, 5)
    assert shown.chosen == [1896026400, 1895986800, 1895987100]


def test_it_begins_anew_at_what_was_typed_meanwhile(shown: Shown) -> None:
    shown.close()
    shown.calendar.begin_at(AT + 86400)
    shown.open()
    assert shown.day.get_date() == (2030, 1, 1)
    assert shown.chosen == []


@pytest.mark.parametrize(("month", "year"), [(1, 2030), (0, 99999)])
def test_a_day_that_there_is_not_is_no_time(shown: Shown, month: int, year: int) -> None:
    shown.day.select_month(month, year)
    shown.spin("Hour").set_value(1)
    assert shown.chosen == []
