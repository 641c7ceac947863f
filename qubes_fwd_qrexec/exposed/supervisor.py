# SPDX-License-Identifier: GPL-2.0-or-later
"""The process that the service manager starts: it starts the listener, and ends once that has no ports.

Connections may finish for a minute after SIGTERM, and a restart must not wait for them: whoever comes
meanwhile would be refused. So, as with sshd, the unit's main process ends at once, the listener that drains
stays behind without it (``KillMode=process``), and the next one has the ports.

Should this process die by itself, the listener aborts everything and ends: two would share the ports.
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
    """Run the listener with these arguments; returns its exit status, or 0 once it drains by itself."""
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
    """Wait until the ports are closed, and let the listener drain alone."""
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
    """The listener's end. ``fd`` is what `supervise` passed. Raises OSError where it is no socket."""

    def __init__(self, fd: int) -> None:
        sock = socket.socket(fileno=fd)
        os.set_inheritable(fd, False)
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))

    async def closed(self) -> None:
        """Tell that no port is open any more, and be left alone."""
        os.environ.pop("NOTIFY_SOCKET", None)  # what is said from now on would be said of the next one
        with contextlib.suppress(trio.BrokenResourceError):  # `lost` tells
            await self._stream.send_all(_CLOSED)

    async def lost(self) -> None:
        """Return when the supervisor has died without leaving this process alone; else never."""
        try:
            word = await self._stream.receive_some(1)
        except trio.BrokenResourceError:
            word = b""
        if word == _LEFT:
            await trio.sleep_forever()
