# SPDX-License-Identifier: GPL-2.0-or-later
"""Rows in the width that there is: cut in their order, coloured without being moved, or as blocks."""

import re

from qubes_fwd_qrexec.admin.views.tables import Check, Style, Table, checks

ROWS = [("work", "web", "active", "x" * 30, "y" * 30), ("a", "b", "refused", "?", "")]
TABLE = Table(
    ("QUBE", "NAME", "STATE", "FROM", "COMMENT"),
    ROWS,
    {"COMMENT": 12, "FROM": 12},
)


def test_without_a_terminal_nothing_is_cut() -> None:
    assert TABLE.text(Style()) == (
        "QUBE  NAME  STATE    FROM                            COMMENT\n"
        f"work  web   active   {'x' * 30}  {'y' * 30}\n"
        "a     b     refused  ?\n"
    )


def test_cells_give_way_in_their_order_and_to_a_limit() -> None:
    assert f"  {'x' * 30}  {'y' * 22}...\n" in TABLE.text(Style(78))
    assert f"  {'x' * 24}...  {'y' * 9}...\n" in TABLE.text(Style(62))
    assert max(map(len, TABLE.text(Style(47)).splitlines())) == 47
    assert TABLE.text(Style(46)) == BLOCKS


def test_colours_move_nothing() -> None:
    coloured = TABLE.text(Style(60, True))
    assert "\x1b[31mrefused\x1b[0m" in coloured
    assert _without_colours(coloured) == TABLE.text(Style(60))


def _without_colours(text: str) -> str:
    return re.sub(r"\x1b\[[0-9]+m", "", text)


BLOCKS = f"""\
work web: active
  from {"x" * 30}
  comment {"y" * 30}

a b: refused
"""
CHECKS = (
    Check("sources", "ok", "10.0.0.0/8 may connect, nobody else"),
    Check("path", "stops", "work - sys-firewall - sys-net now, but you agreed to work - sys-vpn"),
)


def test_checks_stand_below_each_other() -> None:
    assert checks(CHECKS, Style(58)) == (
        "ok     sources  10.0.0.0/8 may connect, nobody else\n"
        "stops  path     work - sys-firewall - sys-net now, but you\n"
        "                agreed to work - sys-vpn\n"
    )
    assert checks(CHECKS, Style()).count("\n") == 2


def test_verdicts_have_colours_where_a_terminal_is() -> None:
    coloured = checks(CHECKS, Style(58, True))
    assert coloured.startswith("\x1b[32mok   \x1b[0m  sources  10.0.0.0/8")
    assert _without_colours(coloured) == checks(CHECKS, Style(58))
