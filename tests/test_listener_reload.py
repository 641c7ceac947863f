# SPDX-License-Identifier: GPL-2.0-or-later
"""What clients notice of a reload and of a stop, to the connection: beside `test_listener`."""

import socket
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
from fakeclient import FakeClient
from helpers import (
    BOUND_S,
    accept,
    connect,
    echo_once,
    free_port,
    is_listening,
    port_of,
    running_listener,
    write_config,
)
from trio.testing import wait_all_tasks_blocked

pytestmark = pytest.mark.usefixtures("mux_call_home")


@pytest.mark.parametrize("transport", ["call", "mux"])
async def test_all_ports_are_closed_before_anything_is_waited_for(
    tmp_path: Path, server: socket.socket, transport: str
) -> None:
    """docs/behaviours.md, 31 asks for 100 ms: it is done when each task has had its turn, however slow."""
    ports, config = [free_port() for _ in range(5)], tmp_path / "config"
    for number, port in enumerate(ports):
        write_config(config, port, port_of(server), key=f"fwd.work.w{number}", transport=transport)
    command = FakeClient(tmp_path, "serve").command
    async with running_listener(config, command, drain_s=BOUND_S) as listener:  # noqa: SIM117
        async with await connect(ports[0]) as near, await accept(server) as far:
            await echo_once(near, far)
            assert all(map(is_listening, ports))
            listener.stop()
            await wait_all_tasks_blocked()
            assert not any(map(is_listening, ports))
            await echo_once(near, far)


@pytest.mark.parametrize(("transport", "reloads"), [("call", 3), ("mux", 100)])
async def test_a_client_in_the_kernels_queue_during_a_reload_is_served(
    tmp_path: Path, server: socket.socket, transport: str, reloads: int
) -> None:
    """docs/behaviours.md, 29. A port that is closed and opened anew would lose them."""
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server), transport=transport)
    async with running_listener(config, FakeClient(tmp_path, "serve").command) as listener:  # noqa: SIM117
        async with await connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            for turn in range(reloads):
                changed = {"srchosts": f"127.0.0.0/{8 + turn % 2}", "limits": f"rate:{1000 + turn}"}
                write_config(config, port, port_of(server), transport=transport, **changed)
                async with AsyncExitStack() as undo:
                    # Without a turn for the listener in between: nobody has accepted them when it reloads.
                    waiting = [await undo.enter_async_context(await connect(port)) for _ in range(3)]
                    listener.reload()
                    assert await served(waiting, server, undo) == {b"0", b"1", b"2"}
            await echo_once(near, far)


async def served(
    clients: list[trio.SocketStream], server: socket.socket, undo: AsyncExitStack
) -> set[bytes | bytearray]:
    """What the server got, when each client has sent its number."""
    with trio.fail_after(BOUND_S):
        for number, client in enumerate(clients):
            await client.send_all(str(number).encode())
        return {await (await undo.enter_async_context(await accept(server))).receive_some() for _ in clients}
