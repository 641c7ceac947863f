# SPDX-License-Identifier: GPL-2.0-or-later
"""The list of rules: what the user has chosen, folded and scrolled to stays while the rules change."""

from collections.abc import Iterator

import pytest
from listed import group, row, system
from onscreen import dark_theme, focused, press
from screen import settle, until

from qubes_fwd_qrexec.admin.states import State
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.window import style
from qubes_fwd_qrexec.window.cells import Cells
from qubes_fwd_qrexec.window.gtk import Atk, Gdk, GLib, Gtk
from qubes_fwd_qrexec.window.model.rows import ENDED, Item
from qubes_fwd_qrexec.window.portions import PORTION_S, Portions
from qubes_fwd_qrexec.window.rulelist import RuleList

WORK, PERSONAL = group("work", row("tls"), row("web")), group("personal", row("wiki", "personal"))
WEB: Item = (QubeName("work"), "web")
FOREGROUND = Cells._fields.index("state_foreground")
TLS: Item = (QubeName("work"), "tls")


def names(accessible: Atk.Object) -> Iterator[str]:
    """Of it and all that is in it."""
    yield accessible.get_name()
    for index in range(accessible.get_n_accessible_children()):
        yield from names(accessible.ref_accessible_child(index))


class Shown:
    """A list in a window, and what it has told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.picked: list[Item | None] = []
        self.opened: list[Item | None] = []
        self.menus: list[Item] = []
        self.list = RuleList(
            lambda: self.picked.append(self.list.chosen),
            lambda: self.opened.append(self.list.chosen),
            self._menu,
            Portions(self._pass_time),
        )
        self.view = self.list.view
        self.window = Gtk.Window(default_width=700, default_height=200)
        self.window.add(self.list.widget)
        self.window.show_all()
        focused(self.window)
        self.list.view.grab_focus()

    def _pass_time(self) -> float:
        """Each step takes a millisecond."""
        self.now += 0.001
        return self.now

    def _menu(self, item: Item) -> Gtk.Menu:
        self.menus.append(item)
        return Gtk.Menu()

    def texts(self) -> list[str]:
        """The first column of the rows that are not folded away."""
        found: list[str] = []

        def note(model: Gtk.TreeModel, path: Gtk.TreePath, place: Gtk.TreeIter) -> bool:
            above = path.copy()
            if path.get_depth() == 1 or (above.up() and self.view.row_expanded(above)):
                found.append(model[place][1])
            return False

        self.view.get_model().foreach(note)
        return found

    def selected(self) -> str | None:
        tree, found = self.view.get_selection().get_selected()
        return None if found is None else tree[found][0]


@pytest.fixture
def shown() -> Iterator[Shown]:
    made = Shown()
    yield made
    made.window.destroy()
    settle()


def test_groups_are_unfolded_but_what_has_ended(shown: Shown) -> None:
    ended = group(ENDED, row("old", mark="ENDED", state=State.EXPIRED))
    shown.list.show((PERSONAL, WORK, ended))
    assert shown.texts() == ["personal", "● OPEN", "work", "● OPEN", "● OPEN", "1 ended"]


def test_what_is_chosen_stays_chosen_whatever_changes_around_it(shown: Shown) -> None:
    shown.list.show((PERSONAL, WORK))
    shown.list.choose(WEB)
    for groups in (
        (WORK,),
        (group("a", row("x", "a")), WORK),
        (group("work", row("web", comment="said"), row("tls")),),
        (group("work", row("new"), row("web")), PERSONAL),
    ):
        shown.list.show(groups)
        assert shown.list.chosen == shown.selected() == WEB
    assert shown.picked == [WEB]


def test_where_the_chosen_rule_goes_no_other_is_chosen(shown: Shown) -> None:
    shown.list.show((WORK, PERSONAL))
    shown.list.choose(TLS)
    shown.list.show((group("work", row("web")), PERSONAL))
    assert shown.list.chosen is shown.selected() is None
    assert shown.picked == [TLS, None]


def test_a_rule_that_comes_back_is_chosen_again(shown: Shown) -> None:
    """As when the filter that hid it is cleared."""
    shown.list.show((WORK, PERSONAL))
    shown.list.choose(WEB)
    shown.list.show((PERSONAL,))
    shown.list.show((WORK, PERSONAL))
    assert shown.list.chosen == shown.selected() == WEB


def test_a_chosen_rule_whose_time_ends_stays_chosen_though_it_is_folded_away(shown: Shown) -> None:
    shown.list.show((WORK,))
    shown.list.choose(WEB)
    shown.list.show((group("work", row("tls")), group(ENDED, row("web"))))
    assert shown.list.chosen == WEB
    assert shown.selected() is None
    assert shown.picked == [WEB]


def test_a_folded_group_stays_folded(shown: Shown) -> None:
    shown.list.show((WORK, PERSONAL))
    shown.view.collapse_row(Gtk.TreePath.new_first())
    shown.list.show((group("a", row("x", "a")), group("work", row("tls"), row("web"), row("new")), PERSONAL))
    assert shown.texts() == ["a", "● OPEN", "work", "personal", "● OPEN"]
    shown.list.show((PERSONAL,))
    shown.list.show((WORK, PERSONAL))
    assert shown.texts() == ["work", "personal", "● OPEN"]
    shown.view.expand_row(Gtk.TreePath.new_first(), False)
    shown.list.show((PERSONAL,))
    shown.list.show((WORK, PERSONAL))
    assert shown.texts() == ["work", "● OPEN", "● OPEN", "personal", "● OPEN"]


def test_choosing_a_rule_unfolds_its_group(shown: Shown) -> None:
    shown.list.show((group(ENDED, row("web")),))
    shown.list.choose(WEB)
    assert shown.selected() == WEB


def test_what_is_scrolled_to_stays_in_view(shown: Shown) -> None:
    shown.list.show(system(10, 5))
    until(lambda: not shown.list.is_filling)
    settle()
    scroll = shown.list.widget.get_vadjustment()
    scroll.set_value(400)
    settle()
    shown.list.show(tuple(each._replace(netvms="other") for each in system(10, 5)))
    until(lambda: not shown.list.is_filling)
    settle()
    assert scroll.get_value() == 400


def test_no_turn_of_the_main_loop_changes_more_than_a_portion(shown: Shown) -> None:
    changes: list[object] = []
    for signal in ("row-inserted", "row-deleted", "row-changed"):
        shown.view.get_model().connect(signal, lambda *_: changes.append(None))
    for groups, least in ((system(200, 5), 1200), ((), 1200), (system(200, 5), 1200), (system(200, 5), 0)):
        most = total = 0
        shown.list.show(groups)
        while shown.list.is_filling:
            most, total = max(most, len(changes)), total + len(changes)
            changes.clear()
            GLib.MainContext.default().iteration(True)
        total += len(changes)
        changes.clear()
        # Of each row, and of the group that it comes to or goes from.
        assert most <= 3 * PORTION_S / 0.001
        assert total >= least
        assert total == 0 or least


def test_other_rules_take_the_place_of_those_that_are_not_all_shown_yet(shown: Shown) -> None:
    shown.list.show(system(100, 5))
    assert shown.list.is_filling
    shown.list.choose(WEB)
    shown.list.show((PERSONAL, WORK))
    until(lambda: not shown.list.is_filling)
    assert shown.texts() == ["personal", "● OPEN", "work", "● OPEN", "● OPEN"]
    assert shown.list.chosen == WEB
    assert shown.picked == [WEB]


def test_a_rule_that_is_chosen_before_it_is_shown_is_told_once_it_is(shown: Shown) -> None:
    shown.list.show((group("work", row("tls")),))
    shown.list.choose(TLS)
    shown.list.show((*system(100, 5), WORK))
    shown.list.choose(WEB)
    until(lambda: not shown.list.is_filling)
    assert shown.picked == [TLS, WEB]


def test_a_list_that_goes_is_not_filled_any_more(shown: Shown) -> None:
    shown.list.show(system(100, 5))
    tree = shown.view.get_model()
    shown.window.destroy()
    count = tree.iter_n_children(None)
    settle()
    assert not shown.list.is_filling
    assert tree.iter_n_children(None) == count


def test_what_is_selected_has_no_colour_of_its_own(shown: Shown) -> None:
    def colours() -> list[bool]:
        return [bool(each[FOREGROUND]) for each in shown.view.get_model()[0].iterchildren()]

    shown.list.show((WORK,))
    press(shown.view, Gdk.KEY_Home)
    press(shown.view, Gdk.KEY_Down)
    assert colours() == [False, True]
    press(shown.view, Gdk.KEY_Down)
    assert colours() == [True, False]


def foregrounds(shown: Shown) -> list[str | None]:
    return [each[FOREGROUND] for each in shown.view.get_model()[0].iterchildren()]


def test_rows_have_the_colours_of_a_theme_that_comes_while_they_are_shown(
    shown: Shown,
) -> None:
    shown.list.show((WORK,))
    light = foregrounds(shown)
    with dark_theme():
        until(lambda: foregrounds(shown) == [style.colours(shown.view)["open"]] * 2 != light)
    until(lambda: foregrounds(shown) == light)


def test_rows_that_wait_for_their_turn_are_shown_whatever_gtk_says_of_the_theme_meanwhile(
    shown: Shown,
) -> None:
    def other_work() -> Iterator[None]:
        shown.list.show((WORK,))
        shown.view.emit("style-updated")
        yield

    Portions().run(other_work())
    until(lambda: not shown.list.is_filling)
    assert shown.texts() == ["work", "● OPEN", "● OPEN"]


def test_keys_go_through_the_rows_fold_them_and_open_the_details(shown: Shown) -> None:
    shown.list.show((WORK, PERSONAL))
    shown.list.choose(TLS)
    press(shown.view, Gdk.KEY_Down)
    assert shown.list.chosen == WEB
    press(shown.view, Gdk.KEY_Home)
    assert shown.list.chosen == "work"
    press(shown.view, Gdk.KEY_End)
    assert shown.list.chosen == ("personal", "wiki")
    press(shown.view, Gdk.KEY_Return)
    assert shown.opened == [("personal", "wiki")]
    press(shown.view, Gdk.KEY_Left)
    assert shown.list.chosen == "personal"
    press(shown.view, Gdk.KEY_Left)
    assert shown.texts()[-1] == "personal"
    press(shown.view, Gdk.KEY_Right)
    assert shown.texts()[-1] == "● OPEN"
    assert shown.menus == []


def test_letters_search_nothing(shown: Shown) -> None:
    assert not shown.view.get_enable_search()


def test_the_menu_is_of_what_is_chosen(shown: Shown) -> None:
    shown.list.show((WORK, PERSONAL))
    shown.list.choose(WEB)
    assert shown.view.emit("popup-menu")
    assert shown.menus == [WEB]
    shown.list.choose(TLS)
    assert shown.view.emit("popup-menu")
    assert shown.menus == [WEB, TLS]
    assert len(Gtk.Menu.get_for_attach_widget(shown.view)) == 1


def test_columns_that_say_nothing_are_not_there(shown: Shown) -> None:
    def titles() -> list[str]:
        return [column.get_title() for column in shown.view.get_columns() if column.get_visible()]

    shown.list.show((group("work", row("web", ends="")),))
    assert titles() == ["State", "From", "Reachable at", "Goes to"]
    shown.list.show((group("work", row("web", comment="mine", role="exposed", ends="in 7 h")),))
    assert titles() == ["State", "From", "Reachable at", "Goes to", "Ends", "Comment", "Role"]
    shown.list.show((group("work", row("web", ends=""), row("broken", ends="", mode="")),))
    assert titles() == ["State", "From", "Reachable at", "Goes to"]
    shown.list.show((group("work", row("web", ends=""), row("nft", ends="", mode="by nft")),))
    assert titles() == ["State", "From", "Reachable at", "Goes to", "Mode"]


def test_each_word_for_a_state_fits_its_column(shown: Shown) -> None:
    """Also where the name of a qube has as many letters, or more."""
    rows = (row("a", mark="iiiiiiiiii"), row("b", mark="WWWWWWWWWW"))
    shown.list.show((group("iiiiiiiiiiii", *rows),))
    column = shown.view.get_columns()[0]
    layout = shown.view.create_pango_layout("● WWWWWWWWWW")
    assert column.get_fixed_width() > 1.1 * layout.get_pixel_size()[0] + 50


def test_a_larger_font_has_wider_columns(shown: Shown) -> None:
    shown.list.show((WORK,))

    def width() -> int:
        return shown.view.get_columns()[2].get_fixed_width()

    was, settings = width(), Gtk.Settings.get_default()
    font = settings.props.gtk_font_name
    settings.props.gtk_font_name = "Sans 20"
    until(lambda: width() > was)
    settings.props.gtk_font_name = font
    until(lambda: width() == was)


def test_where_there_is_no_room_the_columns_go_that_say_least(shown: Shown) -> None:
    def missing(width: int) -> list[str]:
        shown.window.resize(width, 200)
        until(lambda: shown.list.widget.get_allocated_width() == width)
        settle()
        return [column.get_title() for column in shown.view.get_columns() if not column.get_visible()]

    said = {"comment": "mine", "role": "exposed"}
    shown.list.show((group("work", row("web", **said), row("tls", mode="by nft", **said)),))
    columns = {column.get_title(): column.get_fixed_width() for column in shown.view.get_columns()}
    room = sum(columns.values())
    assert missing(room) == []
    assert missing(room - 1) == ["Mode"]
    assert missing(room - columns["Mode"] - 1) == ["Mode", "Comment"]
    assert missing(room - columns["Mode"] - columns["Comment"] - 1) == ["Goes to", "Mode", "Comment"]
    assert missing(room) == []


def test_assistive_technology_reads_each_cell(shown: Shown) -> None:
    shown.list.show((group("work", row("web", comment="<b>mine</b> &")),))
    settle()
    accessible = shown.view.get_accessible()
    said = {"work", "via sys-net", "● OPEN", "192.168.0.0/16", "sys-net:80", "8080", "<b>mine</b> &"}
    assert said <= {*names(accessible)}
    assert accessible.get_name() == "Forwards by target"


def test_what_is_cut_or_left_out_can_be_read_as_a_tooltip(shown: Shown) -> None:
    long = "a comment that is too long for its column " * 5
    rows = (row("web"), row("cut", comment=long), row("noted", note="It is not in force yet."))
    shown.list.show((group("work", *rows),))
    until(lambda: all(column.get_width() for column in shown.view.get_columns() if column.get_visible()))

    def tooltip(place: int) -> bool:
        area = shown.view.get_cell_area(Gtk.TreePath.new_from_indices([0, place]), None)
        x, y = shown.view.convert_bin_window_to_widget_coords(10, area.y + 2)
        return shown.view.emit("query-tooltip", x, y, False, Gtk.Tooltip())

    assert [tooltip(place) for place in range(3)] == [False, True, True]
