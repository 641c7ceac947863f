# SPDX-License-Identifier: GPL-2.0-or-later
"""What reads and works windows for the stories does so, by AT-SPI and by the keyboard."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from desktop import Desktop
from stories import PLAYED, Show

if TYPE_CHECKING:
    from reader import Reader

SMALL = str(Path(__file__).with_name("smallprogram.py"))


@pytest.fixture
def small(reader: "Reader", show: Show) -> "Reader":
    show([SMALL], {"PYTHONPATH": str(PLAYED)})
    reader.reads("nothing yet", "Small")
    return reader


def test_fields_lists_rows_and_buttons_are_found_by_their_names(small: "Reader") -> None:
    small.write("Your name", "Ada")
    small.choose("I agree")
    small.pick("Greeting", "Good day")
    small.select("second")
    small.press("Greet")
    assert small.reads("Good day").name == "Good day <b>Ada</b>, True, second"


def test_what_is_typed_goes_where_the_focus_is(small: "Reader", desktop: Desktop) -> None:
    small.enter("Small")
    small.tab_to("Your name")
    desktop.type("Ada B. 80:8080")
    desktop.key("alt+g")
    assert small.reads("<b>Ada").name == "Hello <b>Ada B. 80:8080</b>, False, none"


def test_a_control_without_a_name_is_found(small: "Reader") -> None:
    assert [(seen.role, seen.window) for seen in small.nameless()] == [
        ("text", "Small"),
        ("combo box", "Small"),
    ]
