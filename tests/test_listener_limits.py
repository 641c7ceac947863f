# SPDX-License-Identifier: GPL-2.0-or-later
"""Limits, deadlines and retries of a running listener: docs/behaviours.md, 29 to 39."""

import random
import socket
import time
from contextlib import AsyncExitStack
from ipaddress import ip_address
from pathlib import Path

import pytest
import trio
from fakeclient import FakeClient
from handclock import HandClock
from helpers import (
    BOUND_S,
    abort_stream,
    accept,
    connect,
    echo_once,
    free_port,
    is_reset,
    port_of,
    running_listener,
    until,
    write_config,
)

from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.exposed import call, unopened
from qubes_fwd_qrexec.exposed.call import CallTimeouts
from qubes_fwd_qrexec.exposed.limits import Account
from qubes_fwd_qrexec.exposed.listener import Listener
from qubes_fwd_qrexec.relay import copy
from qubes_fwd_qrexec.relay.acceptloop import address_of
from qubes_fwd_qrexec.relay.copy import abort
from qubes_fwd_qrexec.system.configsource import FileSource


async def connect_from(source: str, port: int) -> trio.SocketStream:
    sock = socket.create_connection(("127.0.0.1", port), source_address=(source, 0))
    sock.setblocking(False)
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


def accounts(listener: Listener) -> list[Account]:
    return [forward.table.account for forward in listener.forwards.values()]


# Limits


@pytest.mark.parametrize("transport", ["call", "mux"])
@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ("connections:2", "2 connections, the limit connections"),
        ("per-source:2", "2 connections, the limit per-source"),
        ("rate:4", "more than 4 new connections in a second, the limit rate"),  # half for one source
    ],
)
@pytest.mark.usefixtures("mux_call_home", "said_once")
async def test_one_too_many_is_reset_at_once_and_the_others_are_unharmed(
    tmp_path: Path,
    server: socket.socket,
    caplog: pytest.LogCaptureFixture,
    limits: str,
    words: str,
    transport: str,
) -> None:
    """docs/behaviours.md, 36 and 37."""
    port, client = free_port(), FakeClient(tmp_path, "serve")
    write_config(tmp_path / "config", port, port_of(server), limits=limits, transport=transport)
    async with running_listener(tmp_path / "config", client.command) as listener, AsyncExitStack() as undo:
        (forward,) = listener.forwards.values()
        forward.table.account = Account(forward.config.limits, listener.process, lambda: 0.0)  # all at once
        pairs = []
        for _ in range(2):
            near = await undo.enter_async_context(await connect(port))
            pairs.append((near, await undo.enter_async_context(await accept(server))))
        for _ in range(3):
            async with await connect(port) as refused:
                assert await is_reset(refused)
        for near, far in pairs:
            await echo_once(near, far)
        assert [counting.connections for counting in accounts(listener)] == [2]
    assert len(client.calls) == (2 if transport == "call" else 1)
    assert len([m for m in caplog.messages if words in m]) == 1


async def test_one_client_that_holds_all_it_may_keeps_nobody_else_out(
    tmp_path: Path, server: socket.socket
) -> None:
    """docs/behaviours.md, 37: slowloris."""
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server), limits="connections:5,per-source:3")
    async with running_listener(config, FakeClient(tmp_path, "serve").command), AsyncExitStack() as undo:
        for _ in range(3):
            await undo.enter_async_context(await connect_from("127.0.0.1", port))
            await undo.enter_async_context(await accept(server))
        async with await connect_from("127.0.0.1", port) as refused:
            assert await is_reset(refused)
        async with await connect_from("127.0.0.2", port) as near, await accept(server) as far:
            await echo_once(near, far)


