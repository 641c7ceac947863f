# SPDX-License-Identifier: GPL-2.0-or-later
"""A qrexec call, seen from the qube that makes it: the one place that starts qrexec-client-vm.

The client gets two socketpairs for its stdin and stdout, which works with every version of it (one
socket for both ways, --use-stdin-socket, needs 4.2.19, and would let a failed call send the client's
FIN before its exit status is known). Its stderr goes nowhere: it writes there without end or hurry
whatever the target sends.
"""

import contextlib
import fcntl
import math
import shlex
import socket
import struct
import subprocess
import termios
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

from .errors import ConfigError

CLIENT = ("/usr/bin/qrexec-client-vm",)
# What a stalled direction may hold in the kernel, for each socketpair: twice the client's own 64 KiB.
_SOCKET_BUFFER_BYTES = 131072


def parse_client(text: str) -> tuple[str, ...]:
    """A client's command line, options and all, as a shell would split it. Raises `ConfigError`."""
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"--qrexec-client {text!a}: {error}") from None
    if not words:
        raise ConfigError(
            "--qrexec-client is empty; a program such as /usr/bin/qrexec-client-vm would be right"
        )
    return words


class Call:
    """A call under way. ``stdin`` and ``stdout`` are this end's non-blocking sockets of the target's two."""

    def __init__(self, process: trio.Process, stdin: socket.socket, stdout: socket.socket) -> None:
        self._process = process
        self.stdin = stdin
        self.stdout = stdout

    async def status(self, timeout_s: float = math.inf) -> int | None:
        """The exit status once there is one, None when there is none after ``timeout_s`` seconds."""
        with trio.move_on_after(timeout_s):
            await self._process.wait()
        return self._process.poll()

    def has_taken(self, written_bytes: int) -> bool:
        """Whether the client has read anything of the ``written_bytes`` that its stdin was sent.

        It reads nothing before the call is through to the target. The kernel counts what is unread
        with its own overhead, so less than was written means that some of it was read.
        """
        unread_bytes = struct.unpack("i", fcntl.ioctl(self.stdin, termios.TIOCOUTQ, bytes(4)))[0]
        return bool(written_bytes > unread_bytes)


@asynccontextmanager
async def open_call(client: Sequence[str], target: str, service: str) -> AsyncIterator[Call]:
    """Call ``service`` (``NAME+ARGUMENT``) in ``target``; the call is over when the block is left.

    Raises OSError when the client cannot be started. Whether the call is allowed, and whether anybody
    answers, only shows later: in its exit status, or never.
    """
    with contextlib.ExitStack() as ours:
        with contextlib.ExitStack() as theirs:
            stdin, client_stdin = _pair(ours, theirs)
            stdout, client_stdout = _pair(ours, theirs)
            process = await trio.lowlevel.open_process(
                [*client, "--", target, service],
                stdin=client_stdin,
                stdout=client_stdout,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            yield Call(process, stdin, stdout)
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


def _pair(ours: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    mine, other = socket.socketpair()
    ours.callback(mine.close)
    theirs.callback(other.close)
    mine.setblocking(False)
    for end in (mine, other):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
    return mine, other
