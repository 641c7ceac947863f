# SPDX-License-Identifier: GPL-2.0-or-later
"""A mux call in use asks dom0 again before its lease is over, so that connections that stay need no calls."""

import math
import socket
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from fakeclient import FakeClient
from helpers import BOUND_S, accept, echo_once, port_of, until
from muxpool_bench import Bench, Clock, end_well, one, pool_to

from qubes_fwd_qrexec.exposed import muxpool as muxpool_module
from qubes_fwd_qrexec.exposed.muxpool import RENEW_AT_SHARE
from qubes_fwd_qrexec.target.callservice import LEASE_S

pytestmark = pytest.mark.usefixtures("mux_call_home")

# When dom0 is asked again, in seconds after a mux call is ready.
_DUE_S = LEASE_S * RENEW_AT_SHARE


async def renewed(bench: Bench, client: FakeClient, calls: int) -> None:
    """Wait until there were so many calls in all, and the last one is over."""
    await until(lambda: len(client.calls) == calls and not bench.pool.is_renewing)


async def test_while_it_is_in_use_dom0_is_asked_again_before_its_lease_is_over(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    clock = Clock(monkeypatch)
    async with pool_to(client.command, one(port)) as bench:  # noqa: SIM117
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            (mux_call,) = bench.pool.mux_calls
            for turn in range(3):
                await clock.advance(_DUE_S - 1)
                assert not bench.pool.is_renewing
                assert len(client.calls) == turn + 1
                await clock.advance(1)
                await renewed(bench, client, turn + 2)
                assert bench.calls.calls == 1
            assert bench.pool.mux_calls == [mux_call]
            await echo_once(near, far)
    assert len(set(client.calls)) == 1


async def test_one_that_is_not_in_use_is_not_worth_a_question(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    clock = Clock(monkeypatch)
    async with pool_to(client.command, one(port), linger_s=10 * LEASE_S) as bench:
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            await end_well(near, far)
        (mux_call,) = bench.pool.mux_calls
        await until(lambda: not mux_call.carries)
        await clock.advance(_DUE_S + 10)
        assert not bench.pool.is_renewing  # a call that has begun is in no list of calls yet
        assert len(client.calls) == 1
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            await clock.advance(1)
            await renewed(bench, client, 2)


async def test_a_refused_renewal_is_tried_again_until_the_lease_is_over(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """That new connections were refused just before does not keep it from being asked."""
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    (tmp_path / "other").mkdir()
    refusing = FakeClient(tmp_path / "other", "exit126")
    clock = Clock(monkeypatch)
    async with pool_to(client.command, one(port)) as bench:  # noqa: SIM117
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            bench.pool.qrexec_client = refusing.command
            await clock.advance(_DUE_S)
            for turn in range(5):
                await renewed(bench, refusing, turn + 1)
                await clock.advance(19)
                assert len(refusing.calls) == turn + 1
                await clock.advance(1)
            await renewed(bench, refusing, 6)
            line = next(m for m in caplog.messages if "was not renewed" in m)
            assert "policy refuses" in line
            assert "their connections end in 150 s" in line
            bench.pool.qrexec_client = client.command
            await clock.advance(20)
            await renewed(bench, client, 2)
            await echo_once(near, far)
            await clock.advance(_DUE_S - 1)
            assert not bench.pool.is_renewing
            assert len(client.calls) == 2


async def test_a_renewal_that_hangs_is_ended_and_tried_again(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(muxpool_module, "_RENEW_S", 0.1)
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    (tmp_path / "other").mkdir()
    hanging = FakeClient(tmp_path / "other", "hang")
    clock = Clock(monkeypatch)
    async with pool_to(client.command, one(port)) as bench:  # noqa: SIM117
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            bench.pool.qrexec_client = hanging.command
            await clock.advance(_DUE_S)
            await until(lambda: not bench.pool.is_renewing)
            assert [m for m in caplog.messages if "not renewed: no answer within 0.1 s" in m]
            assert bench.calls.calls == 1
            monkeypatch.setattr(muxpool_module, "_RENEW_S", BOUND_S)
            bench.pool.qrexec_client = client.command
            await clock.advance(20)
            await renewed(bench, client, 2)


async def test_a_lease_that_is_renewed_lasts_in_the_target_too(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a lease of three real seconds, or ten times as long as a call takes here; renewed all the time."""
    port = port_of(server)
    (tmp_path / "before").mkdir()
    lease_s = max(3, math.ceil(10 * await a_call_takes_s(tmp_path / "before", server)))
    monkeypatch.setattr(muxpool_module, "RENEW_AT_SHARE", 0.05 / lease_s)
    monkeypatch.setattr(muxpool_module, "LOOK_S", 0.05)
    client = FakeClient(tmp_path, f"mux LEASE_S={lease_s}")
    async with pool_to(client.command, one(port)) as bench:  # noqa: SIM117
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            (mux_call,) = bench.pool.mux_calls
            await until(lambda: trio.current_time() > mux_call.ready_at + lease_s + 0.2)
            assert len(client.calls) > 2
            assert mux_call.has_room
            async with bench.connect(port) as new_near, await accept(server) as new_far:
                await echo_once(new_near, new_far)
            assert bench.pool.mux_calls == [mux_call]


async def test_one_question_is_for_all_calls_where_the_first_are_full(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, port = FakeClient(tmp_path, "mux STREAMS_MAX=1"), port_of(server)
    clock = Clock(monkeypatch)
    async with pool_to(client.command, one(port)) as bench, AsyncExitStack() as stack:
        for _ in range(3):
            near = await stack.enter_async_context(bench.connect(port))
            await echo_once(near, await stack.enter_async_context(await accept(server)))
        assert len(client.calls) == bench.pool.count == 3
        for turn in range(2):
            await clock.advance(_DUE_S - 1)
            assert (len(client.calls), bench.pool.is_renewing) == (3 + turn, False)
            await clock.advance(1)
            await renewed(bench, client, 4 + turn)


async def test_in_the_target_it_renews_each_of_the_calls_which_are_processes_there(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a lease as in the test above."""
    port = port_of(server)
    (tmp_path / "before").mkdir()
    lease_s = max(3, math.ceil(10 * await a_call_takes_s(tmp_path / "before", server)))
    monkeypatch.setattr(muxpool_module, "RENEW_AT_SHARE", 0.4)
    monkeypatch.setattr(muxpool_module, "LOOK_S", 0.05)
    client = FakeClient(tmp_path, f"mux LEASE_S={lease_s} STREAMS_MAX=1")
    async with pool_to(client.command, one(port)) as bench, AsyncExitStack() as stack:
        ends = []
        for _ in range(3):
            near = await stack.enter_async_context(bench.connect(port))
            ends.append((near, await stack.enter_async_context(await accept(server))))
            await echo_once(*ends[-1])
        mux_calls = list(bench.pool.mux_calls)
        ready_at = max(mux_call.ready_at for mux_call in mux_calls)
        await until(lambda: trio.current_time() > ready_at + lease_s + 0.2)
        assert bench.pool.mux_calls == mux_calls
        assert len(client.calls) > 3
        for near, far in ends:
            await echo_once(near, far)


async def a_call_takes_s(directory: Path, server: socket.socket) -> float:
    """From when it is needed until it carries."""
    began_s = trio.current_time()
    async with pool_to(FakeClient(directory, "serve").command, one(port_of(server))) as bench:  # noqa: SIM117
        async with bench.connect(port_of(server)) as near, await accept(server) as far:
            await echo_once(near, far)
            return trio.current_time() - began_s


async def test_more_connections_that_stay_than_calls_are_served(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in each lease; with a call for each, there would be none left in the end. A renewal has room beyond
    the budget, of which the mux call has all here."""
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    clock = Clock(monkeypatch)
    async with pool_to(client.command, one(port), calls_max=1) as bench:
        ends: list[tuple[trio.SocketStream, trio.SocketStream]] = []
        for turn in range(5):
            ends.append((bench.connect(port), await accept(server)))
            await echo_once(*ends[-1])
            await clock.advance(_DUE_S)
            await renewed(bench, client, turn + 2)
        for near, far in ends:
            await echo_once(near, far)
            await near.aclose()
            await far.aclose()
