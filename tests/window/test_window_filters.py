# SPDX-License-Identifier: GPL-2.0-or-later
"""The filters of the list."""

import pytest
from screen import until

from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.window.filters import Filters
from qubes_fwd_qrexec.window.gtk import Gtk
from qubes_fwd_qrexec.window.model.rows import Filter, Show


class Shown:
    def __init__(self) -> None:
        self.told: list[Filter] = []
        self.filters = Filters(lambda: self.told.append(self.filters.filter))
        combos = [
            child for child in self.filters.widget.get_children() if isinstance(child, Gtk.ComboBoxText)
        ]
        self.show, self.qube = combos

    def offered(self) -> list[str]:
        return [row[0] for row in self.qube.get_model()]


@pytest.fixture
def shown() -> Shown:
    return Shown()


def offer(shown: Shown, *names: str) -> None:
    for _ in shown.filters.offer([*map(QubeName, names)]):
        pass


def test_at_first_everything_is_shown(shown: Shown) -> None:
    assert shown.filters.filter == Filter()
    assert (shown.show.get_active_text(), shown.qube.get_active_text()) == ("All", "any")


def test_each_choice_is_told_once(shown: Shown) -> None:
    offer(shown, "work", "sys-net")
    shown.show.set_active_id("OPEN")
    shown.qube.set_active_id("sys-net")
    shown.filters.search.set_text(" web ")
    wanted = Filter(Show.OPEN, QubeName("sys-net"), "web")
    until(lambda: shown.filters.filter == wanted)
    shown.filters.search.set_text("web")
    shown.filters.search.emit("search-changed")
    assert shown.told == [Filter(Show.OPEN), Filter(Show.OPEN, QubeName("sys-net")), wanted]


def test_the_choice_is_among_the_qubes_in_their_order(shown: Shown) -> None:
    offer(shown, "work", "sys-net")
    assert shown.offered() == ["any", "sys-net", "work"]
    offer(shown, "personal", "work", "untrusted")
    assert shown.offered() == ["any", "personal", "untrusted", "work"]
    offer(shown)
    assert shown.offered() == ["any"]
    assert shown.told == []


def test_a_qube_that_is_chosen_stays_to_choose_from(shown: Shown) -> None:
    offer(shown, "work", "sys-net")
    shown.qube.set_active_id("work")
    offer(shown, "personal")
    assert shown.offered() == ["any", "personal", "work"]
    assert shown.qube.get_active_id() == "work"
    assert shown.told == [Filter(qube=QubeName("work"))]


def test_a_filter_that_is_asked_for_is_told_once_and_shown(shown: Shown) -> None:
    offer(shown, "work")
    wanted = Filter(Show.WAITING_FOR_YOU, QubeName("work"), "web")
    shown.filters.ask_for(wanted)
    shown.filters.ask_for(wanted)
    assert shown.told == [wanted]
    assert shown.show.get_active_text() == "Waiting for you"
    assert shown.qube.get_active_text() == "work"
    assert shown.filters.search.get_text() == "web"
    shown.filters.ask_for(Filter())
    assert shown.filters.search.get_text() == ""
    assert shown.told == [wanted, Filter()]


def test_each_can_be_reached_by_a_letter(shown: Shown) -> None:
    labels = [child for child in shown.filters.widget.get_children() if isinstance(child, Gtk.Label)]
    assert [label.get_mnemonic_widget() for label in labels] == [shown.show, shown.qube]
    assert shown.filters.search.get_accessible().get_name() == "Search"


def test_names_are_given_room_without_being_measured_each_time(shown: Shown) -> None:
    (cell,) = shown.qube.get_cells()
    offer(shown, "work", "a-much-longer-name")
    wide, high = shown.qube.create_pango_layout("a-much-longer-name").get_pixel_size()
    assert cell.get_fixed_size() > (wide, high)
    offer(shown, "work")
    assert shown.qube.create_pango_layout("work").get_pixel_size()[0] < cell.get_fixed_size()[0] < wide
