# SPDX-License-Identifier: GPL-2.0-or-later
"""A mux call that fails or is lost: waiting connections are refused, and dom0 is left alone."""

import math
import os
import signal
import socket
from contextlib import AsyncExitStack
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
import trio
from fakeclient import FakeClient
from helpers import (
    BOUND_S,
    NEVER_AGAIN,
    accept,
    children,
    echo_once,
    free_port,
    is_reset,
    port_of,
    tcp_pair,
    until,
)
from loop_time import slow_timers
from muxpool_bench import ORIGIN, Clock, one, pool_to

from qubes_fwd_qrexec.common.report import Way
from qubes_fwd_qrexec.exposed import muxpool as muxpool_module
from qubes_fwd_qrexec.exposed import streampool as streampool_module
from qubes_fwd_qrexec.exposed.callqueue import Kind
from qubes_fwd_qrexec.exposed.callwaits import CallWaits
from qubes_fwd_qrexec.exposed.connectionlog import How
from qubes_fwd_qrexec.exposed.crowd import client_key

pytestmark = pytest.mark.usefixtures("mux_call_home")


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("exit126", "policy refuses the call"),
        ("exit127", "does not have the service"),
        ("exit125", "cannot be reached"),
        ("exit0", "without a final GOAWAY"),
        # A target that has taken the call can say what it likes.
        ("taken1", "the call ended with exit status 1"),
    ],
)
async def test_a_call_that_fails_is_a_reason_of_its_own_and_dom0_is_left_alone(
    tmp_path: Path, mode: str, words: str
) -> None:
    """docs/behaviours.md, 23 and 24."""
    client, port = FakeClient(tmp_path, mode), free_port()
    async with pool_to(client.command, one(port), waits=NEVER_AGAIN) as bench:
        first = await bench.refusal(port)
        assert first.startswith("no mux call to work: ")
        assert words in first
        for _ in range(20):
            assert await bench.refusal(port) == first
        assert bench.calls.calls == 0
        assert not bench.pool.mux_calls
    assert len(client.calls) == 1


async def test_a_client_program_that_is_not_there_is_named() -> None:
    port = free_port()
    async with pool_to(("/nonexistent/client",), one(port)) as bench:
        assert "cannot start /nonexistent/client: No such file" in await bench.refusal(port)


async def test_everybody_who_waits_is_refused_when_the_call_dies_before_hello(tmp_path: Path) -> None:
    client, port = FakeClient(tmp_path, "die"), free_port()
    async with pool_to(client.command, one(port)) as bench, AsyncExitStack() as stack:
        for _ in range(20):
            await stack.enter_async_context(bench.connect(port))
        await bench.endings.reach(20)
        assert all(ending.how is How.REFUSED for ending in bench.endings)
    assert len(client.calls) == 1


