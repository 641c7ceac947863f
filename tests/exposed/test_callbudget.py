# SPDX-License-Identifier: GPL-2.0-or-later
"""One budget for all qrexec calls of a qube: who gets a place, who waits, and who makes room."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio
from helpers import BOUND_S
from trio.testing import MockClock, wait_all_tasks_blocked

from qubes_fwd_qrexec.common.errors import RefusedError
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.exposed.callbudget import (
    BEGIN_MAX,
    BEGIN_S,
    RENEWALS_MAX,
    CallBudget,
)
from qubes_fwd_qrexec.exposed.callplace import Place
from qubes_fwd_qrexec.exposed.callqueue import Key, Kind
from qubes_fwd_qrexec.exposed.callwaits import AGAIN_S, DOUBT_S, WAIT_S


class Client:
    """Somebody who wants a call, and makes room as the holder of its place."""

    def __init__(self, budget: CallBudget, tasks: trio.Nursery, kind: Kind, service: str, key: Key) -> None:
        self.place: Place | None = None
        self.error: RefusedError | None = None
        self.quiet_s: float | None = None
        self.sole_user: tuple[Key, float] | None = None
        self._over = trio.Event()
        self._budget = budget
        self.ended = trio.Event()
        tasks.start_soon(self._run, kind, *service.split("/"), key)

    async def _run(self, kind: Kind, target: str, service: str, key: Key) -> None:
        try:
            async with self._budget.place(kind, target, service, key) as self.place:
                self.place.holder = self
                await self._over.wait()
        except RefusedError as error:
            self.error = error
        finally:
            self.place = None
            self.ended.set()

    @property
    def has_call(self) -> bool:
        return self.place is not None

    def end(self) -> None:
        self._over.set()

    make_room = end

    def through(self) -> None:
        assert self.place is not None
        self.place.through()

    def failed(self, status: int, why: str = "refused") -> bool:
        assert self.place is not None
        again = self.place.failed(why, status)
        self.end()
        return again


class Bench:
    def __init__(self, budget: CallBudget, tasks: trio.Nursery) -> None:
        self.budget = budget
        self._tasks = tasks

    async def want(self, *keys: str, kind: Kind = Kind.SINGLE, service: str = "work/s+1") -> list[Client]:
        """Clients of ``RULE/SOURCE``, who have asked by the time this returns."""
        found = []
        for key in keys or ("",):
            parts = tuple(key.split("/")) if key else ()
            found.append(Client(self.budget, self._tasks, kind, service, parts))
            await wait_all_tasks_blocked()
        return found

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let time pass until it is true."""
        with trio.fail_after(BOUND_S):
            while not condition():  # noqa: ASYNC110
                await trio.sleep(0.1)

    async def have(self, count: int, *, kind: Kind = Kind.SINGLE, service: str = "work/s+1") -> list[Client]:
        """Clients whose calls are through."""
        found = []
        for _ in range(count):
            found += await self.want("r/s" if kind is Kind.SINGLE else "", kind=kind, service=service)
            found[-1].through()
        return found


@asynccontextmanager
async def bench_of(calls_max: int) -> AsyncIterator[Bench]:
    async with trio.open_nursery() as tasks:
        budget = CallBudget(tasks, calls_max)
        yield Bench(budget, tasks)
        tasks.cancel_scope.cancel()
    assert budget.calls == budget.waiting == 0


def _has_call(client: Client) -> bool:
    return client.has_call


def served(clients: list[Client]) -> int:
    return sum(client.has_call for client in clients)


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


# Making room


async def test_fifty_targets_are_served_with_fewer_calls(autojump_clock: MockClock) -> None:
    """The mux call that was used least recently is let go, and none that is in use."""
    async with bench_of(20) as bench:
        muxes = [(await bench.have(1, kind=Kind.MUX, service=f"t{n}/m"))[0] for n in range(20)]
        for number, mux in enumerate(muxes):
            mux.quiet_s = None if number == 0 else 100.0 - number
        for number in range(30):
            (new,) = await bench.want(kind=Kind.MUX, service=f"u{number}/m")
            await wait_all_tasks_blocked()
            assert new.has_call
            new.through()
            new.quiet_s = 0.0
        assert muxes[0].has_call
        assert not any(mux.has_call for mux in muxes[1:])


