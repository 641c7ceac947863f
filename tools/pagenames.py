# SPDX-License-Identifier: GPL-2.0-or-later
"""By which names man(1) finds a manual page, from its file in docs/ alone."""

import re
from pathlib import Path

# What a user's desktop has in its menu and its panel.
IN_A_DESKTOP = ("qubes-forward-manager", "qubes-forward-indicator")
_NAME_SECTION = re.compile(r"^NAME\n=+\n", re.MULTILINE)


def section_of(name: str) -> int:
    """Programs for users are in section 1, a form of data in 7; daemons, and what they call, in section 8."""
    if name.endswith("-json"):
        return 7
    return 1 if name.startswith("qvm-") or name in IN_A_DESKTOP else 8


def other_names(source: Path) -> list[str]:
    """The further names of a page, as in "NAME, OTHER - what they are": man(1) is to find it by them too."""
    section = _NAME_SECTION.search(source.read_text())
    names = source.read_text()[section.end() :].strip().partition(" - ")[0] if section else ""
    return [name for name in (word.strip() for word in names.split(",")) if name not in ("", source.stem)]
