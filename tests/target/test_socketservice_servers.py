# SPDX-License-Identifier: GPL-2.0-or-later
"""The server of calls, and servers that are not at localhost."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from helpers import listening_socket, no_fds_left, port_of

from qubes_fwd_qrexec.target.localserver import ServiceError
from qubes_fwd_qrexec.target.socketservice import connect

Write = Callable[[str], Path]


async def test_a_server_is_reached_where_it_is_named_and_nowhere_else(
    server: socket.socket, name_servers: Write
) -> None:
    name_servers(f"tcp {port_of(server)} 127.0.0.2")
    with no_fds_left():
        with pytest.raises(ServiceError, match="Connection refused"):
            await connect(port_of(server))
        with listening_socket("127.0.0.2", port_of(server)) as other, await connect(port_of(server)) as sock:
            assert sock.getpeername() == other.getsockname()


async def test_a_port_whose_line_is_wrong_is_refused(server: socket.socket, name_servers: Write) -> None:
    path = name_servers(f"tcp {port_of(server)} nosuch0")
    with pytest.raises(ServiceError, match=f"{path}:1: "):
        await connect(port_of(server))


async def test_a_unix_server_is_reached_and_a_full_queue_waited_for(
    unix_server: socket.socket, name_servers: Write
) -> None:
    name_servers(f"tcp 80 unix:{unix_server.getsockname()}")
    unix_server.listen(0)
    with no_fds_left(), await connect(80) as sock:
        with pytest.raises(ServiceError, match="no answer within"):
            await connect(80, 0.05)
        async with trio.open_nursery() as nursery:

            async def connect_second() -> None:
                with await connect(80) as second:
                    second.send(b"second")

            nursery.start_soon(connect_second)
            with unix_server.accept()[0] as far:
                assert far.getsockname() == sock.getpeername()
        unix_server.accept()[0].close()
