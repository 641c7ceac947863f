# SPDX-License-Identifier: GPL-2.0-or-later
"""The guard tells what moved by more than a quarter beside the stored run, and only that."""

from collections.abc import Sequence

import pytest

from bench.guard import STORED, judge, moves
from bench.lines import Line, Result
from bench.record import Record, read
from bench.rows import ROWS


def run(mux: Sequence[float], call: Sequence[float] = (100, 100, 100), **kept: object) -> Record:
    """A bulk row of three rounds, where more is better."""
    line = Line("bulk-upload", "one stream", "MiB/s", is_less_better=False)
    line.rounds = {"mux": list(mux), "call": list(call)}
    for name, value in kept.items():
        setattr(line, name, value)
    return Record({"processor": "two"}, {"bulk": Result("", [line])})


STEADY = run([100, 100, 100])


def never(rows: Sequence[str]) -> Record:
    raise AssertionError(f"{rows} are measured again")


@pytest.mark.parametrize("mux", [(81, 81, 81), (124, 124, 124), (100, 1, 1000)])
def test_less_than_a_quarter_is_no_move(mux: Sequence[float]) -> None:
    assert judge(STEADY, run(mux), never) == []


def test_what_became_better_is_told_and_not_measured_again() -> None:
    (move,) = judge(STEADY, run([130, 130, 130]), never)
    assert not move.is_worse
    assert str(move) == "better by 30 %: one stream, mux to call: 1.00x, now 1.30x"


def test_what_stays_worse_when_measured_again_is_told() -> None:
    (move,) = judge(STEADY, run([50, 50, 50]), lambda rows: run([60, 60, 60]))
    assert move.is_worse
    assert str(move) == "worse by 100 %: one stream, mux to call: 1.00x, now 0.50x"


def test_what_was_worse_by_chance_is_not_told() -> None:
    asked: list[str] = []

    def again(rows: Sequence[str]) -> Record:
        asked.extend(rows)
        return run([99, 99, 99])

    assert judge(STEADY, run([50, 50, 50]), again) == []
    assert asked == ["bulk"]


def test_a_slower_machine_moves_nothing() -> None:
    assert judge(STEADY, run([50, 20, 30], [50, 20, 30]), never) == []


def test_less_is_better_where_the_line_says_so() -> None:
    before = run([1, 1, 1], [1, 1, 1], is_less_better=True)
    (move,) = moves(before, run([2, 2, 2], [1, 1, 1], is_less_better=True))
    assert move.is_worse


def test_only_what_both_runs_have_is_compared() -> None:
    new = run([50, 50, 50], key="bulk-sideways")
    alone = run([50, 50, 50])
    del alone.line("bulk-upload").rounds["call"]
    assert moves(STEADY, new) == moves(STEADY, alone) == []


def test_what_compares_no_peers_and_what_is_chance_moves_nothing() -> None:
    for kept in ({"is_compared": False}, {"key": "bulk-p99"}):
        assert moves(run([100, 100, 100], **kept), run([1, 1, 1], **kept)) == []


def test_a_line_below_another_is_told_with_that() -> None:
    def two(mux: float) -> Record:
        first = Line("all", "time for a MiB: all", "ms", values={})
        below = Line("own", "  ours", "ms", rounds={"mux": [mux], "call": [1.0]})
        return Record({}, {"processor": Result("", [first, below])})

    (move,) = moves(two(1), two(2))
    assert move.title == "time for a MiB: ours"


def test_the_stored_run_has_rows_that_there_are_in_rounds_that_are_comparable() -> None:
    stored = read(STORED)
    assert set(stored.results) <= set(ROWS)
    for result in stored.results.values():
        for line in result.lines:
            assert len({len(rounds) for rounds in line.rounds.values()}) <= 1, line.key
    assert moves(stored, stored) == []
