# SPDX-License-Identifier: GPL-2.0-or-later
"""Calls that find no room for a vchan in this qube, and targets whose calls end as if they had found none."""

import pytest
import trio
from budgetbench import bench_of, served
from trio.testing import MockClock, wait_all_tasks_blocked

from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.exposed.callbudget import BEGIN_MAX
from qubes_fwd_qrexec.exposed.callqueue import Kind
from qubes_fwd_qrexec.exposed.callwaits import AGAIN_S


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


async def test_a_target_that_takes_no_call_keeps_nobody_out_of_others(autojump_clock: MockClock) -> None:
    """Its calls end with the status of those that find no room; who gets through then shows that there is."""
    async with bench_of(20) as bench:
        await bench.have(2)
        (failed,) = await bench.want("b/c", service="bad/s+1")
        assert failed.failed(ExitStatus.NO_ROOM)
        (first,) = await bench.want("b/c", service="bad/s+1")
        (other,) = await bench.want("r/s")
        await bench.until(lambda: served([first, other]) > 0)
        assert (first.has_call, other.has_call) == (
            False,
            True,
        )  # although it has asked first, and has no call
        other.through()
        await wait_all_tasks_blocked()
        assert first.has_call
        assert not first.failed(ExitStatus.NO_ROOM, "it takes none")
        (later,) = await bench.want("b/c", service="bad/s+1")
        assert not later.has_call
        assert served(await bench.want("r/s", service="third/s+1")) == 1
        await bench.until(lambda: later.has_call)
        later.through()
        (another,) = await bench.want("b/c", service="bad/s+1")
        assert another.failed(ExitStatus.NO_ROOM)  # it takes calls after all


@pytest.mark.parametrize(("ending", "is_the_targets"), [(1, False), (2, True)])
async def test_a_target_for_which_room_was_made_in_vain_takes_no_call(
    autojump_clock: MockClock, ending: int, is_the_targets: bool
) -> None:
    """The room of a single call is too small for a mux call, and that of two is not."""
    async with bench_of(20) as bench:
        living = await bench.have(4)
        (failed,) = await bench.want(service="bad/s+1")
        assert failed.failed(ExitStatus.NO_ROOM)
        await trio.sleep(0.1)
        for client in living[:ending]:
            client.end()
        (again,) = await bench.want(service="bad/s+1")
        await wait_all_tasks_blocked()
        assert again.failed(ExitStatus.NO_ROOM) is not is_the_targets
        others = await bench.want("r/s", "r/s", "r/s")
        assert served(others) == (3 if is_the_targets else 0)


@pytest.mark.parametrize("kind", [Kind.SINGLE, Kind.MUX])
async def test_a_small_call_that_gets_through_says_nothing_of_room_for_a_large_one(
    autojump_clock: MockClock, kind: Kind
) -> None:
    async with bench_of(20) as bench:
        await bench.have(2)
        (failed,) = await bench.want(kind=kind, service="large/s+1")
        assert failed.failed(ExitStatus.NO_ROOM)
        (other,) = await bench.want("r/s")
        await bench.until(lambda: other.has_call)
        other.through()
        (again,) = await bench.want(kind=kind, service="large/s+1")
        await bench.until(lambda: again.has_call)
        assert again.failed(ExitStatus.NO_ROOM) is (kind is Kind.MUX)  # it waits for room, or is refused


@pytest.mark.parametrize("ending", [0, 2])
async def test_a_call_that_may_have_had_the_room_of_one_that_ended_says_nothing(
    autojump_clock: MockClock, ending: int
) -> None:
    async with bench_of(20) as bench:
        living = await bench.have(4)
        (failed,) = await bench.want(service="other/s+1")
        assert failed.failed(ExitStatus.NO_ROOM)
        (tried,) = await bench.want("r/s")
        await bench.until(lambda: tried.has_call)
        await trio.sleep(0.1)
        for client in living[:ending]:
            client.end()
        await wait_all_tasks_blocked()
        tried.through()
        (again,) = await bench.want(service="other/s+1")
        await bench.until(lambda: again.has_call)
        assert again.failed(ExitStatus.NO_ROOM) is (ending > 0)


async def test_a_call_beside_which_others_ended_says_nothing_of_its_target(autojump_clock: MockClock) -> None:
    """Two calls fewer are left when it is heard of, but it has tried beside as many as the first one."""
    async with bench_of(20) as bench:
        living = await bench.have(4)
        (failed,) = await bench.want(service="other/s+1")
        assert failed.failed(ExitStatus.NO_ROOM)
        (again,) = await bench.want(service="other/s+1")
        await bench.until(lambda: again.has_call)
        await trio.sleep(0.1)
        for client in living[:2]:
            client.end()
        await wait_all_tasks_blocked()
        assert again.failed(ExitStatus.NO_ROOM)


async def test_a_change_of_the_configuration_forgets_which_target_was_at_fault(
    autojump_clock: MockClock,
) -> None:
    async with bench_of(20) as bench:
        living = await bench.have(4)
        for is_the_targets in (False, True):
            (failed,) = await bench.want(service="bad/s+1")
            assert failed.failed(ExitStatus.NO_ROOM) is not is_the_targets
            await trio.sleep(0.1)
            for client in living[:2]:
                client.end()
            await wait_all_tasks_blocked()
        bench.budget.forget_refusals()
        (again,) = await bench.want(service="bad/s+1")
        assert again.failed(ExitStatus.NO_ROOM)


@pytest.mark.parametrize(("failing", "cut"), [(["bad"], 0), (["bad", "other"], 1)])
async def test_nothing_in_use_is_cut_because_a_single_target_finds_no_room(
    autojump_clock: MockClock, failing: list[str], cut: int
) -> None:
    async with bench_of(20) as bench:
        idle = await bench.want(*["web/a"] * 3)
        for client in idle:
            client.through()
            client.quiet_s = 10.0
        began = [(await bench.want("b/c", service=f"{target}/s+1"))[0] for target in failing]
        for client in began:
            assert client.failed(ExitStatus.NO_ROOM)
        await bench.want("b/c", service="bad/s+1")
        await trio.sleep(AGAIN_S / 2)
        assert served(idle) == 3 - cut


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
