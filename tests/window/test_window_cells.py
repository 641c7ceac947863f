# SPDX-License-Identifier: GPL-2.0-or-later
"""What the list shows of a rule and of a group."""

import pytest
import screen  # noqa: F401  # before GTK
from listed import group, row

from qubes_fwd_qrexec.admin.states import State
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.window import style
from qubes_fwd_qrexec.window.cells import SIGNS, Cells, icon, of_group, of_row
from qubes_fwd_qrexec.window.gtk import GdkPixbuf, Gio, Pango
from qubes_fwd_qrexec.window.kept import LINE_MAX
from qubes_fwd_qrexec.window.model.rows import ENDED, Row

COLOURS = {"open": "#0a0", "bad": "#a00", "note": "#aa0", "faint": "#777"}


def of(shown: Row, group: str = "work") -> Cells:
    return of_row(shown, QubeName(group), COLOURS)


@pytest.mark.parametrize("state", State)
def test_each_state_has_a_sign_and_one_of_the_colours(state: State) -> None:
    cells = of(row("web", state=state, mark="WORD"))
    sign, colour = SIGNS[state]
    assert cells.state == f"{sign} WORD"
    assert cells.state_foreground == COLOURS[colour]


def test_states_that_want_something_else_of_the_user_have_other_signs() -> None:
    signs = [SIGNS[state][0] for state in State if state is not State.BROKEN]
    assert len({*signs}) == len(signs)


def test_what_anybody_can_reach_stands_out_while_it_is_open() -> None:
    cells = of(row("web", is_anybody=True))
    assert (cells.who_foreground, cells.who_weight) == ("#a00", Pango.Weight.BOLD)
    cells = of(row("web", is_anybody=True, is_live=False))
    assert (cells.who_foreground, cells.who_weight) == (None, Pango.Weight.NORMAL)
    assert of(row("web")).who_foreground is None


def test_what_is_open_is_bold() -> None:
    assert of(row("web")).state_weight == Pango.Weight.BOLD
    assert of(row("web", is_live=False)).state_weight == Pango.Weight.NORMAL


def test_all_of_a_row_can_be_had_in_one_line() -> None:
    cells = of(row("web", comment="<b>", note="It is not in force yet."))
    assert cells.text == (
        "● OPEN  192.168.0.0/16  sys-net:80  8080  mux  in 7 h  <b>  It is not in force yet."
    )


def test_of_thousands_of_networks_and_of_a_whole_page_of_comment_the_beginning_is_laid_out() -> None:
    cells = of(row("web", who="10.0.0.0/16, " * 5000, comment="word " * 5000))
    assert len(cells.text) < 2 * LINE_MAX + 200
    assert cells.who.endswith("...")
    assert cells.comment.endswith("word...")


def test_where_a_rule_goes_to_is_named_where_the_group_does_not() -> None:
    assert of(row("web", to="work:8080 udp")).to == "8080 udp"
    assert of(row("web", to="work:8080"), "").to == "work:8080"


def test_a_rule_that_cannot_be_read_is_told_by_its_name() -> None:
    cells = of(row("odd\x1b", state=State.BROKEN, who=""))
    assert cells.who == "odd\\x1b (unreadable)"


def test_a_group_is_its_qube_with_its_way_out() -> None:
    cells = of_group(group("work"), COLOURS)
    assert (cells.item, cells.text, cells.who_foreground) == ("work", "work  via sys-net", "#777")
    assert cells.icon is icon("no-such-icon", "blue")
    assert of_group(group("vault", netvms=""), COLOURS).who == "no netvm"


def test_ended_rules_are_counted() -> None:
    assert of_group(group(ENDED, row("a"), row("b")), COLOURS).text == "2 ended"


@pytest.mark.parametrize("label", style.LABELS)
def test_a_label_is_a_box_in_its_colour_where_its_icon_is_not_installed(label: str) -> None:
    box = icon("no-such-icon", label)
    assert isinstance(box, GdkPixbuf.Pixbuf)
    pixels, edge = box.get_pixels(), 3 * box.get_width()
    assert pixels[:edge] == b"\x88\x88\x88" * box.get_width()
    assert pixels[edge + 3 : edge + 6] == bytes.fromhex(style.LABELS[label][1:])


def test_an_icon_of_the_theme_is_taken_and_an_unknown_label_has_none() -> None:
    found = icon("dialog-warning", "blue")
    assert isinstance(found, Gio.ThemedIcon)
    assert found.get_names()[0] == "dialog-warning"
    assert icon("no-such-icon", "") is None