async def test_if_all_are_in_use_nobody_is_cut_and_the_next_one_waits(autojump_clock: MockClock) -> None:
    async with bench_of(2) as bench:
        muxes = await bench.have(2, kind=Kind.MUX, service="a/m")
        (new,) = await bench.want(kind=Kind.MUX, service="b/m")
        await new.ended.wait()
        assert served(muxes) == 2
        assert new.error is not None


async def test_idle_connections_of_one_client_do_not_keep_another_out(autojump_clock: MockClock) -> None:
    async with bench_of(4) as bench:
        crowd = await bench.want(*["web/a"] * 4)
        for number, client in enumerate(crowd):
            client.through()
            client.quiet_s = 10.0 + number
        (other,) = await bench.want("web/b")
        await wait_all_tasks_blocked()
        assert other.has_call
        assert [client.has_call for client in crowd] == [True, True, True, False]
        other.through()
        (same,) = await bench.want("web/a")
        assert not same.has_call
        assert served(crowd) == 3


async def test_idle_connections_of_one_client_in_all_mux_calls_do_not_keep_another_out(
    autojump_clock: MockClock,
) -> None:
    async with bench_of(4) as bench:
        live = await bench.have(4, kind=Kind.MUX)
        for idle_s, client in enumerate(live[:3], 10):
            client.sole_user = ("net", "attacker"), idle_s
        live[3].sole_user = ("other", "honest"), 3600.0

        (waiting,) = await bench.want("r/lan/victim")
        await bench.until(lambda: waiting.has_call)

        assert [client.has_call for client in live] == [True, True, False, True]


@pytest.mark.parametrize(
    ("sole_users", "waiting"),
    [
        pytest.param(
            [("net", "one"), ("other", "two")], "r/lan/new", id="nobody alone has more than is left"
        ),
        pytest.param([("net", "one")] * 2, "r/net/one", id="the one that waits has them"),
        pytest.param([None, None], "r/lan/new", id="several use each"),
    ],
)
async def test_mux_calls_that_are_shared_fairly_are_not_cut(
    autojump_clock: MockClock, sole_users: list[tuple[str, str] | None], waiting: str
) -> None:
    async with bench_of(2) as bench:
        live = await bench.have(2, kind=Kind.MUX)
        for client, user in zip(live, sole_users, strict=True):
            client.sole_user = None if user is None else (user, 3600.0)

        (newcomer,) = await bench.want(waiting)
        await bench.until(newcomer.ended.is_set)

        assert newcomer.error is not None
        assert served(live) == 2


async def test_a_mux_call_in_which_something_moves_is_not_cut(autojump_clock: MockClock) -> None:
    async with bench_of(3) as bench:
        live = await bench.have(3, kind=Kind.MUX)
        for client in live:
            client.sole_user = ("net", "busy"), 0.5

        (newcomer,) = await bench.want("r/lan/new")
        await bench.until(newcomer.ended.is_set)

        assert served(live) == 3


async def test_a_connection_in_which_something_moves_is_not_cut(autojump_clock: MockClock) -> None:
    async with bench_of(2) as bench:
        crowd = await bench.want("web/a", "web/a")
        for client in crowd:
            client.through()
            client.quiet_s = 0.5
        (other,) = await bench.want("web/b")
        await other.ended.wait()
        assert served(crowd) == 2


# No room elsewhere


async def test_a_full_target_is_asked_again_when_a_call_ends(
    autojump_clock: MockClock,
) -> None:
    async with bench_of(20) as bench:
        living = await bench.have(5)
        (refused,) = await bench.want("r/s")
        assert refused.failed(ExitStatus.REFUSED)
        waiting = await bench.want("r/s", "r/s")
        assert served(waiting) == 0
        (elsewhere,) = await bench.want(service="other/s+1")
        assert elsewhere.has_call
        living[0].end()
        await wait_all_tasks_blocked()
        assert served(waiting) == 1


