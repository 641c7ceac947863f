# SPDX-License-Identifier: GPL-2.0-or-later
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_fwd_qrexec.budget import BUDGET_BYTES, FLOOR_BYTES, INITIAL_BYTES, STREAMS_MAX, Budget


def test_the_process_bound_is_what_it_says() -> None:
    assert Budget().total == BUDGET_BYTES == 64 << 20
    assert STREAMS_MAX * FLOOR_BYTES == BUDGET_BYTES // 2


def test_floors_that_do_not_fit_are_no_budget() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Budget(FLOOR_BYTES * 3 - 1, 3)


def test_every_stream_up_to_the_last_has_its_floor_and_the_next_is_not_admitted() -> None:
    budget = Budget(100 * FLOOR_BYTES, 50)
    windows = [budget.admit() for _ in range(50)]
    assert min(windows) >= FLOOR_BYTES
    assert max(windows) <= INITIAL_BYTES
    assert sum(windows) <= budget.total
    assert budget.admit() == 0
    assert budget.streams == 50
    budget.leave(windows.pop())
    assert budget.admit() >= FLOOR_BYTES


def test_nobody_takes_all() -> None:
    budget = Budget()
    left = budget.shared_left
    assert budget.take(budget.total) == left // 8
    assert budget.take(1000) == 1000


def test_little_left_is_tight_until_it_is_given_back() -> None:
    budget = Budget()
    taken = []
    assert not budget.is_tight
    while not budget.is_tight:
        taken.append(budget.take(budget.total))
    budget.give_back(sum(taken))
    assert not budget.is_tight


@given(st.lists(st.tuples(st.sampled_from(("admit", "leave", "take", "give")), st.integers(0, 1 << 20))))
def test_windows_and_what_is_left_are_the_total_whatever_happens(steps: list[tuple[str, int]]) -> None:
    budget = Budget(1 << 20, 100)
    windows: list[int] = []
    for what, number in steps:
        if what == "admit" and (window := budget.admit()):
            windows.append(window)
        elif not windows:
            continue
        elif what == "leave":
            budget.leave(windows.pop(number % len(windows)))
        elif what == "take":
            windows[number % len(windows)] += budget.take(number)
        elif what == "give":
            some = min(number, windows[-1] - FLOOR_BYTES)
            windows[-1] -= some
            budget.give_back(some)
        floors_left = (budget.streams_max - budget.streams) * FLOOR_BYTES
        assert sum(windows) + budget.shared_left + floors_left == budget.total
        assert budget.shared_left >= 0
        assert budget.streams == len(windows)
    for window in windows:
        budget.leave(window)
    assert (budget.streams, budget.shared_left) == (0, Budget(1 << 20, 100).shared_left)
