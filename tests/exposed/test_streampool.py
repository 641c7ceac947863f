# SPDX-License-Identifier: GPL-2.0-or-later
"""Connections that wait for a mux call: what happens around them meanwhile ends each of them exactly."""

import os
import shlex
import signal
import socket
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from fakeclient import FakeClient
from helpers import (
    BOUND_S,
    accept,
    children,
    connect,
    echo_once,
    free_port,
    is_listening,
    is_reset,
    port_of,
    running_listener,
    until,
    write_config,
)
from loop_time import slow_timers
from muxpool_bench import one, pool_to

from qubes_fwd_qrexec.exposed import streampool
from qubes_fwd_qrexec.exposed.listener import Listener
from qubes_fwd_qrexec.system.configsource import FileSource

pytestmark = pytest.mark.usefixtures("mux_call_home")


def waiting_in(listener: Listener) -> int:
    return sum(pool.waiting for pool in listener.transports.pools.values())


async def test_more_than_are_served_in_one_turn_are_all_served(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others in the next turns: the timer that looks for room is not waited for."""
    slow_timers(monkeypatch)
    monkeypatch.setattr(streampool, "_BURST", 1)
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    async with pool_to(client.command, one(port)) as bench, AsyncExitStack() as stack:
        for _ in range(10):
            await stack.enter_async_context(bench.connect(port))
        with trio.fail_after(BOUND_S):
            for _ in range(10):
                await stack.enter_async_context(await accept(server))
        assert bench.pool.waiting == 0
    assert len(client.calls) == 1


async def test_the_call_dies_while_connections_wait_for_room(tmp_path: Path, server: socket.socket) -> None:
    """They have another one, and those that it carried an abort."""
    client, port = FakeClient(tmp_path, "mux STREAMS_MAX=2"), port_of(server)
    async with pool_to(client.command, one(port)) as bench, AsyncExitStack() as stack:
        carried = [await stack.enter_async_context(bench.connect(port)) for _ in range(2)]
        for _ in carried:
            await stack.enter_async_context(await accept(server))
        (service,) = children()
        waiting = [await stack.enter_async_context(bench.connect(port)) for _ in range(2)]
        os.kill(service, signal.SIGKILL)
        for near in carried:
            assert await is_reset(near)
        for _ in waiting:
            far = await stack.enter_async_context(await accept(server))
            await far.send_all(b"x")
        with trio.fail_after(BOUND_S):
            assert [await near.receive_some() for near in waiting] == [b"x", b"x"]


@pytest.mark.parametrize("transport", ["mux", "call"])
async def test_stopped_twice_nobody_waits_any_more(tmp_path: Path, transport: str) -> None:
    port, client = free_port(), FakeClient(tmp_path, "hang")
    write_config(tmp_path / "config", port, 80, transport=transport)
    listener = Listener(FileSource(tmp_path / "config"), client.command, drain_s=1000)
    with trio.fail_after(BOUND_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(listener.run)
            async with await connect(port) as near, await connect(port) as other:
                await until(lambda: client.calls and listener.process.connections == 2)
                listener.stop()
                await until(lambda: not is_listening(port))
                listener.stop()
                assert await is_reset(near)
                assert await is_reset(other)
    assert listener.process.connections == 0


@pytest.mark.parametrize("transport", ["mux", "call"])
async def test_a_forward_that_ends_ends_who_waits(tmp_path: Path, transport: str) -> None:
    port, client = free_port(), FakeClient(tmp_path, "hang")
    config = write_config(tmp_path / "config", port, 80, transport=transport)
    async with running_listener(tmp_path / "config", client.command) as listener:  # noqa: SIM117
        async with await connect(port) as near:
            await until(lambda: listener.process.connections == 1)
            config.unlink()
            listener.reload()
            assert await is_reset(near)
            await until(lambda: listener.process.connections == 0)
            assert waiting_in(listener) == 0


async def test_who_waits_when_the_range_grows_is_served_over_a_call_for_the_new_one(
    tmp_path: Path, server: socket.socket
) -> None:
    """docs/behaviours.md, 29: the call for the one port never gets through, and dom0 would refuse it now."""
    port, target = free_port(), port_of(server)
    for name in ("one", "range"):
        (tmp_path / name).mkdir()
    hangs, serves = FakeClient(tmp_path / "one", "hang"), FakeClient(tmp_path / "range", "serve")
    by_ports = (
        f'case "$*" in *[0-9]-[0-9]*) exec {shlex.join(serves.command)} "$@";; '
        f'*) exec {shlex.join(hangs.command)} "$@";; esac'
    )
    write_config(tmp_path / "config", port, target, transport="mux")
    client = ("/bin/sh", "-c", by_ports, "client")
    async with running_listener(tmp_path / "config", client) as listener:  # noqa: SIM117
        async with await connect(port) as near:
            await until(lambda: hangs.calls and waiting_in(listener) == 1)
            wider = {"srcports": f"{port}-{port + 1}", "dstports": f"{target}-{target + 1}"}
            write_config(tmp_path / "config", port, target, transport="mux", **wider)
            listener.reload()
            async with await accept(server) as far:
                await echo_once(near, far)
    assert serves.calls == [f"work qubes.ForwardTCP+{target}-{target + 1}+mux"]
