# SPDX-License-Identifier: GPL-2.0-or-later
"""Every manual page is one for man(1), without a warning of docutils."""

import re
from pathlib import Path

import pytest
from docutils.core import publish_string
from docutils.writers.manpage import Writer

from qubes_fwd_qrexec.admin.views import parser

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.rst"))
# docutils' levels: 1 is an info, such as a role or a directive that it does not know.
INFO = 1


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_docutils_has_nothing_to_say(path: Path) -> None:
    settings = {"report_level": INFO, "halt_level": INFO, "output_encoding": "unicode"}
    page = publish_string(
        path.read_text(), source_path=str(path), writer=Writer(), settings_overrides=settings
    )
    assert f"{path.stem} " in page


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_says_its_name_and_a_summary_as_mandb_reads_it(path: Path) -> None:
    (line,) = re.findall(r"^NAME\n====\n\n(.*)\n\n", path.read_text(), re.MULTILINE)
    assert re.fullmatch(rf"{re.escape(path.stem)}(, [\w.-]+)* - [a-z].*", line)


@pytest.mark.parametrize("command", parser.COMMANDS)
def test_each_option_of_a_command_is_in_its_page(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """``set`` refers to the page of ``add``, and each page to the general options in qvm-forward(1)."""
    with pytest.raises(SystemExit):
        parser.parse([command, "--help"])
    text = capsys.readouterr().out
    (page,) = re.findall(r"^(qvm-forward-[a-z]+)\(1\) says more", text, re.MULTILINE)
    pages = {"qvm-forward", page, "qvm-forward-add" if command == "set" else page}
    said = "".join(path.read_text() for path in PAGES if path.stem in pages)
    options = re.findall(r"^  (?:-\w, )?(--[a-z-]+)", text, re.MULTILINE)
    assert {option for option in options if option not in said} == set()
    assert "--lab" in options
