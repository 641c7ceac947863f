# SPDX-License-Identifier: GPL-2.0-or-later
"""One budget for all qrexec calls of a qube: who makes room, and what becomes of calls that find none."""

from functools import partial

import pytest
import trio
from budgetbench import Bench, bench_of, has_call, served
from trio.testing import MockClock, wait_all_tasks_blocked

from qubes_fwd_qrexec.common.errors import RefusedError
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.exposed.callbudget import (
    BEGIN_MAX,
    BEGIN_S,
    LOOK_S,
)
from qubes_fwd_qrexec.exposed.callqueue import Kind
from qubes_fwd_qrexec.exposed.callwaits import AGAIN_S, DOUBT_S, WAIT_S

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
        crowd = []
        for number in range(4):
            crowd += await bench.want("web/a")
            crowd[-1].through()
            crowd[-1].quiet_s = 10.0 + number
        (other,) = await bench.want("web/b")
        await bench.until(lambda: other.has_call)
        assert [client.has_call for client in crowd] == [True, True, True, False]
        other.through()
        (same,) = await bench.want("web/a")
        assert not same.has_call
        assert served(crowd) == 3


async def test_no_connection_makes_room_where_a_call_ends_by_itself_in_a_moment(
    autojump_clock: MockClock,
) -> None:
    """As where many clients come and go."""
    async with bench_of(4) as bench:
        idle = await bench.want("web/a", "web/a", "web/a")
        for client in idle:
            client.through()
            client.quiet_s = 3600.0
        (busy,) = await bench.want("web/b")
        busy.through()
        for _ in range(20):
            last, (busy,) = busy, await bench.want("web/b")
            await trio.sleep(0.9 * LOOK_S)
            last.end()
            await wait_all_tasks_blocked()
            busy.through()
        assert served(idle) == 3


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


@pytest.mark.parametrize("status", [ExitStatus.NO_ROOM, ExitStatus.REFUSED])
async def test_room_is_made_for_others_although_one_comes_before_them_to_whom_none_can_be_given(
    autojump_clock: MockClock, status: ExitStatus
) -> None:
    async with bench_of(5) as bench:
        crowd = []
        for _ in range(3):
            crowd += await bench.want("web/a")
            crowd[-1].through()
            crowd[-1].quiet_s = 10.0
        await bench.have(1, kind=Kind.MUX, service="bad/m")
        (failed,) = await bench.want(kind=Kind.MUX, service="bad/m")
        assert failed.failed(status)
        await bench.want(kind=Kind.MUX, service="bad/m")
        await bench.have(1, kind=Kind.MUX, service="other/m")

        (behind,) = await bench.want("web/b")
        await bench.until(lambda: behind.has_call)

        assert served(crowd) <= 2


# A place for each target


async def test_a_target_leaves_a_place_to_each_that_has_no_call(autojump_clock: MockClock) -> None:
    """Its calls are in use, whatever it does with them."""
    async with bench_of(8) as bench:
        bench.budget.expect(0, ["greedy", "also", "one", "two"])
        await bench.have(1, service="greedy/s")
        assert served(await bench.want(*["r/s"] * 3, kind=Kind.MUX, service="also/m")) == 3
        await trio.sleep(BEGIN_S)
        more = await bench.want(*[""] * 5, kind=Kind.MUX, service="greedy/m")
        for client in filter(has_call, more):
            client.through()
        await wait_all_tasks_blocked()
        assert served(more) == 2
        assert served(await bench.want(kind=Kind.MUX, service="one/m")) == 1
        assert served(await bench.want("r/s", service="two/s+1")) == 1
        assert served(more) == 2


async def test_at_most_a_quarter_of_all_places_is_left_to_targets_without_a_call(
    autojump_clock: MockClock,
) -> None:
    async with bench_of(8) as bench:
        bench.budget.expect(0, [f"t{number}" for number in range(50)])
        assert len(await bench.have(6, service="t0/s+1")) == 6
        (waiting,) = await bench.want("r/s", service="t0/s+1")
        assert not waiting.has_call
        for number in range(1, 3):
            await bench.have(1, service=f"t{number}/s+1")
        assert bench.budget.calls == 8


async def test_unused_calls_of_others_are_kept_for_them(autojump_clock: MockClock) -> None:
    """Letting them go would give no room to a target which has a call: it would be their place still."""
    async with bench_of(4) as bench:
        bench.budget.expect(0, ["greedy", "other"])
        await bench.have(3, kind=Kind.MUX, service="greedy/m")
        (unused,) = await bench.have(1, kind=Kind.MUX, service="other/m")
        unused.quiet_s = 10.0
        (waiting,) = await bench.want(kind=Kind.MUX, service="greedy/m")
        await waiting.ended.wait()
        assert unused.has_call


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
        await bench.until(partial(has_call, client))
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
        next(filter(has_call, others)).through()
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
        assert not next(filter(has_call, waiting)).failed(ExitStatus.REFUSED, "dom0 says no")
        await wait_all_tasks_blocked()
        assert [str(client.error) for client in waiting if client.error] == ["dom0 says no"] * 4


async def test_what_was_allowed_once_is_full_for_as_long_as_it_takes(autojump_clock: MockClock) -> None:
    async with bench_of(20) as bench:
        await bench.have(2)
        for _ in range(20):
            (client,) = await bench.want("r/s")
            await bench.until(partial(has_call, client))
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


async def test_a_target_that_has_just_started_and_is_full_at_once_refuses_nobody(
    autojump_clock: MockClock,
) -> None:
    async with bench_of(20) as bench:
        clients = await bench.want(*["r/s"] * (2 * BEGIN_MAX))
        await trio.sleep(BEGIN_S + 1)
        assert served(clients) == 2 * BEGIN_MAX
        assert clients[-1].failed(ExitStatus.REFUSED)
        clients[0].through()


async def test_a_renewal_that_is_refused_beside_its_own_call_is_refused(autojump_clock: MockClock) -> None:
    async with bench_of(20) as bench:
        await bench.have(1, kind=Kind.MUX, service="work/m")
        (renewal,) = await bench.want(kind=Kind.RENEWAL, service="work/m")
        assert not renewal.failed(ExitStatus.REFUSED)
