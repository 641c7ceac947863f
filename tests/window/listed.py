# SPDX-License-Identifier: GPL-2.0-or-later
"""Groups of rules as values, for tests of what shows them."""

from typing import Any

from qubes_fwd_qrexec.admin.states import State
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.window.model.rows import Group, Row


def row(name: str, target: str = "work", **more: Any) -> Row:
    """An open rule, unless ``more`` says otherwise."""
    usual = {
        "key": (QubeName(target), name),
        "state": State.ACTIVE,
        "mark": "OPEN",
        "who": "192.168.0.0/16",
        "at": "sys-net:80",
        "mode": "mux",
        "to": "8080",
        "ends": "in 7 h",
        "comment": "",
        "role": "",
        "is_anybody": False,
        "is_live": True,
    }
    return Row(**{**usual, **more})


def group(target: str, *rows: Row, **more: Any) -> Group:
    usual = {"label": "blue", "icon": "no-such-icon", "netvms": "sys-net"}
    return Group(QubeName(target), rows=rows, **{**usual, **more})


def system(targets: int, rules: int) -> tuple[Group, ...]:
    """As many targets, each with as many rules."""
    return tuple(
        group(f"q{number}", *(row(f"r{each}", f"q{number}") for each in range(rules)))
        for number in range(targets)
    )
