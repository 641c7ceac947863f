# SPDX-License-Identifier: GPL-2.0-or-later
"""Times in and out."""

import pytest
from worlds import NOW

from qubes_fwd_qrexec.admin.views.times import distance, parse_expire, print_expire
from qubes_fwd_qrexec.common.errors import TextError


@pytest.mark.parametrize(
    ("text", "expire"),
    [
        ("never", None),
        ("+300", NOW + 300),
        ("+45s", NOW + 45),
        ("+30m", NOW + 1800),
        ("+8h", NOW + 8 * 3600),
        ("+2d", NOW + 2 * 86400),
        ("+1w", NOW + 7 * 86400),
        ("1893456000", 1893456000),
        ("2030-01-01T00:00:00+00:00", 1893456000),
        ("2030-01-01T01:00:00+01:00", 1893456000),
        ("2030-01-01T00:00:00Z", 1893456000),
    ],
)
def test_times_are_read(text: str, expire: int | None) -> None:
    assert parse_expire(text, NOW + 0.9) == expire


def test_a_time_without_zone_is_local() -> None:
    expire = parse_expire("2030-06-01T18:00", NOW)
    assert print_expire(expire, NOW).startswith("2030-06-01 18:00 (in ")


@pytest.mark.parametrize(
    "text",
    ["", "soon", "+", "+8y", "+8h30m", "-5", "8h", "+1.5h", "99999999999999", "2030-13-01", "0", "\u0663"],
)
def test_what_is_no_time_says_what_would_be(text: str) -> None:
    with pytest.raises(TextError, match=r"\+8h, \+30m, \+2d, \+300 \(seconds\)|whole number"):
        parse_expire(text, NOW)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (5, "in 5 s"),
        (90, "in 2 min"),
        (3600, "in 60 min"),
        (7200, "in 2 h"),
        (8 * 3600 - 1, "in 8 h"),
        (3 * 86400, "in 3 d"),
        (-7200, "2 h ago"),
        (0, "0 s ago"),
    ],
)
def test_distances_are_rounded_to_what_matters(seconds: int, words: str) -> None:
    assert distance(seconds) == words


def test_never_and_impossible_times_are_shown_too() -> None:
    assert print_expire(None, NOW) == "never"