async def test_a_full_target_is_asked_now_and_then(
    autojump_clock: MockClock,
) -> None:
    async with bench_of(20) as bench:
        await bench.have(2)
        (refused,) = await bench.want("r/s")
        assert refused.failed(ExitStatus.REFUSED)
        waiting = await bench.want(*["r/s"] * 3)
        await trio.sleep(AGAIN_S + 1)
        assert served(waiting) == 1  # one finds out for all
        next(client for client in waiting if client.has_call).through()
        await wait_all_tasks_blocked()
        assert served(waiting) == 3


async def test_where_it_stays_full_that_is_the_reason(autojump_clock: MockClock) -> None:
    async with bench_of(20) as bench:
        await bench.have(2)
        (refused,) = await bench.want("r/s")
        assert refused.failed(ExitStatus.REFUSED)
        waiting = await bench.want("r/s", "r/s")
        await trio.sleep(AGAIN_S + 1)
        hanging = next(client for client in waiting if client.has_call)
        (other,) = [client for client in waiting if client is not hanging]
        await other.ended.wait()
        assert other.error is not None
        assert "work takes no more than 2 calls of this qube" in str(other.error)
        assert other.error.kind == "busy"


async def refusals_of(bench: Bench, service: str) -> int:
    """How often a call that dom0 always refuses is tried before somebody learns of it."""
    for asked in range(1, 20):
        (client,) = await bench.want("r/s", service=service)
        await bench.until(partial(_has_call, client))
        if not client.failed(ExitStatus.REFUSED):
            return asked
    raise AssertionError("nobody is ever told")


async def test_what_dom0_has_never_allowed_is_soon_refused_beside_living_calls(
    autojump_clock: MockClock,
) -> None:
    async with bench_of(20) as bench:
        await bench.have(2)
        began = trio.current_time()
        assert await refusals_of(bench, "work/s+2") > 2
        assert DOUBT_S <= trio.current_time() - began < DOUBT_S + 2 * AGAIN_S
        # Whoever comes next is told with the first question.
        await trio.sleep(AGAIN_S)
        assert await refusals_of(bench, "work/s+2") == 1
        # The target is not full, as the next call to it finds out for all.
        others = await bench.want(*["r/s"] * BEGIN_MAX)
        next(filter(_has_call, others)).through()
        await wait_all_tasks_blocked()
        assert served(others) == BEGIN_MAX
        await trio.sleep(AGAIN_S)
        assert await refusals_of(bench, "work/s+2") == 1
        assert served(await bench.want("r/s")) == 1


async def test_everybody_who_waits_for_a_call_that_was_never_allowed_is_refused_together(
    autojump_clock: MockClock,
) -> None:
    async with bench_of(20) as bench:
        await bench.have(2)
        await refusals_of(bench, "work/s+2")
        waiting = await bench.want(*["r/s"] * 5, service="work/s+2")
        await bench.until(lambda: served(waiting) == 1)
        assert not next(filter(_has_call, waiting)).failed(ExitStatus.REFUSED, "dom0 says no")
        await wait_all_tasks_blocked()
        assert [str(client.error) for client in waiting if client.error] == ["dom0 says no"] * 4


async def test_what_was_allowed_once_is_full_for_as_long_as_it_takes(autojump_clock: MockClock) -> None:
    async with bench_of(20) as bench:
        await bench.have(2)
        for _ in range(20):
            (client,) = await bench.want("r/s")
            await bench.until(partial(_has_call, client))
            assert client.failed(ExitStatus.REFUSED)


async def test_a_new_configuration_may_have_taken_back_what_was_allowed(autojump_clock: MockClock) -> None:
    async with bench_of(20) as bench:
        await bench.have(2)
        bench.budget.forget_refusals()
        assert await refusals_of(bench, "work/s+1") > 2
        bench.budget.forget_refusals()
        assert await refusals_of(bench, "work/s+1") > 2


