# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/numbers.md and its pictures are what the runs in docs/numbers make."""

import re

import pytest

from bench.page import PAGE, PLACE, made, pictures
from bench.peers import PEERS
from bench.rows import ROWS
from bench.runs import RUNS


def test_the_page_is_what_the_runs_make() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert made(text) == text, "make numbers brings it up to date"


@pytest.mark.parametrize("name", ["growth.svg", "payload.svg", "processor.svg", "streams.svg"])
def test_each_picture_is_what_the_runs_make_and_is_shown(name: str) -> None:
    assert (PLACE / name).read_text(encoding="utf-8") == pictures()[name], "make numbers draws it"
    assert f"(numbers/{name})" in PAGE.read_text(encoding="utf-8")


def test_each_run_that_is_kept_can_be_made_again() -> None:
    assert {path.stem for path in PLACE.glob("*.json")} == {*RUNS, "before", "since"}


def test_each_run_names_rows_and_peers_that_there_are() -> None:
    for words in map(str.split, RUNS.values()):
        for option, known in (("--rows", set(ROWS)), ("--peers", {peer.name for peer in PEERS})):
            if option in words:
                assert set(words[words.index(option) + 1].split(",")) <= known


def test_what_is_written_by_hand_stays() -> None:
    text = "# By hand\n\n<!-- made: held held -->\nold\n<!-- end -->\n\nBelow.\n"
    found = made(text)
    assert found.startswith("# By hand\n\n<!-- made: held held -->\n\n| ")
    assert found.endswith(" |\n\n<!-- end -->\n\nBelow.\n") or "\nHeld: " in found
    assert "old" not in found
    assert made(found) == found


def test_what_cannot_be_made_is_refused_with_what_can() -> None:
    with pytest.raises(ValueError, match=re.escape("'tabel' is not made; there are table, ")):
        made("<!-- made: tabel connect -->\n<!-- end -->")