async def test_waiting_is_bounded_in_number_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/behaviours.md, 25."""
    monkeypatch.setattr(streampool_module, "WAITING_MAX", 5)
    client, port = FakeClient(tmp_path, "hang"), free_port()
    clock = Clock(monkeypatch)
    async with pool_to(client.command, one(port)) as bench, AsyncExitStack() as stack:
        for _ in range(5):
            await stack.enter_async_context(bench.connect(port))
        await until(lambda: bench.pool.waiting == 5 and client.calls)
        assert await bench.refusal(port) == "5 connections wait for a mux call to work"
        await clock.advance(119.9)
        assert not bench.endings
        await clock.advance(0.1)
        await bench.endings.reach(5)
        assert {ending.error for ending in bench.endings} == {"no mux call to work within 120 s"}
        assert not bench.pool.waiting
    assert len(client.calls) == 1


async def test_one_client_cannot_take_all_places_in_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streampool_module, "WAITING_MAX", 5)
    client, port = FakeClient(tmp_path, "hang"), free_port()
    other = replace(ORIGIN, client=ip_address("192.0.2.77"))
    async with pool_to(client.command, one(port)) as bench, AsyncExitStack() as stack:
        for _ in range(5):
            await stack.enter_async_context(bench.connect(port))
        await until(lambda: bench.pool.waiting == 5)
        ours, accepted = tcp_pair()
        with ours:
            bench.tasks.start_soon(bench.carry, accepted, port, other)
            await bench.endings.reach(1)
            assert bench.endings[0].how is How.MADE_ROOM
            assert client_key(other.client) in bench.pool.users()
            bench.tasks.cancel_scope.cancel()


async def test_who_holds_one_place_in_the_queue_keeps_it_however_many_others_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streampool_module, "WAITING_MAX", 3)
    client, port = FakeClient(tmp_path, "hang"), free_port()
    async with pool_to(client.command, one(port)) as bench, AsyncExitStack() as stack:
        for number in range(5):
            ours, accepted = tcp_pair()
            stack.enter_context(ours)
            origin = replace(ORIGIN, client=ip_address(f"192.0.2.{number}"))
            bench.tasks.start_soon(bench.carry, accepted, port, origin)
            await until(lambda number=number: bench.pool.waiting + len(bench.endings) == number + 1)
        assert [ending.how for ending in bench.endings] == [How.REFUSED] * 2
        assert bench.pool.users() == {client_key(ip_address(f"192.0.2.{number}")) for number in range(3)}
        bench.tasks.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("mode", "bound", "words"),
    [
        ("hang", "OPEN_S", "work has not taken the call within 0.2 s"),
        ("mute", "HELLO_S", "no HELLO within 0.2 s"),
    ],
)
async def test_a_call_that_hangs_is_ended_before_the_target_took_it_or_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, bound: str, words: str
) -> None:
    """docs/behaviours.md, 26. A cold target may take long to answer, and one that is there may not."""
    monkeypatch.setattr(muxpool_module, bound, 0.2)
    monkeypatch.setattr(muxpool_module, "OPEN_S" if bound == "HELLO_S" else "HELLO_S", 1e6)
    client, port = FakeClient(tmp_path, mode), free_port()
    async with pool_to(client.command, one(port)) as bench:
        near = bench.connect(port)
        await bench.endings.reach(1)
        await near.aclose()
        await until(lambda: not bench.pool.mux_calls)
        assert bench.endings[0].error in (f"no mux call to work: {words}", "no mux call to work within 0.2 s")
        assert bench.calls.calls == 0


async def test_a_target_that_stays_full_is_not_asked_for_longer_than_anybody_waits(tmp_path: Path) -> None:
    client, port = FakeClient(tmp_path, "exit126"), free_port()
    waits = CallWaits(wait_s=1.0, again_s=0.0, doubt_s=math.inf)
    async with (
        pool_to(client.command, one(port), waits=waits) as bench,
        bench.calls.place(Kind.SINGLE, "work", "another") as living,
    ):
        living.through()
        assert "work takes no more than 1 calls of this qube" in await bench.refusal(port)


async def test_without_room_for_another_call_it_says_so_and_blames_nobody(
    tmp_path: Path, server: socket.socket
) -> None:
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    async with pool_to(client.command, one(port), calls_max=1, waits=CallWaits(wait_s=0.05)) as bench:
        async with bench.calls.place(Kind.SINGLE, "work", "another"):
            assert "this qube makes 1 calls, and none ended in time" in await bench.refusal(port)
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)


# When it is lost


@pytest.mark.usefixtures("said_once")
async def test_a_killed_call_is_an_abort_for_everybody_and_the_next_connection_has_a_new_one(
    tmp_path: Path, server: socket.socket, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/behaviours.md, 27: no timer of the loop is waited for."""
    slow_timers(monkeypatch)
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    async with pool_to(client.command, one(port)) as bench:
        async with AsyncExitStack() as stack:
            pairs = []
            for _ in range(5):
                near = await stack.enter_async_context(bench.connect(port))
                pairs.append((near, await stack.enter_async_context(await accept(server))))
            for near, far in pairs:
                await echo_once(near, far)
            kill_children()
            for near, far in pairs:
                assert await is_reset(near)
                assert await is_reset(far)
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            kill_children()
            assert await is_reset(near)
        await until(lambda: not bench.pool.mux_calls)
        assert bench.pool.way is Way.FAILED
        assert bench.pool.last_problem is not None
        assert "a mux call to work was lost" in bench.pool.last_problem[0]
    assert len(client.calls) == 2
    assert len([m for m in caplog.messages if "a mux call to work was lost" in m]) == 1


def kill_children() -> None:
    for pid in children():
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("mode", ["rude close", "rude drain", "rude die", "rude refuse"])
async def test_a_target_that_gives_mux_calls_up_is_no_flood_of_calls(tmp_path: Path, mode: str) -> None:
    client, port = FakeClient(tmp_path, mode), free_port()
    async with pool_to(client.command, one(port), waits=NEVER_AGAIN) as bench:
        for _ in range(20):
            near, accepted = tcp_pair()
            with near, trio.fail_after(BOUND_S):
                await bench.relay(accepted, port)
    assert len(client.calls) <= 3


async def test_a_stream_is_not_asked_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streampool_module, "_TRIES", 2)
    client, port = FakeClient(tmp_path, "rude refuse"), free_port()
    async with pool_to(client.command, one(port), waits=CallWaits(again_s=0.0)) as bench:
        assert await bench.refusal(port) == "work took none of 2 requests for a stream"
    assert len(client.calls) == 2
