# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls that find no room for a vchan in this qube, and targets whose calls end as if they had found none."""

from functools import partial

import pytest
import trio
from budgetbench import bench_of, has_call, served
from trio.testing import MockClock, wait_all_tasks_blocked

from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.exposed.brake import TRY_S
from qubes_fwd_qrexec.exposed.callbudget import BEGIN_MAX, LOOK_S
from qubes_fwd_qrexec.exposed.callqueue import Kind
from qubes_fwd_qrexec.exposed.callwaits import AGAIN_S, DOUBT_S


async def test_whose_call_found_no_room_is_served_once_any_call_has_ended(autojump_clock: MockClock) -> None:
    async with bench_of(20) as bench:
        living = await bench.have(3)
        (failed,) = await bench.want(service="other/s+1")
        assert failed.failed(ExitStatus.NO_ROOM)
        (again,) = await bench.want(service="other/s+1")
        await trio.sleep(LOOK_S)
        assert not again.has_call
        living[0].end()
        await wait_all_tasks_blocked()
        assert again.has_call  # before the target that had it, if that wants more


async def test_it_is_tried_now_and_then_and_no_more_often_however_many_calls_end(
    autojump_clock: MockClock,
) -> None:
    async with bench_of(20) as bench:
        await bench.have(2)
        (failed,) = await bench.want(service="bad/s+1")
        failed.through()
        failed.end()
        began = trio.current_time()
        tries = 0
        while trio.current_time() < began + 10.0:
            for client in await bench.want("b/c", service="bad/s+1"):
                await bench.until(partial(has_call, client))
                assert client.failed(ExitStatus.NO_ROOM)
                tries += 1
            for client in await bench.have(5):
                client.end()
        assert tries <= 10.0 / LOOK_S + 1
        calm = trio.current_time()
        tries = 0
        while trio.current_time() < calm + 20.0:
            (client,) = await bench.want("b/c", service="bad/s+1")
            await bench.until(partial(has_call, client))
            assert client.failed(ExitStatus.NO_ROOM)
            tries += 1
        assert tries <= 20.0 / AGAIN_S + 1


async def test_calls_in_vain_leave_the_target_slots_for_others(autojump_clock: MockClock) -> None:
    """Each keeps one for two minutes; a small call that gets through between them changes nothing."""
    async with bench_of(20) as bench:
        await bench.have(2)
        (once,) = await bench.have(1, service="other/s+1")
        once.end()
        began = trio.current_time()
        vain = 0
        while trio.current_time() < began + 120.0:
            for client in await bench.want("m/m", "m/m", service="other/s+1"):
                await bench.until(partial(has_call, client))
                assert client.failed(ExitStatus.NO_ROOM)
                vain += 1
            (small,) = await bench.want("s/s", service="other/s+2")
            await bench.until(partial(has_call, small))
            small.through()
            small.end()
        assert 40 < vain < 90


async def test_a_try_that_hangs_keeps_nobody_from_its_target_for_long(autojump_clock: MockClock) -> None:
    """dom0 has lost it, and the target takes calls."""
    async with bench_of(20) as bench:
        await bench.have(2)
        (once,) = await bench.have(1, service="other/s+1")
        once.end()
        (failed,) = await bench.want(service="other/s+1")
        assert failed.failed(ExitStatus.NO_ROOM)
        hanging, *others = await bench.want(*["b/c"] * 4, service="other/s+1")
        await bench.until(partial(has_call, hanging))
        began = trio.current_time()
        await bench.until(partial(has_call, others[0]))
        assert trio.current_time() - began <= TRY_S + LOOK_S
        others[0].through()
        await wait_all_tasks_blocked()
        assert served(others) == len(others)


@pytest.mark.parametrize("does", ["fails", "hangs"])
async def test_a_target_that_takes_no_call_keeps_nobody_out_of_others(
    autojump_clock: MockClock, does: str
) -> None:
    """Its calls end with the status of those that find no room, or do not end."""
    async with bench_of(20) as bench:
        bench.budget.expect(0, ["work", "bad"])
        await bench.have(2)
        (failed,) = await bench.want("b/c", service="bad/s+1")
        assert failed.failed(ExitStatus.NO_ROOM)
        waiting = await bench.want(*["b/c"] * 5, service="bad/s+1")
        await bench.until(lambda: served(waiting) > 0)
        if does == "fails":
            assert next(filter(has_call, waiting)).failed(ExitStatus.NO_ROOM)
        for number in range(15):
            (other,) = await bench.want("r/s", service=f"{'third' if number else 'work'}/s+1")
            assert other.has_call
            other.through()


