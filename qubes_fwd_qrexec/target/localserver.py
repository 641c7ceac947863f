# SPDX-License-Identifier: GPL-2.0-or-later
"""The target's own server: which port a call may reach, and a connection to it.

The call's argument alone determines what it can reach, so that dom0's policy covers it: ``8080`` is port
8080 of 127.0.0.1, or of ::1 if 127.0.0.1 refuses, or else the one place that this qube's owner has named for
that port (`servers`).
"""

import contextlib
import errno
import os
import select
import socket
import time
from pathlib import Path
from typing import NamedTuple

from qubes_fwd_qrexec.common.errors import ForwardError, TextError
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.values import Proto, TargetPorts, parse_port
from qubes_fwd_qrexec.relay.copy import abort, abort_by_default, keep_urgent_bytes
from qubes_fwd_qrexec.relay.socketbuffers import limit_segments, set_size
from qubes_fwd_qrexec.system.deadpeers import notice_dead_peers
from qubes_fwd_qrexec.system.unixsockets import socket_address

from .servers import ServerAddress, Servers, ServersError

# docs/behaviours.md, 22: how long a server may take to accept.
CONNECT_TIMEOUT_S = 10.0
# docs/behaviours.md, 9: for a single call whose server has ended its side, once nothing moves any more.
# The listener allows less, so the listener ends such a connection if it can.
HALF_CLOSE_S = 900.0
# How often to try a UNIX socket whose queue is full: of one that does not block, no event says that there is
# room again.
RETRY_S = 0.02
# The first byte of TCP_INFO while a peer has not answered (linux/tcp.h, net/tcp_states.h).
_SYN_SENT = 2
# docs/behaviours.md, 17: what the kernel holds for a server in each direction (it doubles the number). On
# loopback an answer takes less than a tenth of a millisecond, so this limits memory and not speed.
BUFFER_BYTES = 131_072


class ServiceError(ForwardError):
    """The call cannot be served; ``status`` is the exit status of the caller's qrexec-client-vm."""

    def __init__(self, status: ExitStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class Request(NamedTuple):
    """What a call asks for: one connection to one port, or a mux call to a range of them."""

    ports: TargetPorts
    is_mux: bool


def parse_argument(untrusted_argument: str, proto: Proto = Proto.TCP) -> Request:
    """Parse ``PORT``, ``PORT+mux`` or ``PORT-PORT+mux``; UDP has no single calls, and so no bare ``PORT``.

    Raises `ServiceError` with exit status 2.
    """
    untrusted_ports, plus, untrusted_kind = untrusted_argument.partition("+")
    try:
        if not plus and proto is Proto.TCP:
            port = parse_port(untrusted_ports)
            return Request(TargetPorts(port, port), is_mux=False)
        if untrusted_kind != "mux":
            right = "PORT, PORT+mux" if proto is Proto.TCP else "PORT+mux"
            raise TextError(untrusted_argument, f"{right} or PORT-PORT+mux")
        return Request(TargetPorts.parse(untrusted_ports), is_mux=True)
    except TextError as error:
        raise ServiceError(ExitStatus.BAD_ARGUMENT, f"argument {error}") from None


def connect(port: int, timeout_s: float = CONNECT_TIMEOUT_S) -> socket.socket:
    """Connect to the target's own server within ``timeout_s`` seconds. Raises `ServiceError`.

    The socket is non-blocking, and closing it aborts the connection until `close_cleanly`.
    """
    deadline = time.monotonic() + timeout_s
    trouble: OSError | None = None
    for address in addresses(Servers(), port):
        try:
            return connect_to(address, port, deadline - time.monotonic())
        except ConnectionResetError as error:  # it was there
            raise not_connected(port, timeout_s, error) from None
        except OSError as error:
            trouble = trouble or error
    raise not_connected(port, timeout_s, trouble)


def addresses(servers: Servers, port: int) -> tuple[ServerAddress, ...]:
    """Where a server of TCP may be. Raises `ServiceError`."""
    try:
        return servers.addresses(Proto.TCP, port)
    except ServersError as error:
        raise ServiceError(ExitStatus.SERVER_REFUSED, f"port {port}: {error}") from None


def connect_to(address: ServerAddress, port: int, timeout_s: float) -> socket.socket:
    deadline = time.monotonic() + timeout_s
    server = new_socket(address.family)
    try:
        while not is_begun(server, address, port):
            if time.monotonic() >= deadline:
                raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            time.sleep(RETRY_S)
        poll = select.poll()
        poll.register(server, select.POLLOUT)
        if not poll.poll(max(timeout_s, 0.001) * 1000):
            raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        check_answered(server, port)
    except OSError:
        abort(server)
        raise
    return server


def new_socket(family: int) -> socket.socket:
    """A non-blocking socket for a connection to a server. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    set_size(sock, BUFFER_BYTES)
    if family == socket.AF_UNIX:
        return sock
    abort_by_default(sock)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    notice_dead_peers(sock)
    keep_urgent_bytes(sock)
    # So that a server of this qube can still listen on the port that this connects from, if it sets the
    # option too, as servers do.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    limit_segments(sock)
    return sock


def is_begun(sock: socket.socket, address: ServerAddress, port: int) -> bool:
    """Begin to connect; False if the queue of a UNIX socket is full (`RETRY_S`). Raises OSError."""
    if address.family == socket.AF_UNIX:
        try:
            with socket_address(Path(address.host)) as path:
                sock.connect(path)
        except BlockingIOError:
            return False
    else:
        with contextlib.suppress(BlockingIOError):
            sock.connect((address.host, port))
    return True


def has_answered(server: socket.socket) -> bool:
    """Whether it is known by now what becomes of a connection that was begun. Raises OSError."""
    if server.family == socket.AF_UNIX:
        return True
    return server.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _SYN_SENT


def check_answered(server: socket.socket, port: int) -> None:
    """Raises OSError unless a server answered on ``port``; ConnectionResetError if it has aborted since.

    If it sent something before its abort, that can still be read, and this raises nothing. It does not use
    SO_ERROR, which would clear the abort, so that later reads would seem to end with FIN.

    The kernel may choose the destination port as the source port, too. If nobody listens there, the socket
    then connects to itself and echoes, although nobody has answered.
    """
    with contextlib.suppress(BlockingIOError):
        server.recv(1, socket.MSG_PEEK)
    if server.family != socket.AF_UNIX and server.getsockname()[1] == port:
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


def not_connected(port: int, timeout_s: float, trouble: OSError | None) -> ServiceError:
    """Why there is no connection to the server; ``trouble`` is the error of the first try."""
    if isinstance(trouble, TimeoutError):
        return ServiceError(ExitStatus.SERVER_TIMEOUT, f"port {port}: no answer within {timeout_s:g} s")
    if isinstance(trouble, ConnectionResetError):
        return ServiceError(ExitStatus.SERVER_RESET, f"port {port}: {trouble.strerror}")
    reason = (trouble.strerror if trouble else None) or "no connection"
    return ServiceError(ExitStatus.SERVER_REFUSED, f"port {port}: {reason}")
