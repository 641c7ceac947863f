# SPDX-License-Identifier: GPL-2.0-or-later
"""One stream's window, with a clock of the test's own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_fwd_qrexec.mux import FRAME_COST_BYTES, MIN_CREDIT_BYTES
from qubes_fwd_qrexec.relay.budget import FLOOR_BYTES, INITIAL_BYTES, WINDOW_MAX_BYTES, Budget, Share
from qubes_fwd_qrexec.relay.window import Window


@pytest.fixture
def budget() -> Budget:
    return Budget()


@pytest.fixture
def share(budget: Budget) -> Share:
    return Share(budget)


@pytest.fixture
def window(share: Share) -> Window:
    return Window(share, share.admit(), 0.0)


def use_all(window: Window, now: float) -> int:
    """All that may come comes, and is taken at once; what is granted then."""
    window.owed = window.size
    return window.grant(0, now)


def test_what_was_taken_is_granted_again_when_it_is_half(window: Window) -> None:
    window.owed = INITIAL_BYTES // 2 - 1
    assert window.grant(INITIAL_BYTES // 2 + 1, 0.07) == 0
    window.owed += 1
    assert window.grant(INITIAL_BYTES // 2, 0.07) == INITIAL_BYTES // 2
    assert (window.owed, window.size) == (0, INITIAL_BYTES)


def test_who_takes_fast_gets_more_up_to_the_largest_window(window: Window, share: Share) -> None:
    sizes = [use_all(window, 0.0) for _ in range(6)]
    assert sizes == [min(INITIAL_BYTES << n, WINDOW_MAX_BYTES) for n in range(1, 7)]
    assert share.lent == WINDOW_MAX_BYTES - FLOOR_BYTES


def test_one_of_64_bulk_streams_gets_a_large_window_too(window: Window) -> None:
    """Each takes 3 MiB/s where the call has 190, which is 128 KiB in 0.04 s."""
    for n in range(1, 7):
        use_all(window, n * 0.04)
    assert window.size == WINDOW_MAX_BYTES


def test_who_takes_slowly_goes_back_to_where_it_began(window: Window, share: Share) -> None:
    for _ in range(6):
        use_all(window, 0.0)
    assert use_all(window, 1.0) == INITIAL_BYTES
    assert share.lent == INITIAL_BYTES - FLOOR_BYTES


def test_what_many_want_is_shared_by_the_fast_too(window: Window, share: Share) -> None:
    for _ in range(6):
        use_all(window, 0.0)
    while share.take(WINDOW_MAX_BYTES, FLOOR_BYTES) > INITIAL_BYTES:
        pass
    assert use_all(window, 0.0) <= 2 * INITIAL_BYTES


def test_what_is_less_used_than_it_might_be_is_missed_where_others_are_short_of_it(
    window: Window, budget: Budget
) -> None:
    assert not window.is_missed(0)
    budget.shared_left //= 4
    assert window.is_missed(0)
    assert not window.is_missed(INITIAL_BYTES)
    assert window.is_missed(2 * INITIAL_BYTES - 1)
    assert window.is_missed(2 * INITIAL_BYTES - 1)


def test_what_is_given_back_is_for_others_and_so_is_what_was_taken(window: Window, share: Share) -> None:
    window.owed = 10_000
    window.give_back(INITIAL_BYTES - 10_000 - FLOOR_BYTES)
    assert (window.size, window.owed, share.lent) == (FLOOR_BYTES, 0, 0)


def test_the_end_leaves_the_floor_and_leaving_nothing(window: Window, share: Share) -> None:
    window.end()
    assert (window.size, share.lent) == (FLOOR_BYTES, 0)
    window.leave()
    assert share.lent == 0
    assert share.admit() == INITIAL_BYTES


def test_a_single_byte_above_the_floor_is_given_back_too(window: Window, share: Share) -> None:
    window.give_back(INITIAL_BYTES - FLOOR_BYTES - 1)
    assert share.lent == 1
    window.end()
    assert share.lent == 0


@given(
    lent=st.integers(0, 32 << 20),
    steps=st.lists(
        st.tuples(st.sampled_from(("send", "take", "recall")), st.integers(1, 300_000), st.floats(0, 0.2))
    ),
)
def test_a_window_is_the_sum_of_its_parts_and_no_stream_stops(
    lent: int, steps: list[tuple[str, int, float]]
) -> None:
    """The peer sends as it likes within its credit, and what came is taken late or soon."""
    budget = Budget()
    share = Share(budget)
    budget.shared_left -= lent
    window = Window(share, share.admit(), 0.0)
    outstanding, waiting, now = window.size, 0, 0.0

    def take(cost: int) -> None:
        nonlocal waiting, outstanding
        waiting -= cost
        window.owed += cost
        if window.is_owed_much:
            outstanding += window.grant(outstanding, now)

    for what, number, passed_s in steps:
        now += passed_s
        if what == "send":
            cost = min(number, outstanding)
            outstanding -= cost
            waiting += cost
        elif what == "take":
            take(min(number, waiting))
        elif outstanding > FLOOR_BYTES:
            window.give_back(outstanding - FLOOR_BYTES)
            outstanding = FLOOR_BYTES
        assert window.size == outstanding + waiting + window.owed
        assert FLOOR_BYTES <= window.size <= WINDOW_MAX_BYTES
        assert share.lent == window.size - FLOOR_BYTES
    take(waiting)
    assert outstanding > FRAME_COST_BYTES
    assert window.owed < max(outstanding, MIN_CREDIT_BYTES)
