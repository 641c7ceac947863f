# SPDX-License-Identifier: GPL-2.0-or-later
"""A tunnel that cannot be had, or is lost: what waits is told, and dom0 is left alone."""

import os
import signal
import socket
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
import trio
from helpers import (
    BOUND_S,
    FakeClient,
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
from tunnels_bench import ORIGIN, Clock, one, tunnels_to

from qubes_fwd_qrexec import tunnels as tunnels_module
from qubes_fwd_qrexec.errors import RefusedError
from qubes_fwd_qrexec.targets import Target
from qubes_fwd_qrexec.tunnel import ProxyVersion

pytestmark = pytest.mark.usefixtures("tunnel_home")


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("exit126", "policy refuses the call"),
        ("exit127", "does not have the service"),
        ("exit125", "cannot be reached"),
        ("exit0", "without a final GOAWAY"),
    ],
)
@pytest.mark.usefixtures("long_back_off")
async def test_a_call_that_fails_is_a_reason_of_its_own_and_dom0_is_left_alone(
    tmp_path: Path, mode: str, words: str
) -> None:
    """relay-behaviours 23 and 24."""
    client, port = FakeClient(tmp_path, mode), free_port()
    async with tunnels_to(client.command, one(port)) as bench:
        first = await bench.refusal(port)
        assert first.startswith("no tunnel to work: ")
        assert words in first
        for _ in range(20):
            again = await bench.refusal(port)
            assert "is tried again in" in again
            assert words in again
        assert bench.target.calls == 0
        assert not bench.tunnels._tunnels
    assert len(client.calls) == 1


async def test_a_client_program_that_is_not_there_is_named() -> None:
    port = free_port()
    async with tunnels_to(("/nonexistent/client",), one(port)) as bench:
        assert "cannot start /nonexistent/client: No such file" in await bench.refusal(port)


async def test_all_who_wait_are_told_when_the_call_dies_before_its_hello(tmp_path: Path) -> None:
    client, port = FakeClient(tmp_path, "die"), free_port()
    async with tunnels_to(client.command, one(port)) as bench, AsyncExitStack() as stack:
        for _ in range(20):
            await stack.enter_async_context(bench.connect(port))
        await bench.endings.reach(20)
        assert all(isinstance(ending, RefusedError) for ending in bench.endings)
    assert len(client.calls) == 1


async def test_waiting_is_bounded_in_number_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """relay-behaviours 25 and 26."""
    monkeypatch.setattr(tunnels_module, "WAITING_MAX", 5)
    client, port = FakeClient(tmp_path, "hang"), free_port()
    clock = Clock(monkeypatch)
    async with tunnels_to(client.command, one(port)) as bench, AsyncExitStack() as stack:
        for _ in range(5):
            await stack.enter_async_context(bench.connect(port))
        await until(lambda: bench.tunnels._waiting == 5 and client.calls)
        assert await bench.refusal(port) == "5 connections wait for a tunnel to work"
        await clock.advance(29.9)
        assert not bench.endings
        await clock.advance(0.1)
        assert {str(ending) for ending in bench.endings} == {"no tunnel to work within 30 s"}
        assert len(bench.endings) == 5
        assert bench.tunnels._waiting == 0
    assert len(client.calls) == 1


async def test_without_a_slot_for_another_call_it_says_so_and_blames_nobody(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qubes_fwd_qrexec.targets.WAIT_S", 0.05)
    client, target, port = FakeClient(tmp_path, "serve"), Target("work", 1), port_of(server)
    async with tunnels_to(client.command, one(port), target=target) as bench:
        async with target.slot("another service"):
            assert "work has 1 calls, and none ended" in await bench.refusal(port)
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)


# When it is lost


@pytest.mark.usefixtures("long_back_off", "said_once")
async def test_a_killed_call_is_an_abort_for_everybody_and_the_next_connection_has_a_new_one(
    tmp_path: Path, server: socket.socket, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """relay-behaviours 27 and 28: a second is not over, for no timer of the loop is waited for."""
    slow_timers(monkeypatch)
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    async with tunnels_to(client.command, one(port)) as bench:
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
        await until(lambda: not bench.tunnels._tunnels)
        assert "is tried again in" in await bench.refusal(port)
    assert len(client.calls) == 2
    assert len([m for m in caplog.messages if "a tunnel to work was lost" in m]) == 1


def kill_children() -> None:
    for pid in children():
        os.kill(pid, signal.SIGKILL)


async def test_a_tunnel_that_was_proven_is_forgiven_its_end(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it has lived for 10 s: one that is lost before is not tried again at once a second time."""
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    clock = Clock(monkeypatch)
    async with tunnels_to(client.command, one(port)) as bench:
        for _ in range(4):
            async with bench.connect(port) as near, await accept(server) as far:
                await echo_once(near, far)
                was_lost_before = bool(bench.target._back_offs)
                await clock.advance(9)
                assert bool(bench.target._back_offs) is was_lost_before
                await clock.advance(1)
                assert not bench.target._back_offs
                kill_children()
                assert await is_reset(near)
            await until(lambda: not bench.tunnels._tunnels)
            assert bench.target._back_offs
    assert len(client.calls) == 4


@pytest.mark.parametrize("mode", ["rude close", "rude drain", "rude die", "rude refuse"])
@pytest.mark.usefixtures("long_back_off")
async def test_a_target_that_gives_tunnels_up_is_no_flood_of_calls(tmp_path: Path, mode: str) -> None:
    client, port = FakeClient(tmp_path, mode), free_port()
    async with tunnels_to(client.command, one(port)) as bench:
        for _ in range(20):
            near, accepted = tcp_pair()
            with near, accepted, trio.fail_after(BOUND_S), suppress(RefusedError):
                await bench.tunnels.relay(accepted, port, ORIGIN, ProxyVersion.OFF)
    assert len(client.calls) <= 3


async def test_a_stream_is_not_asked_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "check_back_off", lambda *_: None)
    monkeypatch.setattr(tunnels_module, "_TRIES", 2)
    client, port = FakeClient(tmp_path, "rude refuse"), free_port()
    async with tunnels_to(client.command, one(port)) as bench:
        assert await bench.refusal(port) == "work took none of 2 requests for a stream"
    assert len(client.calls) == 2
