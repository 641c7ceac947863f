# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that the service manager starts: it runs the listener, and ends once that has no open ports.

Connections may finish for a minute after SIGTERM, and a restart must not wait for them, as new clients would
be refused meanwhile. So, as with sshd, the unit's main process ends at once, the draining listener stays
behind without it (``KillMode=process``), and the next listener gets the ports.

If this process dies unexpectedly, the listener aborts everything and ends: otherwise two would share the
ports.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

import trio

# The listener closes its ports in less than 100 ms (docs/behaviours.md, 31); one that hangs is killed.
CLOSE_S = 10.0
_SIGNALS = frozenset((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD))
_CLOSED, _LEFT = b"c", b"l"
FD_OPTION = "--supervisor-fd"


def supervise(arguments: Sequence[str]) -> int:
    """Run the listener with these arguments. Returns its exit status, or 0 once it drains on its own."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            child = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-m", "qubes_fwd_qrexec.listener"),
                    *(FD_OPTION, str(theirs.fileno()), *arguments),
                ],
                pass_fds=[theirs.fileno()],
            )
        with ours:
            return _follow(child, ours)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow(child: "subprocess.Popen[bytes]", control: socket.socket) -> int:
    while True:
        match signal.sigwait(_SIGNALS):
            case signal.SIGCHLD:
                if (status := child.poll()) is not None:
                    return status if status >= 0 else 128 - status
            case signal.SIGHUP:
                child.send_signal(signal.SIGHUP)
            case _:
                child.send_signal(signal.SIGTERM)
                return _leave(child, control)


def _leave(child: "subprocess.Popen[bytes]", control: socket.socket) -> int:
    """Wait until the ports are closed, and let the listener drain on its own."""
    control.settimeout(CLOSE_S)
    try:
        is_closed = control.recv(1) == _CLOSED
        if is_closed:
            control.sendall(_LEFT)
            return 0
    except TimeoutError:
        child.kill()
    except OSError:
        pass  # it has ended meanwhile
    status = child.wait()
    return status if status >= 0 else 128 - status


class Supervisor:
    """The listener's end. ``fd`` is what `supervise` passed. Raises OSError if it is no socket."""

    def __init__(self, fd: int) -> None:
        sock = socket.socket(fileno=fd)
        os.set_inheritable(fd, False)
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))

    async def closed(self) -> None:
        """Report that all ports are closed; from now on this process drains on its own."""
        os.environ.pop("NOTIFY_SOCKET", None)  # later messages would be about the next listener
        with contextlib.suppress(trio.BrokenResourceError):  # `lost` returns then
            await self._stream.send_all(_CLOSED)

    async def lost(self) -> None:
        """Return when the supervisor has died before it let this process drain on its own; else never."""
        try:
            word = await self._stream.receive_some(1)
        except trio.BrokenResourceError:
            word = b""
        if word == _LEFT:
            await trio.sleep_forever()
