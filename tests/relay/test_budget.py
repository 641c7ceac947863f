# SPDX-License-Identifier: GPL-2.0-or-later
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_fwd_qrexec import mux
from qubes_fwd_qrexec.relay.budget import (
    BUDGET_BYTES,
    FLOOR_BYTES,
    INITIAL_BYTES,
    STREAMS_MAX,
    WINDOW_MAX_BYTES,
    Budget,
    Share,
)


def test_the_process_bound_is_what_it_says() -> None:
    assert Budget().total == BUDGET_BYTES == 64 << 20
    assert STREAMS_MAX * FLOOR_BYTES == BUDGET_BYTES // 2


def test_floors_that_do_not_fit_are_no_budget() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Budget(FLOOR_BYTES * 3 - 1, 3)


def test_every_stream_up_to_the_last_has_its_floor_and_the_next_is_not_admitted() -> None:
    budget = Budget(100 * FLOOR_BYTES, 50)
    share = Share(budget)
    windows = [share.admit() for _ in range(50)]
    assert min(windows) >= FLOOR_BYTES
    assert max(windows) <= INITIAL_BYTES
    assert sum(windows) <= budget.total
    assert share.admit() == 0
    assert budget.streams == 50
    share.leave(windows.pop())
    assert share.admit() >= FLOOR_BYTES


def test_it_is_short_when_half_is_lent_and_the_first_may_have_the_largest_window() -> None:
    budget = Budget()
    share = Share(budget)
    lent = 0
    while not share.is_short:
        taken = share.take(budget.total, FLOOR_BYTES)
        assert taken > WINDOW_MAX_BYTES // 3
        lent += taken
        assert lent > taken or taken == WINDOW_MAX_BYTES - FLOOR_BYTES
    assert lent == pytest.approx(BUDGET_BYTES // 4, abs=WINDOW_MAX_BYTES)
    share.give_back(lent)
    assert not share.is_short


def test_no_stream_gets_more_than_the_largest_window() -> None:
    share = Share(Budget())
    assert share.take(WINDOW_MAX_BYTES, WINDOW_MAX_BYTES - 1000) == 1000
    assert share.take(WINDOW_MAX_BYTES, WINDOW_MAX_BYTES) == 0
    assert share.take(1000, FLOOR_BYTES) == 1000


def test_there_is_something_left_for_the_next_however_much_is_lent() -> None:
    share = Share(Budget())
    for _ in range(150):
        window = FLOOR_BYTES
        while taken := share.take(window, window):
            window += taken
    assert share.window_max >= 2 * INITIAL_BYTES


def test_one_mux_call_leaves_an_eighth_to_the_others_however_it_takes() -> None:
    budget = Budget()
    greedy, other = Share(budget), Share(budget)
    while greedy.take(budget.total, FLOOR_BYTES):
        pass
    assert budget.shared_left >= BUDGET_BYTES // 2 // 8
    assert other.window_max >= INITIAL_BYTES
    assert greedy.window_max == FLOOR_BYTES
    greedy.give_back(greedy.lent)
    assert other.window_max == WINDOW_MAX_BYTES


@given(st.lists(st.tuples(st.sampled_from(("admit", "leave", "take", "give")), st.integers(0, 1 << 20))))
def test_windows_and_what_is_left_are_the_total_whatever_happens(steps: list[tuple[str, int]]) -> None:
    budget = Budget(1 << 20, 100)
    shares = Share(budget), Share(budget)
    windows: list[tuple[Share, int]] = []
    for what, number in steps:
        if what == "admit" and (window := shares[number % 2].admit()):
            windows.append((shares[number % 2], window))
        elif not windows:
            continue
        elif what == "leave":
            share, window = windows.pop(number % len(windows))
            share.leave(window)
        elif what == "take":
            share, window = windows.pop(number % len(windows))
            windows.append((share, window + share.take(number, window)))
        elif what == "give":
            share, window = windows.pop()
            some = min(number, window - FLOOR_BYTES)
            share.give_back(some)
            windows.append((share, window - some))
        floors_left = (budget.streams_max - budget.streams) * FLOOR_BYTES
        assert sum(window for _, window in windows) + budget.shared_left + floors_left == budget.total
        assert budget.shared_left >= 0
        assert budget.streams == len(windows)
        for share in shares:
            assert share.lent == sum(window - FLOOR_BYTES for owner, window in windows if owner is share)
    for share, window in windows:
        share.leave(window)
    assert (budget.streams, budget.shared_left) == (0, Budget(1 << 20, 100).shared_left)


def test_the_specification_of_the_protocol_says_the_same_numbers() -> None:
    text = (Path(mux.__file__).parent / "SPEC.md").read_text(encoding="utf-8")
    budget = Budget()
    share = Share(budget)
    budget.shared_left = BUDGET_BYTES // 8
    assert share.window_max == budget.shared_left // 100
    assert "No window is larger than a hundredth of what is left in the pool." in text
    assert "at most seven times what is left in the pool" in text
    assert not Share(Budget()).is_short
    assert "less than half is left" in text
