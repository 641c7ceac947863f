# SPDX-License-Identifier: GPL-2.0-or-later
"""Processes that stand in for the agent's process of a call: only when they began matters."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Connects to the paths that it is told, one after the other, and passes each socket on.
_CONNECT = """
import socket, sys
control = socket.socket(fileno=int(sys.argv[1]))
while path := control.recv(4096):
    with socket.socket(socket.AF_UNIX) as sock:
        error = sock.connect_ex(path)
        socket.send_fds(control, [b"%d" % error], [] if error else [sock.fileno()])
"""


@contextmanager
def agent_process() -> Iterator[int]:
    """The number of a process that begins now, and ends with the block."""
    # Nobody's child: tests count those of their own.
    command = ["/bin/sh", "-c", "exec 3<&0; cat <&3 >/dev/null & echo $!"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as shell:
        assert shell.stdout is not None
        yield int(shell.stdout.readline())


class Connector:
    """A process that stands in for the agent's, as it is the one that connects to a socket service."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # Nobody's child: tests count those of their own.
            command = ["/bin/sh", "-c", '"$0" -c "$1" "$2" &', sys.executable, _CONNECT, str(theirs.fileno())]
            subprocess.run(command, pass_fds=[theirs.fileno()], check=True)

    def connect(self, path: Path) -> socket.socket:
        """A socket that is connected to ``path``. Raises OSError."""
        self._control.send(os.fsencode(path))
        error, fds, _, _ = socket.recv_fds(self._control, 16, 1)
        if not fds:
            raise OSError(int(error), os.strerror(int(error)), str(path))
        return socket.socket(fileno=fds[0])

    def close(self) -> None:
        self._control.close()


_connectors: list[Connector] = []


def renew_connector() -> None:
    """From now on `connect_as_agent` connects by a process that begins now."""
    close_connector()
    _connectors.append(Connector())


def close_connector() -> None:
    while _connectors:
        _connectors.pop().close()


def connect_as_agent(path: Path) -> socket.socket:
    """Call a socket service as the agent's process for a call does. Raises OSError."""
    return _connectors[-1].connect(path)