@pytest.mark.parametrize("transport", ["call", "mux"])
@pytest.mark.usefixtures("mux_call_home", "said_once")
async def test_the_idlest_connection_of_the_largest_holder_makes_room(
    tmp_path: Path, server: socket.socket, caplog: pytest.LogCaptureFixture, transport: str
) -> None:
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server), limits="connections:2", transport=transport)
    async with (
        running_listener(config, FakeClient(tmp_path, "serve").command) as listener,
        AsyncExitStack() as undo,
    ):
        greedy = []
        for _ in range(2):
            near = await undo.enter_async_context(await connect_from("127.0.0.1", port))
            far = await undo.enter_async_context(await accept(server))
            await echo_once(near, far)
            greedy.append((near, far))
        await echo_once(*greedy[0])
        other = await undo.enter_async_context(await connect_from("127.0.0.2", port))
        assert await is_reset(greedy[1][0])
        other_far = await undo.enter_async_context(await accept(server))
        await echo_once(other, other_far)
        await echo_once(*greedy[0])
        (forward,) = listener.report().forwards
        assert (forward.connections, forward.refused) == (2, {"made-room": 1})
    assert [m for m in caplog.messages if "ended the idlest connection of 127.0.0.1" in m]


async def test_all_forwards_together_hold_what_the_process_may(tmp_path: Path, server: socket.socket) -> None:
    ports, config = [free_port(), free_port()], tmp_path / "config"
    for number, port in enumerate(ports):
        write_config(config, port, port_of(server), key=f"fwd.work.w{number}")
    listener = Listener(FileSource(config), FakeClient(tmp_path, "serve").command, connections_max=2)
    async with trio.open_nursery() as nursery:
        await nursery.start(listener.run)
        async with await connect(ports[0]), await accept(server):
            async with await connect(ports[0]) as refused:  # three quarters of 2
                assert await is_reset(refused)
            async with await connect(ports[1]) as near, await accept(server) as far:
                async with await connect(ports[1]) as refused:
                    assert await is_reset(refused)
                await echo_once(near, far)
            await until(lambda: listener.process.connections == 1)
        await until(lambda: listener.process.connections == 0)
        listener.stop()
        listener.stop()


@pytest.mark.usefixtures("mux_call_home")
async def test_slots_come_back_however_a_connection_ends(tmp_path: Path, server: socket.socket) -> None:
    """docs/behaviours.md, 37; `test_limits` counts 10,000 of them."""
    port, config, chance = free_port(), tmp_path / "config", random.Random(1)
    limits = "connections:8,per-source:8"
    write_config(config, port, port_of(server), limits=limits, transport="mux")

    async def serve() -> None:
        while True:
            await trio.lowlevel.wait_readable(server)
            sock, _ = server.accept()
            if chance.random() < 0.5:
                sock.close()
            else:
                abort(sock)

    async def come_and_go(count: int) -> None:
        for _ in range(count):
            near = await connect(port)
            how = chance.randrange(3)
            if how == 0:
                abort_stream(near)
                continue
            async with near:
                try:
                    if how == 1:
                        await near.send_eof()
                    await near.receive_some()
                except trio.BrokenResourceError:
                    pass

    async with running_listener(config, FakeClient(tmp_path, "serve").command) as listener:
        async with trio.open_nursery() as serving:
            serving.start_soon(serve)
            with trio.fail_after(4 * BOUND_S):
                async with trio.open_nursery() as clients:
                    for _ in range(12):
                        clients.start_soon(come_and_go, 50)
            serving.cancel_scope.cancel()
        (counting,) = accounts(listener)
        await until(lambda: counting.connections == 0)
        assert (counting.clients, listener.process.connections) == (0, 0)


async def test_new_limits_apply_to_the_next_connections(tmp_path: Path, server: socket.socket) -> None:
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server))
    async with running_listener(config, FakeClient(tmp_path, "serve").command) as listener:  # noqa: SIM117
        async with await connect(port) as near, await accept(server) as far:
            write_config(config, port, port_of(server), limits="connections:1")
            listener.reload()
            async with await connect(port) as refused:
                assert await is_reset(refused)
            await echo_once(near, far)


