# SPDX-License-Identifier: GPL-2.0-or-later
"""Listening sockets, and accepting at them, which survives any connection and any shortage."""

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable
from functools import lru_cache, partial
from ipaddress import IPv6Address, ip_address
from typing import Any

from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.values import IPAddress, Proto, address_text, unmapped
from qubes_fwd_qrexec.system.deadpeers import notice_dead_peers
from qubes_fwd_qrexec.system.ingress import note_ingress
from qubes_fwd_qrexec.system.logs import RateLimit, warn
from qubes_fwd_qrexec.system.portholder import port_holder

from .copy import abort, abort_by_default, keep_urgent_bytes
from .loop import READ, Loop
from .socketbuffers import MAX_BYTES, limit_segments, set_size

_logger = logging.getLogger(__name__)

# The kernel's default limit (net.core.somaxconn) since Linux 5.4: a burst waits here and needs no retries.
_BACKLOG = 4096
# How many are accepted in one turn of the loop before others get theirs, or one at each socket if that is
# more. Each takes some 0.1 ms in all.
BURST = 16
# docs/behaviours.md, 34: how long to wait until descriptors or memory are free.
SHORTAGE_PAUSE_S = 0.2
_SHORTAGE = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
# Errors of a connection that was gone before it was accepted (accept(2), Linux).
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
# For how many addresses it is remembered what they are, beside the text that the socket module has.
_ADDRESSES_MAX = 1024
# Only privileged programs may bind ports below this one (net.ipv4.ip_unprivileged_port_start).
_UNPRIVILEGED_PORT = 1024


SocketAddress = tuple[Any, ...]
"""As the socket module has it: host and port, and two numbers more for IPv6."""


class BindError(ForwardError):
    """Listening on a port failed; the text names the port and says why."""


def open_listening(address: IPAddress, port: int) -> socket.socket:
    """Return a non-blocking socket that listens on exactly this; ``::`` means IPv6 alone. Raises `BindError`.

    The caller owns it, and ends it with `close_listening`.
    """
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
        # Before it listens: accepted sockets inherit all this, and the handshake fixes the window scale.
        abort_by_default(sock)
        notice_dead_peers(sock)
        keep_urgent_bytes(sock)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        note_ingress(sock)
        # docs/behaviours.md, 17: the largest window that a client gets. Accepted sockets are set to less.
        set_size(sock, MAX_BYTES)
        limit_segments(sock)
        sock.bind((str(address), port))
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        raise BindError(f"{address_text(address, port)}: {bind_trouble(error, address, port)}") from error
    return sock


def bind_trouble(error: OSError, address: IPAddress, port: int, proto: Proto = Proto.TCP) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"the port is in use by {port_holder(address, port, proto=proto) or 'another program'}"
    if error.errno == errno.EACCES and port < _UNPRIVILEGED_PORT:
        return f"ports under {_UNPRIVILEGED_PORT} need the capability CAP_NET_BIND_SERVICE"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this qube does not have the address"
    return os.strerror(error.errno or 0)


class AcceptTurns:
    """What the listening sockets of a loop share: how many connections are accepted in one turn, however many
    sockets have some. ``limit`` is for log lines about a shortage, which is one of the process."""

    def __init__(self) -> None:
        self.limit = RateLimit()
        self._turn = -1
        self._ready = self._before = 0

    def share(self, turn: int) -> int:
        """How many one that is ready may accept in this turn: most likely as many are as in the last one."""
        if turn != self._turn:
            self._before = self._ready if turn == self._turn + 1 else 0
            self._turn, self._ready = turn, 0
        self._ready += 1
        return max(1, BURST // max(self._before, self._ready))


class Acceptor:
    """Owns ``listening``, from `open_listening`, in a loop, and closes it with `close`. It passes every
    connection, non-blocking, to ``accepted``, which owns it from then on, with the client's address.

    If ``accepted`` raises, that counts as a bug, and the connection is aborted.

    Raises OSError when the kernel can watch no more sockets; ``listening`` is the caller's then.
    """

    def __init__(
        self,
        loop: Loop,
        listening: socket.socket,
        accepted: Callable[[socket.socket, SocketAddress], None],
        turns: AcceptTurns,
    ) -> None:
        self._loop = loop
        self._listening = listening
        self._accepted = accepted
        self._turns = turns
        self._turn = -1
        loop.watch(listening.fileno(), READ, self._on_readable, self._pause)

    @property
    def is_closed(self) -> bool:
        return self._listening.fileno() < 0

    def close(self) -> None:
        """Accept no more; a second call changes nothing."""
        if not self.is_closed:
            self._loop.unwatch(self._listening.fileno())
            close_listening(self._listening)

    def _on_readable(self, _events: int) -> None:
        # After a pause it is mostly one client, and looking for another one would hold up its request. If
        # there are more, the next turn takes them together.
        share = self._turns.share(self._loop.turn)
        most = share if self._loop.turn == self._turn + 1 else 1
        self._turn = self._loop.turn
        for _ in range(most):
            try:
                connection, peer = self._listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                self._failed(error)
                return
            connection.setblocking(False)
            self._loop.guarded(partial(abort, connection), self._accepted, connection, peer)
            if self.is_closed:
                return

    def _failed(self, error: OSError) -> None:
        if error.errno in _SHORTAGE:
            text = f"cannot accept connections for now: {error.strerror}"
            warn(_logger, self._turns.limit, "shortage", text)
            self._pause()
        elif error.errno not in _PEERS_OWN:
            self._loop.bugs.note(error)  # unknown, but other connections may come all the same
            self._pause()

    def _pause(self) -> None:
        if not self.is_closed:
            self._loop.change(self._listening.fileno(), 0)
            self._loop.after(SHORTAGE_PAUSE_S, self._resume, self._pause)

    def _resume(self) -> None:
        if not self.is_closed:
            self._loop.change(self._listening.fileno(), READ)


@lru_cache(_ADDRESSES_MAX)
def address_of(host: str) -> IPAddress:
    """An address as the socket module has it, IPv4 as IPv4.

    A link-local one has its zone, unless that is the name of an interface with a ``%`` in it.
    """
    address, _, zone = host.partition("%")
    # ipaddress knows no zone with a % in it, and an interface may have such a name.
    return unmapped(ip_address(address)) if not zone or "%" in zone else ip_address(host)


def close_listening(listening: socket.socket) -> None:
    """Close at once.

    A child process that is just being started still has a copy of the socket, which would keep the port open
    for a moment longer. So the socket is shut down first.
    """
    with contextlib.suppress(OSError):
        listening.shutdown(socket.SHUT_RDWR)
    listening.close()
