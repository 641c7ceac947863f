# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory that the processes of a socket service divide: bounded in all, and no caller takes it all."""

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_fwd_qrexec.common.errors import RefusedError
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.relay.budget import BUDGET_BYTES, STREAMS_MAX
from qubes_fwd_qrexec.relay.socketbuffers import HELD_BYTES, SHARED_BYTES
from qubes_fwd_qrexec.target.localserver import ServiceError
from qubes_fwd_qrexec.target.portions import CALLS_MAX, PARTS, VARIABLE, Portions, budget_of, own_budget

# Of 256 parts 64 stay, and it has two of these and an eighth of the others.
FIRST = 26
A, B = QubeName("sys-net"), QubeName("sys-vpn")


def take_all(undo: ExitStack, portions: Portions, caller: QubeName) -> list[int]:
    """As many as one caller gets, each for another port."""
    taken: list[int] = []
    while True:
        try:
            taken.append(undo.enter_context(portions.taken(caller, f"{len(taken) + 1}+mux")))
        except RefusedError:
            return taken


def test_the_first_gets_most_and_each_after_it_less() -> None:
    portions = Portions()
    with ExitStack() as undo:
        taken = take_all(undo, portions, A)
        assert taken[0] == FIRST
        assert taken == sorted(taken, reverse=True)
        assert len(taken) == CALLS_MAX // 2
        assert sum(taken) <= PARTS * 5 // 8
    with portions.taken(A, "1+mux") as parts:
        assert parts == FIRST


def test_what_one_caller_leaves_is_for_the_others() -> None:
    portions = Portions()
    with ExitStack() as undo:
        take_all(undo, portions, A)
        others = take_all(undo, portions, B)
        assert others[0] >= PARTS // 32
        assert len(others) >= 8


def test_a_second_call_for_the_same_is_let_in_where_another_is_not() -> None:
    portions = Portions()
    with ExitStack() as undo:
        take_all(undo, portions, A)
        with portions.taken(A, "1+mux"), pytest.raises(RefusedError, match="more than it leaves"):
            undo.enter_context(portions.taken(A, "1+mux"))
        with portions.taken(A, "1+mux"):
            pass


def test_in_all_there_are_never_more_than_the_most() -> None:
    portions = Portions()
    with ExitStack() as undo:
        for number in range(CALLS_MAX):
            undo.enter_context(portions.taken(QubeName(f"q{number}"), "1+mux"))
        for caller, argument in ((A, "1+mux"), (QubeName("q1"), "1+mux")):
            with pytest.raises(RefusedError, match="more than it leaves"):
                undo.enter_context(portions.taken(caller, argument))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.booleans()), max_size=80))
def test_what_is_taken_is_at_most_all_and_comes_back(steps: list[tuple[int, int, bool]]) -> None:
    portions = Portions()
    live: list[tuple[ExitStack, int]] = []
    for caller, port, is_end in steps:
        if is_end and live:
            live.pop(port % len(live))[0].close()
            continue
        undo = ExitStack()
        try:
            parts = undo.enter_context(portions.taken(QubeName(f"q{caller}"), f"{port}+mux"))
        except RefusedError:
            continue
        live.append((undo, parts))
        assert sum(parts for _, parts in live) <= PARTS
        assert len(live) <= CALLS_MAX
    for undo, _ in live:
        undo.close()
    with portions.taken(A, "1+mux") as parts:
        assert parts == FIRST


def test_a_part_of_the_budget_has_that_part_of_all_and_twice_of_what_is_lent() -> None:
    budget = budget_of(PARTS // 8)
    assert budget.streams_max == STREAMS_MAX // 8
    assert budget.total == BUDGET_BYTES // 4
    assert budget.sockets.total == SHARED_BYTES // 4
    assert budget.sockets.held_max == HELD_BYTES // 8
    whole = budget_of(PARTS)
    assert (whole.streams_max, whole.total) == (STREAMS_MAX, BUDGET_BYTES)
    assert (whole.sockets.total, whole.sockets.held_max) == (SHARED_BYTES, HELD_BYTES)


def test_the_environment_says_how_many_parts_there_are_and_nothing_means_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert own_budget().streams_max == STREAMS_MAX
    monkeypatch.setenv(VARIABLE, "2")
    assert own_budget().streams_max == 2 * STREAMS_MAX // PARTS
    for text in ("0", "1", "257", "many", ""):
        monkeypatch.setenv(VARIABLE, text)
        with pytest.raises(ServiceError, match="2 to 256 would be right"):
            own_budget()
