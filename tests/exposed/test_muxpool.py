# SPDX-License-Identifier: GPL-2.0-or-later
"""The exposed qube's mux calls, over a stand-in for qrexec-client-vm and the real service behind it."""

import os
import random
import signal
import socket
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from endings import pattern
from fakeclient import FakeClient
from helpers import (
    BOUND_S,
    abort_stream,
    accept,
    children,
    echo_once,
    free_port,
    is_reset,
    port_of,
    tcp_pair,
    until,
)
from muxpool_bench import Clock, end_well, one, pool_to

from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.exposed.call import Ending
from qubes_fwd_qrexec.exposed.muxcall import MuxCall
from qubes_fwd_qrexec.relay.budget import FLOOR_BYTES, Budget

pytestmark = pytest.mark.usefixtures("mux_call_home")


# One mux call


async def test_many_connections_are_one_call(tmp_path: Path, server: socket.socket) -> None:
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    async with pool_to(client.command, one(port)) as bench, AsyncExitStack() as stack:
        for _ in range(10):
            near = await stack.enter_async_context(bench.connect(port))
            far = await stack.enter_async_context(await accept(server))
            await echo_once(near, far)
            await end_well(near, far)
        await bench.endings.reach(10)
        assert bench.endings == [Ending(None, 1, 1)] * 10
        assert bench.calls.calls == 1
    assert client.calls == [f"work qubes.ForwardTCP+{port}+mux"]


async def test_those_who_come_while_it_opens_share_it(tmp_path: Path, server: socket.socket) -> None:
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    async with pool_to(client.command, one(port)) as bench, AsyncExitStack() as stack:
        for _ in range(20):
            await stack.enter_async_context(bench.connect(port))
        for _ in range(20):
            await stack.enter_async_context(await accept(server))
    assert len(client.calls) == 1


async def test_a_range_is_one_call_and_every_port_its_own_server(
    tmp_path: Path, server: socket.socket
) -> None:
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    ports = TargetPorts(port - 1, port + 1)
    async with pool_to(client.command, ports) as bench:
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
        async with bench.connect(port - 1):
            await bench.endings.reach(2)
        assert [e for e in bench.endings if e.error and "refused" in e.error]
    assert client.calls == [f"work qubes.ForwardTCP+{ports.brief()}+mux"]


async def test_a_refused_connection_is_an_abort(tmp_path: Path) -> None:
    port = free_port()
    async with pool_to(FakeClient(tmp_path, "serve").command, one(port)) as bench:
        client, accepted = tcp_pair()
        with client, trio.fail_after(BOUND_S):
            client.send(b"unread")
            ending = await bench.relay(accepted, port)
            error = "the server in the target refused the connection"
            assert ending == Ending(error, 0, 0, Refusal.SERVER, "refused")
            with pytest.raises(ConnectionResetError):
                client.recv(1)


async def test_a_full_budget_refuses_here(tmp_path: Path, server: socket.socket) -> None:
    port = port_of(server)
    budget = Budget(FLOOR_BYTES, 1)
    command = FakeClient(tmp_path, "serve").command
    async with pool_to(command, one(port), budget=budget) as bench:  # noqa: SIM117
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            assert await bench.refusal(port) == "this qube holds as many connections as it may"


# Several


async def test_a_full_mux_call_is_joined_by_another(tmp_path: Path, server: socket.socket) -> None:
    client, port = FakeClient(tmp_path, "mux STREAMS_MAX=3"), port_of(server)
    async with pool_to(client.command, one(port)) as bench, AsyncExitStack() as stack:
        pairs = []
        for _ in range(10):
            near = await stack.enter_async_context(bench.connect(port))
            pairs.append((near, await stack.enter_async_context(await accept(server))))
        for near, far in pairs:
            await echo_once(near, far)
        assert [mux_call.carries for mux_call in bench.pool.mux_calls] == [3, 3, 3, 1]
    assert len(client.calls) == 4


async def test_all_at_once_find_room_too(tmp_path: Path, server: socket.socket) -> None:
    client, port = FakeClient(tmp_path, "mux STREAMS_MAX=3"), port_of(server)
    async with pool_to(client.command, one(port)) as bench, AsyncExitStack() as stack:
        for _ in range(10):
            await stack.enter_async_context(bench.connect(port))
        for _ in range(10):
            await stack.enter_async_context(await accept(server))
    assert len(client.calls) == 4


