# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows in the width that there is: cut in their order, coloured without being moved, or as blocks."""

from qubes_fwd_qrexec.admin.states import State
from qubes_fwd_qrexec.admin.views.tables import Colour, Style, Table

ROWS = [("work", "web", "active", "x" * 30, "y" * 30), ("a", "b", "refused", "?", "")]
TABLE = Table(
    ("QUBE", "NAME", "STATE", "FROM", "COMMENT"), ROWS, [State.ACTIVE, State.REFUSED], ("COMMENT", "FROM")
)


def test_without_a_terminal_nothing_is_cut() -> None:
    assert TABLE.text(Style()) == (
        "QUBE  NAME  STATE    FROM                            COMMENT\n"
        f"work  web   active   {'x' * 30}  {'y' * 30}\n"
        "a     b     refused  ?\n"
    )


def test_cells_give_way_in_their_order_and_to_a_limit() -> None:
    assert f"  {'x' * 30}  {'y' * 22}...\n" in (TABLE.text(Style(78)) or "")
    assert f"  {'x' * 24}...  {'y' * 9}...\n" in (TABLE.text(Style(62)) or "")
    narrowest = TABLE.text(Style(47))
    assert narrowest is not None
    assert max(map(len, narrowest.splitlines())) == 47
    assert TABLE.text(Style(46)) is None


def test_colours_move_nothing() -> None:
    plain, coloured = TABLE.text(Style(60)), TABLE.text(Style(60, True))
    assert plain is not None
    assert coloured is not None
    assert "\x1b[31mrefused\x1b[0m" in coloured
    for code in Colour:
        coloured = coloured.replace(f"\x1b[{code}m", "")
    assert coloured.replace("\x1b[0m", "") == plain


def test_blocks_leave_out_what_is_empty() -> None:
    assert TABLE.blocks(Style(10)) == (
        f"work web: active\n  from {'x' * 30}\n  comment {'y' * 30}\n\na b: refused\n"
    )
