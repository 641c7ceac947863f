#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A manual page from its reStructuredText, as `python3 tools/manpage.py docs/NAME.rst`.

The pages use the roles and directives for programs and options that Sphinx has, as those of Qubes' own tools do.
Docutils alone, which is far smaller, makes the page when it is told what few of them mean.
"""

import re
import sys
from pathlib import Path
from typing import ClassVar

from docutils import nodes
from docutils.core import publish_string
from docutils.parsers.rst import Directive, directives, roles
from docutils.statemachine import StringList
from pagenames import NAME_SECTION, section_of

_TITLE = re.compile(r"^(=+)\n(.*)\n=+\n", re.MULTILINE)
_MADE_NAME = re.compile(r"^\.SH NAME\n.*\n", re.MULTILINE | re.IGNORECASE)
_ROLE = re.compile(r":[a-z]+:`([^`]*)`")
# What these roles stand for in a page: bold for what is typed as it is, italics for a name of something else.
_ROLES = {"program": nodes.strong, "command": nodes.strong, "option": nodes.strong, "file": nodes.emphasis}


class _Program(Directive):
    """Says which program the options that follow are of; the page says it by its name."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        return []


class _Option(Directive):
    """An option and what it means."""

    required_arguments = 1
    final_argument_whitespace = True
    has_content = True
    option_spec: ClassVar[dict[str, object]] = {}

    def run(self) -> list[nodes.Node]:
        term = nodes.term("", "", nodes.strong("", self.arguments[0]))
        definition = nodes.definition()
        self.state.nested_parse(StringList(self.content), self.content_offset, definition)
        return [nodes.definition_list("", nodes.definition_list_item("", term, definition))]


def _man_reference(name, rawtext, text, lineno, inliner, options=None, content=None):  # type: ignore[no-untyped-def]
    return [nodes.strong("", text)], []


def man_page(source: Path) -> str:
    """The page for man(1). Raises `SystemExit` with docutils' own message where the text is wrong."""
    directives.register_directive("program", _Program)
    directives.register_directive("option", _Option)
    for role, node in _ROLES.items():
        roles.register_generic_role(role, node)
    roles.register_local_role("manpage", _man_reference)
    page: str = publish_string(
        _headed(source.stem, source.read_text()),
        source_path=str(source),
        writer_name="manpage",
        settings_overrides={"report_level": 2, "halt_level": 2, "output_encoding": "unicode"},
    )
    # The writer makes a section of its own from name and summary, which may be in the text as it is.
    return page if NAME_SECTION.search(source.read_text()) is None else _MADE_NAME.sub("", page, count=1)


def _headed(name: str, text: str) -> str:
    """The text with a head from which the writer takes name, section and summary."""
    title = _TITLE.search(text)
    if not title:
        raise SystemExit(f"{name}: no title between two lines of =")
    _, _, summary = _ROLE.sub(r"\1", title[2]).partition(" -- ")
    bar = "#" * 200
    head = f"{bar}\n{name}\n{bar}\n\n"
    if summary:
        bar = "~" * 200
        head += f"{bar}\n{summary}\n{bar}\n\n"
    head += f":Manual section: {section_of(name)}\n:Manual group: Qubes\n\n"
    return head + text[: title.start()] + text[title.end() :]


if __name__ == "__main__":
    print(man_page(Path(sys.argv[1])), end="")