@pytest.mark.parametrize("transport", ["call", "mux"])
@pytest.mark.usefixtures("mux_call_home")
async def test_an_idle_connection_ends_and_its_slot_comes_back(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    monkeypatch.setattr("qubes_fwd_qrexec.relay.idleness.LOOK_TICKS", 1)
    clock = HandClock(monkeypatch, call, copy)
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server), transport=transport)
    timeouts = CallTimeouts(idle_s=1000.0)
    client = FakeClient(tmp_path, "serve").command
    async with running_listener(config, client, timeouts=timeouts) as listener:
        async with await connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            if transport == "call":
                for _ in range(2):  # the last byte may count from when the first is over
                    await clock.advance(1000)
            else:
                (pool,) = listener.transports.pools.values()
                (mux_call,) = pool.mux_calls
                assert mux_call.mux is not None
                assert mux_call.mux.idleness.idle_s == 1000.0
                mux_call.mux.idleness.idle_s = 0.1  # only now, however long it took until here
            assert await is_reset(near)
        (counting,) = accounts(listener)
        await until(lambda: counting.connections == 0)


# Who may connect


@pytest.mark.parametrize(
    ("address", "networks", "is_allowed"),
    [
        ("::ffff:192.168.1.5", "192.168.1.0/24", True),
        ("::ffff:10.0.0.1", "192.168.1.0/24", False),
        ("fe80::1%eth0", "fe80::/10", True),
        ("fe80::1%eth0", "fd00::/8", False),
        ("fe80::1%eth0", "192.168.1.0/24", False),
    ],
)
def test_mapped_and_scoped_peers_are_known_by_what_they_are(
    address: str, networks: str, is_allowed: bool
) -> None:
    """docs/behaviours.md, 39."""
    value = "version=1 service=qubes.ForwardTCP transport=call side=outer listen=:: srcports=80 dstports=80"
    config = ListenerConfig.parse("fwd.work.web", f"{value} srchosts={networks}")
    client = address_of(address)
    assert client == ip_address(address.removeprefix("::ffff:"))
    assert (client in config.sources) is is_allowed


# Reloads


@pytest.mark.usefixtures("mux_call_home")
async def test_a_hundred_reloads_refuse_nobody_and_cut_nobody(tmp_path: Path, server: socket.socket) -> None:
    """docs/behaviours.md, 29: at least as many connections come as there are reloads."""
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server), transport="mux")
    done = [0]

    async def come_and_go() -> None:
        while True:
            async with await connect(port) as near, await accept(server) as far:
                await echo_once(near, far)
            done[0] += 1

    async with running_listener(config, FakeClient(tmp_path, "serve").command) as listener:  # noqa: SIM117
        async with await connect(port) as near, await accept(server) as far, trio.open_nursery() as clients:
            clients.start_soon(come_and_go)
            for turn in range(100):
                networks = f"127.0.0.0/{8 + turn % 2}"
                write_config(config, port, port_of(server), transport="mux", srchosts=networks)
                listener.reload()
                await until(lambda turn=turn: done[0] > turn)  # type: ignore[misc]
            clients.cancel_scope.cancel()
            await echo_once(near, far)


async def test_a_port_that_comes_free_is_opened_without_a_new_configuration(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tmp_path / "config"
    config.mkdir()
    holder = socket.create_server(("127.0.0.1", 0))
    port = port_of(holder)
    async with running_listener(config, FakeClient(tmp_path, "exit125").command) as listener:
        write_config(config, port, 1)
        await until(lambda: listener.problems)
        assert not listener.forwards
        holder.close()
        await until(lambda: listener.forwards)
        async with await connect(port) as near:
            assert await is_reset(near)
    failed = [m for m in caplog.messages if "cannot be opened" in m]
    assert len(failed) == 1
    assert "the port is in use by this program itself" in failed[0]
    assert "this is tried again" in failed[0]


@pytest.mark.parametrize("how", ["removed", "expired", "stopping"])
async def test_a_forward_that_is_no_longer_configured_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(unopened, "RETRY_FIRST_S", 0.0)
    config, real, offset = tmp_path / "config", time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])
    config.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = port_of(holder)
        async with running_listener(config, ("unused",)) as listener:
            write_config(config, port, 1, expire=str(int(real()) + 3600))
            listener.look()
            assert "the port is in use" in listener.problems["fwd.work.web"]
            if how == "removed":
                (config / "fwd.work.web").unlink()
                listener.reload()
            elif how == "expired":
                offset[0] = 7200.0
            else:
                listener.stop()
            holder.close()
            listener.look()
            assert listener.problems == {}
            assert not listener.forwards
