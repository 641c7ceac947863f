# SPDX-License-Identifier: GPL-2.0-or-later
"""When a mux call is replaced and ends: its lease, how long it lingers, and what retires it."""

import logging
import os
import signal
import socket
from pathlib import Path

import pytest
import trio
from fakeclient import FakeClient
from helpers import accept, children, echo_once, is_reset, port_of, until
from muxpool_bench import Clock, end_well, one, pool_to

from qubes_fwd_qrexec.common.allowance import Allowance, Revoked
from qubes_fwd_qrexec.exposed.connectionlog import How
from qubes_fwd_qrexec.target import callnotes, revocation

pytestmark = pytest.mark.usefixtures("mux_call_home")


async def test_past_its_lease_new_connections_have_a_new_call_and_old_ones_go_on(
    tmp_path: Path, server: socket.socket
) -> None:
    """docs/behaviours.md, 53. The target says so when it is told to, however long that takes;
    `test_muxservice` shows that it does so in time."""
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    async with pool_to(client.command, one(port)) as bench:  # noqa: SIM117
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            (old,) = bench.pool.mux_calls
            (service,) = children()
            os.kill(service, signal.SIGUSR2)
            await until(lambda: not old.has_room)
            async with bench.connect(port) as new_near, await accept(server) as new_far:
                await echo_once(new_near, new_far)
                await echo_once(near, far)
                await end_well(near, far)
                await until(lambda: old not in bench.pool.mux_calls)
    assert len(client.calls) == 2


async def test_without_streams_it_is_kept_a_while_and_then_ends(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    clock = Clock(monkeypatch)
    async with pool_to(client.command, one(port), linger_s=30) as bench:
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            (mux_call,) = bench.pool.mux_calls
            await clock.advance(100)
            assert mux_call.has_room
            await end_well(near, far)
        await until(lambda: not mux_call.carries)
        await clock.advance(29)
        assert mux_call.has_room
        await clock.advance(1)
        assert not mux_call.has_room
        await until(lambda: not bench.pool.mux_calls)
        async with bench.connect(port), await accept(server):
            pass
    assert len(client.calls) == 2


async def test_a_stream_that_is_over_between_two_looks_keeps_it(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    clock = Clock(monkeypatch)
    async with pool_to(client.command, one(port), linger_s=1.5) as bench:
        for number in range(6):
            async with bench.connect(port) as near, await accept(server) as far:
                await echo_once(near, far)
                await end_well(near, far)
            await bench.endings.reach(number + 1)
            await clock.advance(1)
        assert bench.mux.open_room
    assert len(client.calls) == 1


async def test_a_mux_call_that_dom0_ends_is_not_lost_and_no_warning(
    tmp_path: Path, server: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    async with pool_to(client.command, one(port)) as bench:
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            ended = await trio.to_thread.run_sync(revocation.revoke, Allowance(), callnotes.directory())
            assert ended == Revoked(1, 0)
            assert await is_reset(near)
            assert await is_reset(far)
        await until(lambda: not bench.pool.mux_calls)
    assert [(entry.levelname, entry.message) for entry in caplog.records] == [
        ("INFO", "dom0 has ended a mux call to work")
    ]


async def test_what_is_on_its_way_when_a_call_ends_arrives(tmp_path: Path, server: socket.socket) -> None:
    """The target is slow to take it, as on a busy machine. A call that is killed loses what it has taken."""
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    async with pool_to(client.command, one(port)) as bench:
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            await far.send_eof()
            assert not await near.receive_some(1)
            (service,) = children()
            mux = bench.mux
            os.kill(service, signal.SIGSTOP)
            bench.pool.retire()
            await near.send_all(b"the last words")
            await near.send_eof()
            await until(lambda: mux.is_over)
            os.kill(service, signal.SIGCONT)
            assert await received(far) == b"the last words"
        await until(lambda: not bench.pool.mux_calls)


async def received(stream: trio.SocketStream) -> bytes:
    """All that comes, up to a clean end."""
    return b"".join([chunk async for chunk in stream])


async def test_retired_they_end_with_their_last_stream_and_open_no_other(
    tmp_path: Path, server: socket.socket
) -> None:
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    async with pool_to(client.command, one(port)) as bench:
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            bench.pool.retire()
            assert await bench.refusal(port) == "no mux call to work: the forward to work is over"
            await echo_once(near, far)
            await end_well(near, far)
        await until(lambda: not bench.pool.mux_calls)
    assert len(client.calls) == 1


async def test_retired_while_it_opens_it_ends(tmp_path: Path, server: socket.socket) -> None:
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    async with pool_to(client.command, one(port)) as bench:
        async with bench.connect(port):
            await until(lambda: bench.pool.mux_calls)
            bench.pool.retire()
            await bench.endings.reach(1)
            await until(lambda: not bench.pool.mux_calls)
        assert [ending.how for ending in bench.endings] == [How.REFUSED]


async def test_idle_for_too_long_is_an_abort_at_both_ends(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = port_of(server)
    async with pool_to(FakeClient(tmp_path, "serve").command, one(port)) as bench:
        monkeypatch.setattr("qubes_fwd_qrexec.relay.idleness.LOOK_TICKS", 1)
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            bench.mux.idleness.idle_s = 0.1  # only now, however long that took
            assert await is_reset(near)
            assert await is_reset(far)
            await bench.endings.reach(1)


async def test_half_closed_for_too_long_is_an_abort(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = port_of(server)
    client = FakeClient(tmp_path, "serve")
    async with pool_to(client.command, one(port), half_close_s=0.1) as bench:
        monkeypatch.setattr("qubes_fwd_qrexec.relay.idleness.LOOK_TICKS", 1)
        async with bench.connect(port) as near, await accept(server) as far:
            await near.send_eof()
            assert await is_reset(near)
            assert not await is_reset(far)  # after an end of file an abort shows only to who sends
            await bench.endings.reach(1)