async def test_a_target_that_has_never_taken_a_call_refuses_after_a_moment(
    autojump_clock: MockClock,
) -> None:
    async with bench_of(20) as bench:
        await bench.have(2)
        began = trio.current_time()
        waiting = await bench.want(*["b/c"] * 10, service="bad/s+1")
        while True:
            await bench.until(lambda: served(waiting) > 0)
            if not next(filter(has_call, waiting)).failed(ExitStatus.NO_ROOM, "it takes none"):
                break
            await wait_all_tasks_blocked()
        assert DOUBT_S <= trio.current_time() - began < DOUBT_S + 2 * AGAIN_S
        await wait_all_tasks_blocked()
        assert {str(client.error) for client in waiting if client.error} == {"it takes none"}


async def test_what_has_taken_a_call_lacks_room_for_as_long_as_it_takes(autojump_clock: MockClock) -> None:
    async with bench_of(20) as bench:
        await bench.have(2)
        (once,) = await bench.have(1, service="other/s+1")
        once.end()
        for _ in range(20):
            (client,) = await bench.want("b/c", service="other/s+1")
            await bench.until(partial(has_call, client))
            assert client.failed(ExitStatus.NO_ROOM)


@pytest.mark.parametrize("failing", [["bad"], ["bad", "other"]])
async def test_nothing_that_others_use_is_cut_for_targets_whose_calls_find_no_room(
    autojump_clock: MockClock, failing: list[str]
) -> None:
    async with bench_of(20) as bench:
        idle = []
        for _ in range(3):
            idle += await bench.want("web/a")
            idle[-1].through()
            idle[-1].quiet_s = 10.0
        (unused,) = await bench.have(1, kind=Kind.MUX, service="work/m")
        unused.quiet_s = 10.0
        began = [(await bench.want("b/c", service=f"{target}/s+1"))[0] for target in failing]
        for client in began:
            assert client.failed(ExitStatus.NO_ROOM)
        for target in failing:
            await bench.want("b/c", service=f"{target}/s+1")
        await trio.sleep(3 * AGAIN_S)
        assert served(idle) == 3
        assert not unused.has_call


async def test_idle_connections_to_a_target_make_room_for_others_to_it(autojump_clock: MockClock) -> None:
    async with bench_of(20) as bench:
        idle = []
        for _ in range(3):
            idle += await bench.want("web/a")
            idle[-1].through()
            idle[-1].quiet_s = 10.0
        (failed,) = await bench.want("web/b")
        assert failed.failed(ExitStatus.NO_ROOM)
        (again,) = await bench.want("web/b")
        await bench.until(lambda: again.has_call)
        assert served(idle) == 2


async def test_a_call_that_began_before_room_was_made_says_nothing_of_that(autojump_clock: MockClock) -> None:
    async with bench_of(20) as bench:
        living = await bench.have(4)
        one, other = await bench.want("b/c", "b/c", service="bad/s+1")
        await trio.sleep(0.1)
        assert one.failed(ExitStatus.NO_ROOM)
        for client in living[:3]:
            client.end()
        await wait_all_tasks_blocked()
        assert other.failed(ExitStatus.NO_ROOM)


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


async def test_a_call_that_found_no_room_beside_one_that_is_over_since_is_made_again(
    autojump_clock: MockClock,
) -> None:
    """On a busy machine its end may be heard of first. Alone it is refused, as nothing will make room."""
    async with bench_of(20) as bench:
        (had_room,) = await bench.have(1)
        (found_none,) = await bench.want("r/s")
        had_room.end()
        await had_room.ended.wait()
        assert found_none.failed(ExitStatus.NO_ROOM)
        (again,) = await bench.want("r/s")
        assert not again.has_call
        await bench.until(lambda: again.has_call)
        assert not again.failed(ExitStatus.NO_ROOM)


async def test_a_call_that_was_through_has_had_room_whatever_its_target_says(
    autojump_clock: MockClock,
) -> None:
    async with bench_of(20) as bench:
        other, forging = await bench.have(2)
        other.end()
        await other.ended.wait()
        assert not forging.failed(ExitStatus.NO_ROOM)


async def test_the_last_of_those_that_found_no_room_is_refused_and_with_it_all_who_wait(
    autojump_clock: MockClock,
) -> None:
    async with bench_of(20) as bench:
        clients = await bench.want(*["r/s"] * 10)
        verdicts = [client.failed(ExitStatus.NO_ROOM) for client in clients[:BEGIN_MAX]]
        assert verdicts == [True] * (BEGIN_MAX - 1) + [False]
        await wait_all_tasks_blocked()
        assert [client.error is not None for client in clients[BEGIN_MAX:]] == [True] * (10 - BEGIN_MAX)


async def test_the_first_call_that_finds_no_room_is_a_refusal(autojump_clock: MockClock) -> None:
    async with bench_of(20) as bench:
        (alone,) = await bench.want()
        assert not alone.failed(ExitStatus.NO_ROOM)
        (other,) = await bench.want()
        assert not other.has_call
