# SPDX-License-Identifier: GPL-2.0-or-later
"""Listening sockets, and an accept loop that no single connection and no shortage can end."""

import errno
import logging
import os
import socket
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address

import trio

from .errors import ForwardError
from .logs import RateLimit, warn
from .values import IPAddress, unmapped

_logger = logging.getLogger(__name__)

# The kernel's own bound (net.core.somaxconn) since Linux 5.4: a burst waits here, not in retries.
_BACKLOG = 4096
# Accepted in one go before other tasks have their turn.
_BURST = 64
# relay-behaviours 34: how long to wait for descriptors or memory to come free.
_SHORTAGE_PAUSE_S = 0.2
_SHORTAGE = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
# What the kernel reports of a connection that was gone before it was accepted (accept(2), Linux).
_PEERS_OWN = frozenset(
    (
        errno.ECONNABORTED,
        errno.EPROTO,
        errno.EPERM,
        errno.ENETDOWN,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.ENONET,
        errno.EHOSTUNREACH,
        errno.EOPNOTSUPP,
        errno.ENETUNREACH,
    )
)
# With less than this the kernel lets only privileged programs bind (net.ipv4.ip_unprivileged_port_start).
_UNPRIVILEGED_PORT = 1024


class BindError(ForwardError):
    """A port cannot be listened on; the text names it and says why."""


def address_text(address: IPAddress | str, port: int | str) -> str:
    """``192.0.2.1:80`` or ``[2001:db8::1]:80``."""
    return f"[{address}]:{port}" if ":" in str(address) else f"{address}:{port}"


def open_listening(address: IPAddress, port: int) -> socket.socket:
    """A non-blocking socket that listens on exactly this; ``::`` is IPv6 alone. Raises `BindError`."""
    is_ipv6 = isinstance(address, IPv6Address)
    try:
        sock = socket.socket(socket.AF_INET6 if is_ipv6 else socket.AF_INET, socket.SOCK_STREAM)
    except OSError as error:
        raise BindError(f"{address_text(address, port)}: {error.strerror}") from error
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_ipv6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((str(address), port))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise BindError(f"{address_text(address, port)}: {_bind_trouble(error, port)}") from error
    return sock


def _bind_trouble(error: OSError, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is in use by another program"
    if error.errno == errno.EACCES and port < _UNPRIVILEGED_PORT:
        return f"ports under {_UNPRIVILEGED_PORT} need the capability CAP_NET_BIND_SERVICE"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this qube does not have the address"
    return os.strerror(error.errno or 0)


async def accept_until_closed(
    listening: socket.socket, accepted: Callable[[socket.socket, IPAddress], None]
) -> None:
    """Hand every connection to ``accepted``, non-blocking and with its peer's address.

    Ends when somebody calls `close_listening`.
    """
    limit = RateLimit()
    while listening.fileno() >= 0:
        try:
            await trio.lowlevel.wait_readable(listening)
            for _ in range(_BURST):
                connection, peer = listening.accept()
                connection.setblocking(False)
                accepted(connection, unmapped(ip_address(peer[0])))
        except trio.ClosedResourceError:
            return
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno in _SHORTAGE:
                warn(_logger, limit, "shortage", f"cannot accept connections for now: {error.strerror}")
                await trio.sleep(_SHORTAGE_PAUSE_S)
            elif error.errno not in _PEERS_OWN:
                raise


def close_listening(listening: socket.socket) -> None:
    """Close at once, also while `accept_until_closed` waits for it."""
    trio.lowlevel.notify_closing(listening)
    listening.close()