async def test_a_call_that_is_made_again_keeps_its_deadline(autojump_clock: MockClock) -> None:
    async with bench_of(20) as bench:
        await bench.have(1)
        deadline = bench.budget.deadline()
        assert deadline == trio.current_time() + WAIT_S

        async def ask() -> None:
            while True:
                async with bench.budget.place(Kind.SINGLE, "work", "s+1", ("r", "s"), deadline) as place:
                    assert place.failed("refused", ExitStatus.REFUSED)

        with pytest.raises(RefusedError, match="takes no more than 1 calls of this qube"):
            await ask()
        assert trio.current_time() == deadline


async def test_without_room_for_a_vchan_calls_to_all_targets_wait(autojump_clock: MockClock) -> None:
    async with bench_of(20) as bench:
        living = await bench.have(3)
        (failed,) = await bench.want(service="other/s+1")
        assert failed.failed(ExitStatus.NO_ROOM)
        (waiting,) = await bench.want(service="third/s+1")
        assert not waiting.has_call
        living[0].end()
        await wait_all_tasks_blocked()
        assert waiting.has_call


async def test_calls_that_begin_together_and_find_no_room_wait_for_those_that_begin(
    autojump_clock: MockClock,
) -> None:
    """Nobody knows yet which of them are through: xenstored has a transaction for some of them only."""
    async with bench_of(20) as bench:
        clients = await bench.want(*["r/s"] * 10)
        began = clients[:BEGIN_MAX]
        for client in began[2:]:
            assert client.failed(ExitStatus.NO_ROOM)
        await wait_all_tasks_blocked()
        assert bench.budget.waiting == 10 - BEGIN_MAX
        for client in began[:2]:
            client.through()
            client.end()
        await wait_all_tasks_blocked()
        assert served(clients) == 2


async def test_the_last_of_those_that_found_no_room_is_refused_and_with_it_all_who_wait(
    autojump_clock: MockClock,
) -> None:
    async with bench_of(20) as bench:
        clients = await bench.want(*["r/s"] * 10)
        verdicts = [client.failed(ExitStatus.NO_ROOM) for client in clients[:BEGIN_MAX]]
        assert verdicts == [True] * (BEGIN_MAX - 1) + [False]
        await wait_all_tasks_blocked()
        assert [client.error is not None for client in clients[BEGIN_MAX:]] == [True] * (10 - BEGIN_MAX)


async def test_a_target_that_has_just_started_and_is_full_at_once_refuses_nobody(
    autojump_clock: MockClock,
) -> None:
    async with bench_of(20) as bench:
        clients = await bench.want(*["r/s"] * (2 * BEGIN_MAX))
        await trio.sleep(BEGIN_S + 1)
        assert served(clients) == 2 * BEGIN_MAX
        assert clients[-1].failed(ExitStatus.REFUSED)
        clients[0].through()


async def test_the_first_call_that_finds_no_room_is_a_refusal(autojump_clock: MockClock) -> None:
    async with bench_of(20) as bench:
        (alone,) = await bench.want()
        assert not alone.failed(ExitStatus.NO_ROOM)
        (other,) = await bench.want()
        assert not other.has_call


async def test_a_renewal_that_is_refused_beside_its_own_call_is_refused(autojump_clock: MockClock) -> None:
    async with bench_of(20) as bench:
        await bench.have(1, kind=Kind.MUX, service="work/m")
        (renewal,) = await bench.want(kind=Kind.RENEWAL, service="work/m")
        assert not renewal.failed(ExitStatus.REFUSED)


# Refusals


