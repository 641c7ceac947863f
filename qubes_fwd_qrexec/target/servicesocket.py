# SPDX-License-Identifier: GPL-2.0-or-later
"""The UNIX socket of a qrexec socket service, and what the agent sends on it before a call's bytes.

The socket is our own or systemd's, and is checked first. Anything else at its path belongs to somebody else,
and stays.
"""

import os
import socket
import stat
from pathlib import Path

import trio

from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.services import FORWARD_SERVICE
from qubes_fwd_qrexec.common.values import QubeName, parse_qube_name

from .localserver import Request, parse_argument

# Our service's name, an argument and a qube's name (31 characters) are much shorter; see docs/facts.md, Q18.
DESCRIPTOR_MAX = 1024
# The agent sends it in one write, at once.
DESCRIPTOR_TIMEOUT_S = 5.0
_BACKLOG = 128
# sd_listen_fds(3): the first descriptor that systemd passes.
_LISTEN_FD = 3


class SocketError(ForwardError):
    """There is no socket to listen on; the text says why."""


class DescriptorError(ForwardError):
    """A call did not begin with a valid service descriptor."""


def parse_descriptor(untrusted_descriptor: bytes) -> tuple[str, Request, QubeName]:
    """Return the argument, the request in it, and the calling qube. Raises `ForwardError`."""
    try:
        service, _, origin = untrusted_descriptor.decode("ascii").partition(" ")
    except UnicodeDecodeError:
        raise DescriptorError(f"descriptor {untrusted_descriptor!a} is not ASCII") from None
    name, plus, argument = service.partition("+")
    caller = origin.partition(" ")[0]  # what follows is the target that the caller asked for
    if name != FORWARD_SERVICE or not plus or not caller:
        raise DescriptorError(f"descriptor {untrusted_descriptor!a} is not {FORWARD_SERVICE}+PORT QUBE")
    return argument, parse_argument(argument), parse_qube_name(caller)


async def read_descriptor(call: socket.socket) -> bytes:
    """Read everything up to the first NUL, and return it without that. Raises `DescriptorError`."""
    untrusted = b""
    while True:
        await trio.lowlevel.wait_readable(call)
        try:
            # Peek first: bytes of the stream that are read too early could not be given back.
            peeked = call.recv(DESCRIPTOR_MAX - len(untrusted), socket.MSG_PEEK)
            end = peeked.find(0)
            untrusted += call.recv(len(peeked) if end < 0 else end + 1)
        except BlockingIOError:
            continue
        except OSError as error:
            raise DescriptorError(f"no descriptor: {error.strerror}") from error
        if end >= 0:
            return untrusted[:-1]
        if not peeked or len(untrusted) >= DESCRIPTOR_MAX:
            raise DescriptorError(f"no descriptor in the first {len(untrusted)} bytes")


def listen_on(path: Path) -> socket.socket:
    """Make a UNIX socket and listen on it, replacing one that an earlier process left behind.

    It is non-blocking. Raises `SocketError`.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_left_over(path):
            path.unlink()
        listening.bind(str(path))
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
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(str(path))
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
        raise SocketError("LISTEN_FDS is not 1; one ListenStream= in the socket unit would be right")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)  # processes that we start must not use them
    try:
        return adopt(_LISTEN_FD)
    except OSError as error:
        raise SocketError(f"file descriptor {_LISTEN_FD}: {error.strerror}") from error


def adopt(fd: int) -> socket.socket:
    """Take over a listening UNIX stream socket, which the result then owns.

    Raises `SocketError`, and OSError if it is no socket.
    """
    listening = socket.socket(fileno=fd)
    is_right = (
        listening.family == socket.AF_UNIX
        and listening.type == socket.SOCK_STREAM
        and listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    )
    if not is_right:
        listening.close()
        raise SocketError(f"file descriptor {fd} is not a listening UNIX stream socket")
    listening.set_inheritable(False)
    listening.setblocking(False)
    return listening
