# SPDX-License-Identifier: GPL-2.0-or-later
"""The tests' clocks: what passes in parts is the whole, whatever time it was when the test began."""

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st
from loop_time import exact_s

SECONDS = st.floats(min_value=0, max_value=1e6)


@given(SECONDS, st.lists(SECONDS, max_size=5))
def test_parts_of_a_time_add_up_exactly(start: float, parts: list[float]) -> None:
    now = begin = exact_s(start)
    for part in parts:
        now += exact_s(part)
    assert Fraction(now) == Fraction(begin) + sum(Fraction(exact_s(part)) for part in parts)


@given(SECONDS)
def test_no_time_is_cut_short_and_none_is_a_millionth_longer(seconds: float) -> None:
    assert 0 <= Fraction(exact_s(seconds)) - Fraction(seconds) < Fraction(1, 10**6)


@given(SECONDS)
def test_what_is_due_after_300_seconds_is_due_after_299_9_and_0_1(start: float) -> None:
    begin = exact_s(start)
    nearly = begin + exact_s(299.9)
    assert nearly < begin + 300 <= nearly + exact_s(0.1)
