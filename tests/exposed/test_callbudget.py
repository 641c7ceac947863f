# SPDX-License-Identifier: GPL-2.0-or-later
"""One budget for all qrexec calls of a qube: who gets a place, who waits, and who makes room."""

from collections.abc import Callable

import pytest
import trio
from budgetbench import Bench, Client, bench_of, served
from trio.testing import MockClock, wait_all_tasks_blocked

from qubes_fwd_qrexec.exposed.callbudget import (
    BEGIN_MAX,
    BEGIN_OF_ONE_MAX,
    BEGIN_S,
    RENEWALS_MAX,
    CallBudget,
    Waiting,
)
from qubes_fwd_qrexec.exposed.callqueue import CallQueue, Kind
from qubes_fwd_qrexec.exposed.callwaits import WAIT_S


async def test_all_targets_share_one_budget_and_the_next_one_waits(autojump_clock: MockClock) -> None:
    async with bench_of(3) as bench:
        first = await bench.have(2)
        first += await bench.have(1, service="other/s+1")
        (waiting,) = await bench.want(service="third/s+1")
        assert not waiting.has_call
        assert (bench.budget.calls, bench.budget.calls_to("work"), bench.budget.waiting) == (3, 2, 1)
        first[0].end()
        await wait_all_tasks_blocked()
        assert waiting.has_call


async def test_few_begin_together_and_a_cold_target_holds_up_others_for_a_moment(
    autojump_clock: MockClock,
) -> None:
    async with bench_of(20) as bench:
        clients = await bench.want(*["r/s"] * (2 * BEGIN_MAX))
        assert served(clients) == BEGIN_MAX
        clients[0].through()
        await wait_all_tasks_blocked()
        assert served(clients) == BEGIN_MAX + 1
        await trio.sleep(BEGIN_S + 1)
        assert served(clients) == 2 * BEGIN_MAX


async def test_a_target_that_is_slow_to_take_calls_leaves_one_that_begins_to_others(
    autojump_clock: MockClock,
) -> None:
    async with bench_of(20) as bench:
        bench.budget.expect(0, ["slow", "other"])
        slow = await bench.want(*["r/s"] * 10, service="slow/s+1")
        assert served(slow) == BEGIN_OF_ONE_MAX
        assert served(await bench.want("r/s", service="other/s+1")) == 1
        bench.budget.expect(0, ["slow"])
        slow[0].through()
        await wait_all_tasks_blocked()
        assert served(slow) == BEGIN_MAX


async def test_waiting_has_a_bound_and_says_why(autojump_clock: MockClock) -> None:
    async with bench_of(1) as bench:
        await bench.have(1)
        (waiting,) = await bench.want()
        began = trio.current_time()
        await waiting.ended.wait()
        assert trio.current_time() - began == WAIT_S
        assert str(waiting.error) == "this qube makes 1 calls, and none ended in time"


async def test_a_waiter_that_is_cancelled_takes_no_place_with_it(autojump_clock: MockClock) -> None:
    async with bench_of(1) as bench:
        (holder,) = await bench.have(1)
        async with trio.open_nursery() as tasks:
            for _ in range(5):
                Client(bench.budget, tasks, Kind.SINGLE, "work/s+1", ())
            await wait_all_tasks_blocked()
            holder.end()
            tasks.cancel_scope.cancel()
        assert bench.budget.calls == 0
        (again,) = await bench.want()
        assert again.has_call


async def test_some_places_are_kept_for_mux_calls_and_renewals_have_more(autojump_clock: MockClock) -> None:
    async with bench_of(8) as bench:
        bench.budget.expect(50)
        singles = await bench.have(6)
        (waiting,) = await bench.want("r/s")
        assert not waiting.has_call
        assert len(singles) == bench.budget.singles_max == 6
        muxes = await bench.have(2, kind=Kind.MUX, service="a/m")
        assert served(muxes) == 2
        renewals = await bench.want(*[""] * (RENEWALS_MAX + 1), kind=Kind.RENEWAL, service="a/m")
        assert served(renewals) == RENEWALS_MAX


async def test_nothing_is_kept_for_mux_calls_that_nobody_wants(autojump_clock: MockClock) -> None:
    async with bench_of(8) as bench:
        bench.budget.expect(0)
        assert served(await bench.have(8)) == 8


async def test_mux_calls_come_before_single_calls_and_renewals_before_both(autojump_clock: MockClock) -> None:
    async with bench_of(1) as bench:
        (holder,) = await bench.have(1)
        (one,) = await bench.want("r/s")
        (mux,) = await bench.want(kind=Kind.MUX, service="a/m")
        holder.end()
        await wait_all_tasks_blocked()
        assert (one.has_call, mux.has_call) == (False, True)


async def test_ten_thousand_places_come_back(autojump_clock: MockClock) -> None:
    async with bench_of(5) as bench:
        for turn in range(10_000):
            try:
                async with bench.budget.place(Kind.SINGLE, "work", "s+1", ("r", turn)):
                    if turn % 3 == 0:
                        raise ValueError
            except ValueError:
                pass
        assert bench.budget.calls == 0


@pytest.mark.usefixtures("bugs_are_wanted")
async def test_a_bug_while_calls_are_waited_for_ends_nobody(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    async with bench_of(20) as bench:
        clients = await bench.want(*["r/s"] * (2 * BEGIN_MAX))
        with monkeypatch.context() as patch:
            patch.setattr(CallBudget, "_make_room", fail)
            await trio.sleep(BEGIN_S / 2)
        await trio.sleep(BEGIN_S)
        assert served(clients) == 2 * BEGIN_MAX


async def test_who_comes_while_many_wait_has_nobody_looked_at_but_itself(autojump_clock: MockClock) -> None:
    """Clients come as fast as a rule lets them, and each would look at all that wait."""

    class Queue(CallQueue[Waiting]):
        looks = 0

        def first(self, may_begin: Callable[[Waiting], bool]) -> Waiting | None:
            self.looks += 1
            return super().first(may_begin)

    async with trio.open_nursery() as tasks:
        queue = Queue()
        bench = Bench(CallBudget(tasks, 2, queue), tasks)
        await bench.have(2)
        await bench.want("r/s")
        before = queue.looks
        await bench.want(*["r/s"] * 100)
        assert bench.budget.waiting == 101
        assert queue.looks - before <= 1
        tasks.cancel_scope.cancel()
