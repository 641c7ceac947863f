# SPDX-License-Identifier: GPL-2.0-or-later
"""The listener while it drains: what ends and what goes on."""

import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
import trio
from fakeclient import FakeClient
from helpers import (
    BOUND_S,
    accept,
    can_connect,
    children,
    connect,
    echo_once,
    free_port,
    is_reset,
    port_of,
    running_listener,
    until,
    write_config,
)

from qubes_fwd_qrexec.exposed import listener as listener_module
from qubes_fwd_qrexec.relay import leg

# The drain


async def test_while_it_drains_what_expires_or_is_removed_is_cut(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/behaviours.md, 31 and 32 together: SIGTERM lengthens no permission."""
    monkeypatch.setattr(listener_module, "LOOK_S", 0.01)
    real, offset, config = time.time, [0.0], tmp_path / "config"
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])
    ports = {key: free_port() for key in ("expires", "removed", "drains", "stays")}
    options: dict[str, dict[str, str]] = {key: {} for key in ports}
    options["expires"] = {"expire": str(int(real()) + 1000)}
    options["drains"] = {"on_expire": "drain"}
    for key, port in ports.items():
        write_config(config, port, port_of(server), key=f"fwd.work.{key}", **options[key])
    command = FakeClient(tmp_path, "serve").command
    async with running_listener(config, command, drain_s=4 * BOUND_S) as listener:  # noqa: SIM117
        async with AsyncExitStack() as undo:
            near, far = {}, {}
            for key, port in ports.items():
                near[key] = await undo.enter_async_context(await connect(port))
                far[key] = await undo.enter_async_context(await accept(server))
            listener.stop()
            await until(lambda: not can_connect(ports["stays"]))
            offset[0] = 1001
            assert await is_reset(near["expires"])
            (config / "fwd.work.removed").unlink()
            (config / "fwd.work.drains").unlink()
            assert await is_reset(near["removed"])
            for key in ("drains", "stays"):
                await echo_once(near[key], far[key])
            assert not any(can_connect(port) for port in ports.values())


async def test_what_had_arrived_before_its_call_was_lost_is_delivered_by_a_listener_that_stops(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/behaviours.md, 12: the listener does not end with its last call, but with its last connection."""
    monkeypatch.setattr(leg, "_LAST_WORDS_S", BOUND_S)
    port, payload = free_port(), bytes(24 << 10)
    write_config(tmp_path / "config", port, port_of(server), transport="mux")
    command = FakeClient(tmp_path, "serve").command
    async with running_listener(tmp_path / "config", command, drain_s=4 * BOUND_S) as listener:
        with trio.socket.socket() as near:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await near.connect(("127.0.0.1", port))
            async with await accept(server) as far:
                await far.send_all(payload)
                (forward,) = listener.forwards.values()
                (connection,) = forward.live
                await until(lambda: connection.received == len(payload))
                listener.stop()
                await until(lambda: not can_connect(port))
                (service,) = children()
                os.kill(service, signal.SIGKILL)
                (pool,) = listener.transports.pools.values()
                await until(lambda: not pool.mux_calls)
                received = 0
                with trio.fail_after(BOUND_S), suppress(ConnectionResetError):
                    while True:
                        more = await near.recv(len(payload))
                        assert more, "a clean end"
                        received += len(more)
                assert received == len(payload)


def _expired_by_wall(wall: list[float], boot: list[float]) -> None:
    wall[0] += 100


def _expired_by_suspend(wall: list[float], boot: list[float]) -> None:
    wall[0] -= 1000
    boot[0] += 100


@pytest.mark.parametrize("passes", [_expired_by_wall, _expired_by_suspend])
@pytest.mark.parametrize("how", ["cut", "drain"])
async def test_a_live_connection_ends_or_goes_on_as_the_rule_says_by_either_clock(
    tmp_path: Path,
    server: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    passes: Callable[[list[float], list[float]], None],
) -> None:
    """docs/behaviours.md, 32: although the wall clock was set back, or the machine suspended, meanwhile."""
    wall, boot = [time.time()], [1000.0]
    monkeypatch.setattr(time, "time", lambda: wall[0])
    monkeypatch.setattr(time, "clock_gettime", lambda which: boot[0])
    assert 2 * listener_module.LOOK_S <= 1.0
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server), expire=str(int(wall[0]) + 50), on_expire=how)
    async with running_listener(config, FakeClient(tmp_path, "serve").command):  # noqa: SIM117
        async with await connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            passes(wall, boot)
            if how == "cut":
                assert await is_reset(near)
            await until(lambda: not can_connect(port))
            if how == "drain":
                await echo_once(near, far)
