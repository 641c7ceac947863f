# SPDX-License-Identifier: GPL-2.0-or-later
"""One budget for all qrexec calls of a qube: whom a refusal concerns, and when dom0 is asked again."""

from functools import partial

import trio
from budgetbench import Client, bench_of, has_call, served
from trio.testing import MockClock, wait_all_tasks_blocked

from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.exposed.callbudget import (
    BEGIN_MAX,
)
from qubes_fwd_qrexec.exposed.callqueue import Kind
from qubes_fwd_qrexec.exposed.callwaits import AGAIN_S

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


async def test_a_renewal_does_not_wait_for_a_try_that_hangs(autojump_clock: MockClock) -> None:
    async with bench_of(20) as bench:
        await bench.have(1, kind=Kind.MUX, service="work/m")
        (failed,) = await bench.want("r/s")
        assert failed.failed(ExitStatus.NO_ROOM)
        (hanging,) = await bench.want("r/s")
        await bench.until(partial(has_call, hanging))
        (renewal,) = await bench.want(kind=Kind.RENEWAL, service="work/m")
        assert renewal.has_call


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
            await bench.until(partial(has_call, mux))
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
