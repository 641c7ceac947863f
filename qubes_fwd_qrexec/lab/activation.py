# SPDX-License-Identifier: GPL-2.0-or-later
"""The one socket unit of a qube: what serves all calls for one connection is started at the first of them.

As systemd does, the lab listens, passes the socket on, and listens again when the process has ended.
"""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import trio

from qubes_fwd_qrexec.target.handover import listen_on

from .agents import Agents
from .directory import QubeDirectory
from .started import qube_environment

# sd_listen_fds(3): descriptor 3, for the process of this number.
_ACTIVATED = 'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@"'
# Before it is started again, if it fails at once.
_PAUSE_S = 1.0


async def activate(agents: Agents, place: QubeDirectory, namespace_fd: Callable[[], int | None]) -> NoReturn:
    """Until cancelled. Raises `SocketError`."""
    with listen_on(place.single_calls_socket) as listening:
        while True:
            await trio.lowlevel.wait_readable(listening)
            await _serve(agents, place, listening, namespace_fd())
            await trio.sleep(_PAUSE_S)


async def _serve(
    agents: Agents, place: QubeDirectory, listening: socket.socket, namespace_fd: int | None
) -> None:
    """One process, from its start to its end. Raises OSError."""
    program = [sys.executable, "-P", "-m", "qubes_fwd_qrexec.service", "--activated"]
    order = {
        "argv": ["/bin/sh", "-c", _ACTIVATED, "sh", *program],
        "directory": str(place.root),
        "environment": qube_environment(place.root) | {"NOTIFY_SOCKET": ""},
    }
    agent = await agents.fork()
    try:
        with _log(place) as fds:
            await agent.order(order, [*fds, listening.fileno()], namespace_fd)
        await agent.wait_for_exit()
    finally:
        agent.kill()


@contextmanager
def _log(place: QubeDirectory) -> Iterator[list[int]]:
    """What it has as stdin, stdout and stderr. Raises OSError."""
    with open(os.devnull, "rb") as nothing, (place.root / "run" / "forward.log").open("ab") as log:
        yield [nothing.fileno(), log.fileno(), log.fileno()]
