# SPDX-License-Identifier: GPL-2.0-or-later
"""The guide shows what the commands print, and its chapters are whole."""

import re
from pathlib import Path

import guide
import pytest

from qubes_fwd_qrexec.admin.views import cli

CHAPTERS = guide.chapters()
ALL = [*CHAPTERS, guide.GUIDE / "README.md"]
SECTIONS = ("## How to check", "## How to undo it", "## What can go wrong")


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_command_prints_what_the_chapter_shows(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    assert guide.play(text, tmp_path) == text, "if this is right, 'make guide' writes it into the chapter"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_chapter_says_how_to_check_to_undo_and_what_can_go_wrong(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert [line for line in lines if line in SECTIONS] == list(SECTIONS)


def test_every_chapter_is_in_the_table_of_contents_by_its_title() -> None:
    listed = re.findall(r"^\d+\. \[(.*)\]\((.*)\)$", (guide.GUIDE / "README.md").read_text(), re.MULTILINE)
    titles = {path.name: path.read_text().splitlines()[0].removeprefix("# ") for path in CHAPTERS}
    assert {name: title for title, name in listed} == titles


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_link_leads_to_a_file(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).is_file(), target


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_command_in_a_sentence_is_one_that_there_is(path: Path) -> None:
    for command in re.findall(r"`qvm-forward ([a-z]+)", path.read_text()):
        assert command in cli.parser.COMMANDS


CHAPTER = """\
{before}

```console
$ {command}
{output}```
"""


def played(tmp_path: Path, command: str, *, before: str = "Type this:", output: str = "") -> str:
    return guide.play(CHAPTER.format(before=before, command=command, output=output), tmp_path)


def test_what_is_shown_and_is_not_printed_is_found(tmp_path: Path) -> None:
    text = CHAPTER.format(before="This:", command="qvm-forward list", output="No forwards at all.\n")
    assert guide.play(text, tmp_path) == text.replace("No forwards at all.", "No forwards.")


def test_a_command_that_fails_is_found_unless_it_is_said_to_be_refused(tmp_path: Path) -> None:
    command = "qvm-forward add vault 80 --from any"
    with pytest.raises(guide.GuideError, match=r"line 3: .* fails: .*vault tcp-80 was not added"):
        played(tmp_path, command)
    (tmp_path / "again").mkdir()
    text = played(tmp_path / "again", command, before="This is refused:")
    assert "vault tcp-80 was not added" in text


def test_a_command_that_nobody_knows_is_found(tmp_path: Path) -> None:
    with pytest.raises(guide.GuideError, match="not known: qvm-firewall work"):
        played(tmp_path, "qvm-firewall work")


def test_a_change_that_watch_says_nothing_of_is_found(tmp_path: Path) -> None:
    text = CHAPTER.format(before="", command="qvm-forward watch", output="")
    text += CHAPTER.format(before="", command="qvm-prefs work netvm sys-vpn", output="")
    with pytest.raises(guide.GuideError, match="what does watch say then"):
        guide.play(text, tmp_path)