async def test_waiting_connections_are_refused_with_the_first_and_dom0_is_not_flooded(
    autojump_clock: MockClock,
) -> None:
    async with bench_of(20) as bench:
        first = await bench.want(*["r/s"] * (BEGIN_MAX + 10))
        asked = [client for client in first if client.has_call]
        for client in asked:
            assert not client.failed(ExitStatus.REFUSED, "dom0 says no")
        await wait_all_tasks_blocked()
        assert {str(client.error) for client in first if client not in asked} == {"dom0 says no"}
        questions = 0
        clients: list[Client] = []
        for _ in range(60):
            clients += await bench.want(*["r/s"] * 3)
            await trio.sleep(0.5)
            for client in clients:
                if client.has_call:
                    questions += 1
                    assert not client.failed(ExitStatus.REFUSED, "dom0 says no")
        assert 30 / AGAIN_S / 2 <= questions <= 30 / AGAIN_S + 1


async def test_after_an_outage_all_are_served_within_a_moment(autojump_clock: MockClock) -> None:
    async with bench_of(20) as bench:
        (first,) = await bench.want()
        first.failed(ExitStatus.REFUSED)
        waiting = await bench.want(*["r/s"] * 10)
        assert served(waiting) == 0
        began = trio.current_time()
        await bench.until(lambda: served(waiting) > 0)
        assert trio.current_time() - began <= AGAIN_S + 0.5
        assert served(waiting) == 1
        next(client for client in waiting if client.has_call).through()
        await wait_all_tasks_blocked()
        assert served(waiting) == BEGIN_MAX + 1


async def test_a_new_configuration_asks_again_at_once(
    autojump_clock: MockClock,
) -> None:
    async with bench_of(20) as bench:
        (first,) = await bench.want()
        first.failed(ExitStatus.REFUSED)
        (waiting,) = await bench.want()
        (other,) = await bench.want(service="work/s+2")
        assert (waiting.has_call, other.has_call) == (False, True)
        bench.budget.forget_refusals()
        await wait_all_tasks_blocked()
        assert waiting.has_call


async def test_a_renewal_is_asked_for_although_new_calls_were_refused(autojump_clock: MockClock) -> None:
    async with bench_of(20) as bench:
        (first,) = await bench.want(service="work/m", kind=Kind.MUX)
        first.failed(ExitStatus.REFUSED)
        (renewal,) = await bench.want(service="work/m", kind=Kind.RENEWAL)
        assert renewal.has_call
        (mux,) = await bench.want(service="work/m", kind=Kind.MUX)
        assert not mux.has_call
        renewal.through()
        await wait_all_tasks_blocked()
        assert mux.has_call


async def test_the_reason_of_a_refusal_reaches_those_who_waited(autojump_clock: MockClock) -> None:
    async with bench_of(20) as bench:
        (first,) = await bench.want()
        first.failed(ExitStatus.NO_SERVICE, "it has no such service")
        waiting = await bench.want("r/s", "r/s")
        await trio.sleep(AGAIN_S + 1)
        assert served(waiting) == 1  # it asks, and hangs
        hanging = next(client for client in waiting if client.has_call)
        (other,) = [client for client in waiting if client is not hanging]
        await other.ended.wait()
        assert str(other.error) == "it has no such service"
        assert other.error is not None
        assert other.error.kind == "no-service"


async def test_repeated_losses_cause_no_flood_of_calls(autojump_clock: MockClock) -> None:
    async with bench_of(20) as bench:
        calls = 0
        began = trio.current_time()
        while trio.current_time() < began + 20:
            (mux,) = await bench.want(kind=Kind.MUX, service="work/m")
            await bench.until(partial(_has_call, mux))
            calls += 1
            mux.through()
            assert mux.place is not None
            mux.place.lost("it was killed")
            mux.place.through()  # who finds out late that it was through changes nothing
            mux.end()
            await mux.ended.wait()
        assert calls <= 20 / AGAIN_S + 1


async def test_a_call_that_lived_for_long_is_replaced_at_once(autojump_clock: MockClock) -> None:
    async with bench_of(20) as bench:
        (mux,) = await bench.have(1, kind=Kind.MUX, service="work/m")
        await trio.sleep(AGAIN_S + 1)
        assert mux.place is not None
        mux.place.lost("it was killed")
        mux.end()
        (again,) = await bench.want(kind=Kind.MUX, service="work/m")
        assert again.has_call


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
