# SPDX-License-Identifier: GPL-2.0-or-later
"""The line form: split, read, and the places of errors."""

from enum import StrEnum

import pytest

from qubes_fwd_qrexec.common.errors import RuleError, TextError
from qubes_fwd_qrexec.common.options import Form, Option, one_of, read, split
from qubes_fwd_qrexec.common.values import parse_number


def test_options_are_split_at_single_spaces_and_the_comment_takes_the_rest() -> None:
    assert [(o.name, o.value) for o in split("a=1 b= comment=x y=z  ")] == [
        ("a", "1"),
        ("b", ""),
        ("comment", "x y=z  "),
    ]
    assert list(split("")) == []


def test_places_count_from_the_beginning_of_the_line() -> None:
    assert [o.place for o in split("work web a=1 bb=2", 9)] == [
        "option 'a' at column 10",
        "option 'bb' at column 14",
    ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("a=1  b=2", "'' at column 5: two spaces in a row"),
        (" a=1", "'' at column 1: two spaces in a row"),
        ("a=1 b", "'b' at column 5: an option is written name=value"),
        ("a=1 ", "column 4: a space at the end of the line"),
    ],
)
def test_a_line_that_is_no_row_of_options(line: str, words: str) -> None:
    with pytest.raises(RuleError) as error:
        list(split(line))
    assert str(error.value) == words


def joined(one: int, other: int) -> int:
    if one == other:
        raise TextError(str(other), "another number")
    return one + other


FORMS = {
    "n": Form("number", parse_number),
    "m": Form("number", parse_number),
    "p": Form("sum", parse_number, merge=joined),
    "q": Form("sum", parse_number, merge=joined),
}


def test_options_that_share_a_field_are_merged_if_they_may() -> None:
    assert read(split("p=1 q=2 n=3"), FORMS) == {"sum": 3, "number": 3}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("x=1", "option 'x' at column 1: unknown option; known are n, m, p, q"),
        ("n=x", "option 'n' at column 1: 'x' is not a whole number"),
        ("n=1 n=2", "option 'n' at column 5: repeats option 'n' at column 1"),
        ("n=1 m=2", "option 'm' at column 5: repeats option 'n' at column 1"),
        ("p=1 p=2", "option 'p' at column 5: repeats option 'p' at column 1"),
        ("p=1 q=1", "option 'q' at column 5: '1' is not another number"),
    ],
)
def test_unknown_wrong_and_double_options_are_named_with_their_place(line: str, words: str) -> None:
    with pytest.raises(RuleError) as error:
        read(split(line), FORMS)
    assert str(error.value) == words


def test_one_of_lists_what_would_be_right() -> None:
    class Colour(StrEnum):
        RED = "red"
        BLUE = "blue"

    assert one_of(Colour)("red") is Colour.RED
    with pytest.raises(TextError, match="'green' is not one of red, blue"):
        one_of(Colour)("green")


def test_an_option_is_a_plain_value() -> None:
    assert Option("a", "1", "here") == ("a", "1", "here")
