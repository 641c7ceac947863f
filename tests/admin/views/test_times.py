# SPDX-License-Identifier: GPL-2.0-or-later
"""Times in and out."""

import time
from datetime import datetime

import pytest
from worlds import NOW

from qubes_fwd_qrexec.admin.views.times import distance, parse_expire, print_expire, print_time
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
        ("8h", NOW + 8 * 3600),
        ("+1h30m", NOW + 5400),
        ("1w2d3h4m5s", NOW + 9 * 86400 + 3 * 3600 + 245),
        ("2m5", NOW + 125),
        ("1893456000", 1893456000),
        ("2030-01-01T00:00:00+00:00", 1893456000),
        ("2030-01-01T01:00:00+01:00", 1893456000),
        ("2030-01-01T00:00:00Z", 1893456000),
    ],
)
def test_times_are_read(text: str, expire: int | None) -> None:
    assert parse_expire(text, NOW + 0.9) == expire


def test_a_time_without_zone_is_local() -> None:
    for text in ("2030-06-01T18:00", "2030-06-01 18:00"):
        expire = parse_expire(text, NOW)
        assert print_expire(expire, NOW).startswith(f"2030-06-01 18:00 {_zone(2030, 6, 1, 18)} (in ")
    assert parse_expire("2030-06-01", NOW) == datetime(2030, 6, 1).timestamp()


def _zone(*moment: int) -> str:
    return time.strftime("%Z", time.localtime(datetime(*moment).timestamp()))  # type: ignore[arg-type]


def test_a_clock_s_time_is_the_next_one() -> None:
    noon = datetime(2030, 6, 1, 12).timestamp()
    moments = {
        "12:01": datetime(2030, 6, 1, 12, 1),
        "18:00": datetime(2030, 6, 1, 18),
        "12:00": datetime(2030, 6, 2, 12),
        "8:00": datetime(2030, 6, 2, 8),
        "today 8:00": datetime(2030, 6, 1, 8),
        "tomorrow 18:30": datetime(2030, 6, 2, 18, 30),
        "tomorrow": datetime(2030, 6, 2),
    }
    for text, moment in moments.items():
        assert parse_expire(text, noon + 0.5) == moment.timestamp(), text


def test_a_day_is_a_day_where_a_clock_is_put_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        before = datetime(2030, 3, 30, 9).timestamp()
        assert parse_expire("tomorrow 9:00", before) == before + 23 * 3600
        assert print_time(before) == "2030-03-30 09:00 CET"
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    "text",
    [
        *("", "soon", "+", "+8y", "+30m8h", "-5", "+1.5h", "99999999999999", "2030-13-01", "0", "\u0663"),
        *("24:00", "8:5", "8:60", "tomorrow soon", "yesterday 8:00", "18:00 tomorrow"),
    ],
)
def test_what_is_no_time_says_what_would_be(text: str) -> None:
    with pytest.raises(TextError, match=r"such as 8h, 1h30m, 2d, 18:00, tomorrow 8:00|whole number"):
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
