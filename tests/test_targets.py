# SPDX-License-Identifier: GPL-2.0-or-later
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from qubes_fwd_qrexec.errors import RefusedError
from qubes_fwd_qrexec.targets import BACK_OFF_MAX_S, WAIT_S, WAITING_MAX, Target


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


async def hold(target: Target, until: trio.Event) -> None:
    async with target.slot("s+1"):
        await until.wait()


async def is_refused(target: Target, service: str = "s+1") -> bool:
    try:
        async with target.slot(service):
            return False
    except RefusedError:
        return True


async def test_no_more_calls_than_the_cap_and_the_next_one_waits_for_a_slot() -> None:
    target = Target("work", 2)
    over = trio.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(hold, target, over)
        await wait_all_tasks_blocked()
        assert target.calls == 2
        over.set()
    assert target.calls == 0


async def test_ten_thousand_slots_come_back() -> None:
    target = Target("work", 32)
    for turn in range(10_000):
        try:
            async with target.slot("s+1"):
                if turn % 3 == 0:
                    raise ValueError
        except ValueError:
            pass
    assert target.calls == 0


async def test_a_cancelled_waiter_takes_no_slot_with_it() -> None:
    target = Target("work", 1)
    over = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hold, target, over)
        await wait_all_tasks_blocked()
        async with trio.open_nursery() as waiters:
            for _ in range(5):
                waiters.start_soon(hold, target, over)
            await wait_all_tasks_blocked()
            waiters.cancel_scope.cancel()
        assert target.calls == 1
        over.set()
    assert not await is_refused(target)
    assert target.calls == 0


async def test_the_queue_has_a_bound() -> None:
    target = Target("work", 1)
    async with trio.open_nursery() as nursery:
        for _ in range(1 + WAITING_MAX):
            nursery.start_soon(hold, target, trio.Event())
        await wait_all_tasks_blocked()
        with pytest.raises(RefusedError, match=f"{WAITING_MAX} wait"):
            async with target.slot("s+1"):
                pass
        nursery.cancel_scope.cancel()
    assert target.calls == 0


async def test_waiting_has_a_bound(autojump_clock: MockClock) -> None:
    target = Target("work", 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hold, target, trio.Event())
        await wait_all_tasks_blocked()
        began = trio.current_time()
        with pytest.raises(RefusedError, match="none ended within"):
            async with target.slot("s+1"):
                pass
        assert trio.current_time() - began == WAIT_S
        nursery.cancel_scope.cancel()


async def test_after_each_refusal_dom0_is_left_alone_for_twice_as_long() -> None:
    clock = Clock()
    target = Target("work", 2, clock, lambda: 0.0)
    for expected_s in (1, 2, 4, 8, 16, 32, 48, 48):
        target.refused("s+1", "dom0 refused it")
        clock.now_s += expected_s - 0.01
        assert await is_refused(target)
        clock.now_s += 0.02
        assert not await is_refused(target)


async def test_chance_adds_up_to_a_quarter_and_never_goes_past_the_bound() -> None:
    clock = Clock()
    target = Target("work", 2, clock, lambda: 1.0)
    for expected_s in (1.25, 2.5, 5, 10, 20, 40, BACK_OFF_MAX_S, BACK_OFF_MAX_S):
        target.refused("s+1", "dom0 refused it")
        clock.now_s += expected_s - 0.01
        assert await is_refused(target)
        clock.now_s += 0.02
        assert not await is_refused(target)
    assert len({random() for random in [Target("work")._chance] * 20}) > 1


async def test_a_lost_call_is_asked_for_again_at_once_but_only_once() -> None:
    clock = Clock()
    target = Target("work", 2, clock, lambda: 0.0)
    target.lost("s+1", "it was killed")
    assert not await is_refused(target)
    target.lost("s+1", "it was killed")
    assert await is_refused(target)
    clock.now_s += 1.01
    target.lost("s+1", "it was killed")
    clock.now_s += 1.01
    assert await is_refused(target)
    target.accepted("s+1")
    target.lost("s+1", "it was killed")
    assert not await is_refused(target)


async def test_the_reason_is_said_again() -> None:
    target = Target("work", 2, Clock())
    target.refused("s+1", "the target does not have the service")
    with pytest.raises(
        RefusedError, match=r"s\+1 in work is tried again in 1\.\d s: the target does not have"
    ):
        target.check_back_off("s+1")


async def test_several_refusals_at_once_count_as_one() -> None:
    clock = Clock()
    target = Target("work", 2, clock, lambda: 0.0)
    for _ in range(10):
        target.refused("s+1", "dom0 refused it")
    clock.now_s += 1.01
    assert not await is_refused(target)


async def test_a_refused_port_does_not_refuse_its_neighbour() -> None:
    target = Target("work", 2, Clock())
    target.refused("s+1", "dom0 refused it")
    assert await is_refused(target, "s+1")
    assert not await is_refused(target, "s+2")
    target.accepted("s+2")
    assert await is_refused(target, "s+1")


async def test_a_call_that_goes_through_or_a_new_configuration_ends_the_back_off() -> None:
    target = Target("work", 2, Clock())
    target.refused("s+1", "dom0 refused it")
    target.accepted("s+1")
    assert not await is_refused(target)
    target.refused("s+1", "dom0 refused it")
    target.forget_refusals()
    assert not await is_refused(target)


async def test_those_who_wait_when_a_refusal_comes_are_refused_too() -> None:
    target = Target("work", 1, Clock())
    over = trio.Event()
    refused: list[bool] = []

    async def wait() -> None:
        refused.append(await is_refused(target))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hold, target, over)
        await wait_all_tasks_blocked()
        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        target.refused("s+1", "dom0 refused it")
        over.set()
    assert refused == [True]
    assert target.calls == 0
