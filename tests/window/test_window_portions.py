# SPDX-License-Identifier: GPL-2.0-or-later
"""Much work is done in portions, and the main loop has its turn after each."""

from collections.abc import Callable, Iterator
from itertools import count

import pytest
from screen import settle, until

from qubes_fwd_qrexec.window.portions import PORTION_S, Portions


class Steps:
    """Steps that each take as long as a portion may."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.taken = 0

    def __iter__(self) -> Iterator[None]:
        for _ in range(self.number):
            self.taken += 1
            yield


def slow_clock() -> Callable[[], float]:
    """With each look at it, as much time is over as a portion may take."""
    return map(PORTION_S.__mul__, count()).__next__


def test_a_portion_ends_when_its_time_is_over_and_the_rest_is_done_when_nothing_else_is() -> None:
    work, steps = Portions(slow_clock()), Steps(5)
    work.run(iter(steps))
    assert steps.taken == 1
    until(lambda: steps.taken == 5)
    settle()


def test_a_newer_piece_of_work_takes_the_place_of_what_is_not_done() -> None:
    work, old, new = Portions(slow_clock()), Steps(5), Steps(5)
    work.run(iter(old))
    work.run(iter(new))
    until(lambda: new.taken == 5)
    settle()
    assert old.taken == 1
    stopped = Steps(5)
    work.run(iter(stopped))
    work.stop()
    settle()
    assert stopped.taken < 3


def test_what_takes_no_time_is_done_at_once() -> None:
    work, steps = Portions(), Steps(5)
    work.run(iter(steps))
    assert steps.taken == 5


def test_in_one_turn_of_the_main_loop_one_piece_of_work_has_one_portion() -> None:
    works = [Steps(4), Steps(4), Steps(4)]
    for steps in works:
        portions = Portions(slow_clock())
        portions.run(iter(Steps(9)))
        portions.run(iter(steps))
    taken = [1, 1, 1]

    def are_done() -> bool:
        nonlocal taken
        before, taken = taken, [steps.taken for steps in works]
        assert sum(taken) <= sum(before) + 1
        assert max(taken) <= min(taken) + 1, "each has its turn"
        return taken == [4, 4, 4]

    until(are_done)
    settle()


def test_work_that_a_step_asks_for_begins_in_another_turn() -> None:
    inner, seen = Steps(2), []

    def outer() -> Iterator[None]:
        Portions(slow_clock()).run(iter(inner))
        seen.append(inner.taken)
        yield

    Portions(slow_clock()).run(outer())
    assert seen == [0]
    until(lambda: inner.taken == 2)
    settle()


def test_a_step_that_fails_stops_neither_other_work_nor_what_comes_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failures: list[BaseException] = []
    monkeypatch.setattr("sys.excepthook", lambda _, error, __: failures.append(error))
    fails, works, other, again = Portions(slow_clock()), Portions(slow_clock()), Steps(3), Steps(3)

    def failing() -> Iterator[None]:
        yield
        raise ValueError

    fails.run(failing())
    works.run(iter(other))
    until(lambda: other.taken == 3)
    assert [type(error) for error in failures] == [ValueError]
    fails.run(iter(again))
    until(lambda: again.taken == 3)
    settle()