async def test_slots_that_wait_for_an_answer_are_waited_for(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that come and go faster than the target answers for are no reason for another call."""
    client, port = FakeClient(tmp_path, "mux STREAMS_MAX=3"), port_of(server)
    clock = Clock(monkeypatch)
    async with pool_to(client.command, one(port)) as bench:  # noqa: SIM117
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            (service,) = children()
            os.kill(service, signal.SIGSTOP)
            for _ in range(2):
                abort_stream(bench.connect(port))
            await bench.endings.reach(2)
            async with bench.connect(port) as waiting:
                await until(lambda: bench.pool.waiting)
                await clock.advance(5)
                assert bench.pool.waiting
                assert len(bench.pool.mux_calls) == 1
                os.kill(service, signal.SIGCONT)
                for _ in range(2):
                    async with await accept(server) as gone:
                        assert await is_reset(gone)
                await until(lambda: bench.mux.open_room)
                await clock.advance(1)
                async with await accept(server) as other:
                    await echo_once(waiting, other)
    assert len(client.calls) == 1


# Cancellation and failure


async def test_a_cancelled_connection_is_an_abort_at_both_ends_and_the_others_go_on(
    tmp_path: Path, server: socket.socket
) -> None:
    port = port_of(server)
    async with pool_to(FakeClient(tmp_path, "serve").command, one(port)) as bench:  # noqa: SIM117
        async with bench.connect(port) as other, await accept(server) as other_far:
            client, accepted = tcp_pair()
            near = trio.SocketStream(trio.socket.from_stdlib_socket(client))
            async with near, trio.open_nursery() as nursery:
                nursery.start_soon(bench.carry, accepted, port)
                async with await accept(server) as far:
                    await echo_once(near, far)
                    nursery.cancel_scope.cancel()
                    assert await is_reset_shielded(near)
                    assert await is_reset_shielded(far)
            await echo_once(other, other_far)


async def is_reset_shielded(stream: trio.SocketStream) -> bool:
    with trio.CancelScope(shield=True):
        return await is_reset(stream)


@pytest.mark.parametrize("mode", ["serve", "exit126", "rude refuse"])
async def test_a_cancellation_at_any_moment_leaves_nothing(
    tmp_path: Path, server: socket.socket, mode: str
) -> None:
    port = port_of(server)
    server.listen(1000)
    chance = random.Random(1)
    budget = Budget()
    async with pool_to(FakeClient(tmp_path, mode).command, one(port), budget=budget) as bench:
        for _ in range(60):
            client, accepted = tcp_pair()
            with client, trio.move_on_after(chance.random() * 0.004):
                await bench.carry(accepted, port)
        await until(lambda: not any(mux_call.carries for mux_call in bench.pool.mux_calls))
        assert not bench.pool.waiting
        assert (budget.streams, budget.shared_left) == (0, Budget().shared_left)
        assert not bench.relays.has_failed
        assert not any(mux_call.connections for mux_call in bench.pool.mux_calls)


async def test_a_cancellation_before_the_begin_closes_the_socket(tmp_path: Path) -> None:
    async with pool_to(FakeClient(tmp_path, "serve").command, one(free_port())) as bench:
        client, accepted = tcp_pair()
        with client, trio.CancelScope() as scope:
            scope.cancel()
            await bench.carry(accepted, free_port())
        assert scope.cancelled_caught
        assert accepted.fileno() == -1


async def test_a_call_that_cannot_be_watched_is_that_mux_calls_trouble(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = port_of(server)
    async with pool_to(FakeClient(tmp_path, "serve").command, one(port)) as bench:

        def refuse(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(bench.relays.loop, "watch", refuse)
            assert "cannot watch the call: No space left" in await bench.refusal(port)
        assert not bench.relays.has_failed


@pytest.mark.usefixtures("bugs_are_wanted")
async def test_a_bug_in_a_call_is_that_calls_trouble(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = port_of(server)
    async with pool_to(FakeClient(tmp_path, "serve").command, one(port)) as bench:

        async def fail(*_: object) -> str | None:
            raise ZeroDivisionError("a bug")

        with monkeypatch.context() as patch:
            patch.setattr(MuxCall, "run", fail)
            assert "a bug of this program; its log says more" in await bench.refusal(port)
        assert bench.relays.loop.bugs.count == 1
        assert not bench.pool.mux_calls


async def test_bytes_and_a_clean_end_are_counted(tmp_path: Path, server: socket.socket) -> None:
    port = port_of(server)
    sent = pattern(300_000)
    async with pool_to(FakeClient(tmp_path, "serve").command, one(port)) as bench:
        async with bench.connect(port) as near, await accept(server) as far, trio.open_nursery() as both:

            async def upload() -> None:
                await near.send_all(sent)
                await near.send_eof()

            both.start_soon(upload)
            got = b""
            async for chunk in far:
                got += chunk
            assert got == sent
            far.socket.shutdown(socket.SHUT_WR)
            assert await near.receive_some() == b""
        await bench.endings.reach(1)
        assert bench.endings == [Ending(None, len(sent), 0)]
