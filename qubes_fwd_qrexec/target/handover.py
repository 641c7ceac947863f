# SPDX-License-Identifier: GPL-2.0-or-later
"""How a call for one connection gets to the process that serves them all (handover/qubes-forward-handover.c).

One message on a SOCK_SEQPACKET socket says ``1 PORT CALLER AGENT``, where AGENT is the agent's process, and
carries the call's stdin, stdout and stderr. The answer is one byte, the exit status. The socket is our own or
systemd's. Anything else at its path belongs to somebody else, and stays.
"""

import os
import socket
import stat
from pathlib import Path
from typing import Self

from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.system.unixsockets import socket_address

from .localserver import ServiceError

# Where the program finds the socket, unless the variable says otherwise.
SOCKET = "/run/qubes-forward-service.socket"
SOCKET_VARIABLE = "QUBES_FORWARD_SERVICE_SOCKET"
_VERSION = "1"
_WORDS = 4
_MESSAGE_MAX = 256
_DESCRIPTORS = 3
_BACKLOG = 128
# sd_listen_fds(3): the first descriptor that systemd passes.
_LISTEN_FD = 3


class SocketError(ForwardError):
    """There is no socket to listen on; the text says why."""


class HandoverError(ForwardError):
    """What came is no call."""


class Handed:
    """What was handed over, in a context that closes it. ``stderr`` is a descriptor."""

    def __init__(self, untrusted_words: list[str], fds: list[int]) -> None:
        self.untrusted_words = untrusted_words
        """Argument, calling qube and the agent's PID."""
        *self._fds, self.stderr = fds
        self._socks: list[socket.socket] = []

    def sockets(self) -> list[socket.socket]:
        """The call's stdin and stdout, which are non-blocking. Raises `ServiceError`."""
        for number, fd in enumerate(self._fds):
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                text = f"file descriptor {number} is not a socket; this is started by qrexec"
                raise ServiceError(ExitStatus.BAD_ARGUMENT, text)
        while self._fds:
            # qrexec has no others; the kernel is not asked what it is.
            self._socks.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=self._fds.pop(0)))
            self._socks[-1].setblocking(False)
        return self._socks

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self._socks:
            sock.close()
        for fd in (*self._fds, self.stderr):
            os.close(fd)


def receive(control: socket.socket) -> Handed | None:
    """Take the call from a non-blocking connection of the program; None if that is gone.

    Raises `HandoverError`, and BlockingIOError if the call is not there yet.
    """
    try:
        untrusted, fds, _, _ = socket.recv_fds(control, _MESSAGE_MAX, _DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
    except BlockingIOError:
        raise
    except OSError as error:
        raise HandoverError(f"nothing can be received: {error.strerror}") from error
    words = untrusted.decode("ascii", "replace").split(" ")
    if len(fds) == _DESCRIPTORS and words[0] == _VERSION and len(words) == _WORDS:
        return Handed(words[1:], fds)
    for fd in fds:
        os.close(fd)
    if not untrusted:
        return None
    raise HandoverError(f"{untrusted!a} with {len(fds)} descriptors is no call")


def listen_on(path: Path) -> socket.socket:
    """Make the socket and listen on it, replacing one that an earlier process left behind.

    It is non-blocking. Raises `SocketError`.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        if _is_left_over(path):
            path.unlink()
        os.fchmod(listening.fileno(), 0o600)  # so that it is made like that
        with socket_address(path) as address:
            listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise SocketError(f"{path}: {error.strerror or error}") from error
    listening.setblocking(False)
    return listening


def _is_left_over(path: Path) -> bool:
    """Whether it is a socket that nobody listens on."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return False
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe,
            socket_address(path) as address,
        ):
            probe.connect(address)
    except ConnectionRefusedError:
        return True
    except FileNotFoundError:
        return False
    return False


def take_activated() -> socket.socket:
    """Return the one listening socket that systemd passed to this process. Raises `SocketError`."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        raise SocketError("LISTEN_PID is not this process; --activated is for a systemd socket unit")
    if os.environ.get("LISTEN_FDS") != "1":
        raise SocketError("LISTEN_FDS is not 1; the socket unit should have one ListenSequentialPacket=")
    try:
        return adopt(_LISTEN_FD)
    except OSError as error:
        raise SocketError(f"file descriptor {_LISTEN_FD}: {error.strerror}") from error


def adopt(fd: int) -> socket.socket:
    """Take over a listening socket, which the result then owns. Raises `SocketError`, and OSError."""
    listening = socket.socket(fileno=fd)
    is_right = (
        listening.family == socket.AF_UNIX
        and listening.type == socket.SOCK_SEQPACKET
        and listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    )
    if not is_right:
        listening.close()
        raise SocketError(f"file descriptor {fd} is not a listening UNIX socket for packets")
    listening.set_inheritable(False)
    listening.setblocking(False)
    return listening
