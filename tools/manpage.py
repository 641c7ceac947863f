#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The page for man(1) from its text, as `python3 tools/manpage.py docs/NAME.rst`."""

import re
import sys
from pathlib import Path

from docutils.core import publish_string
from docutils.utils import SystemMessage
from docutils.writers.manpage import Writer
from pagenames import section_of

_TITLE = re.compile(r"^(=+)\n(.*)\n\1\n", re.MULTILINE)
# The writer makes this section from title and summary, and the text has one of its own.
_MADE_NAME = re.compile(r"^\.SH NAME\n.*\n", re.MULTILINE | re.IGNORECASE)
# docutils' levels: 2 is a warning.
_WARNING = 2


def man_page(source: Path) -> str:
    """Raises `SystemExit` with docutils' message where the text is wrong."""
    name = source.stem
    text, count = _TITLE.subn(
        lambda title: f"{title[0]}\n:Manual section: {section_of(name)}\n:Manual group: Qubes\n",
        source.read_text(),
        count=1,
    )
    if not count:
        raise SystemExit(f"{source}: no title between two lines of =")
    try:
        page: str = publish_string(
            text,
            source_path=str(source),
            writer=Writer(),
            settings_overrides={
                "report_level": _WARNING,
                "halt_level": _WARNING,
                "output_encoding": "unicode",
            },
        )
    except SystemMessage as error:
        raise SystemExit(str(error)) from None
    return _MADE_NAME.sub("", page, count=1)


if __name__ == "__main__":
    print(man_page(Path(sys.argv[1])), end="")
