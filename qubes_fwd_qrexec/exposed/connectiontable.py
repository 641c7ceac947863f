# SPDX-License-Identifier: GPL-2.0-or-later
"""The connections of one forward of TCP: who is let in, and what a new configuration does to them.

A stranger, or one too many, is refused before anything else is done. It belongs to the loop's thread;
`forward` asks from trio's.
"""

import logging
import math
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from qubes_fwd_qrexec.common.clientreport import WhichClients
from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.report import Way
from qubes_fwd_qrexec.common.rules import OnExpire
from qubes_fwd_qrexec.common.values import Binding, IPAddress, unmapped
from qubes_fwd_qrexec.relay.acceptloop import (
    Acceptor,
    AcceptTurns,
    SocketAddress,
    address_of,
    close_listening,
)
from qubes_fwd_qrexec.relay.copy import abort
from qubes_fwd_qrexec.relay.loop import Loop, Timer
from qubes_fwd_qrexec.relay.patience import TICK_S
from qubes_fwd_qrexec.system.ingress import Sides
from qubes_fwd_qrexec.system.logs import RateLimit, warn

from .connection import Carrier, Connection
from .connectionlog import ConnectionLog, How
from .counters import WAYS, Counters
from .limits import Account, NotAdmitted, Process
from .openports import allows

_logger = logging.getLogger(__name__)


Figures = tuple[tuple[Connection, ...], int, int, dict[str, int]]
"""The connections, what those that have ended had moved (bytes from and to clients), and refusals."""


@dataclass(frozen=True, slots=True)
class TableMeans:
    """What the connections of all forwards of a listener share, in the loop's thread."""

    process: Process = field(default_factory=Process)
    log: ConnectionLog = field(default_factory=ConnectionLog)
    accepting: AcceptTurns = field(default_factory=AcceptTurns)


class ConnectionTable:
    """The listening sockets and connections of one forward; ``name`` is how the log calls it.

    ``way``: what calls of its own show of the way to the target, if it makes any.
    """

    def __init__(
        self, config: ListenerConfig, name: str, carrier: Carrier, loop: Loop, means: TableMeans
    ) -> None:
        self.config = config
        self.counters = Counters()
        self.account = Account(config.limits, means.process)
        self.connections: set[Connection] = set()
        self.way = Way.IDLE
        self._acceptors: dict[Binding, Acceptor] = {}
        self._name = name
        self._carrier = carrier
        self._loop = loop
        self._means = means
        self._sides = Sides()
        self._limit = RateLimit()
        self._timer: Timer | None = None

    @property
    def listening(self) -> frozenset[Binding]:
        """The addresses and ports where it accepts connections."""
        return frozenset(self._acceptors)

    # What its forward asks for

    def take(self, config: ListenerConfig, name: str, carrier: Carrier, drain_s: float) -> None:
        """Take a new configuration: connections that it no longer allows end, at once or within ``drain_s``.

        Those that wait for a call wait for one of ``carrier`` from now on.
        """
        before = self._carrier
        self.config, self._name, self._carrier = config, name, carrier
        self.account.change(config.limits)
        ends_at = time.monotonic() + drain_s
        for connection in list(self.connections):
            if self._allows(connection):
                connection.ends_at = math.inf
                if carrier is not before and before.forget(connection):
                    connection.config = config
                    self._loop.guarded(connection.fail, carrier.carry, connection)
            elif config.on_expire is OnExpire.CUT:
                self._cut((connection,))
            else:
                connection.ends_at = min(connection.ends_at, ends_at)
        self._tick_later()

    def open(self, sockets: Mapping[Binding, socket.socket]) -> None:
        """Accept connections at these sockets, which it owns. Raises OSError, with all of them closed, when
        the kernel can watch no more."""
        opened = []
        try:
            for binding, sock in sockets.items():
                accepted = partial(self._accepted, binding)
                self._acceptors[binding] = Acceptor(self._loop, sock, accepted, self._means.accepting)
                opened.append(binding)
        except OSError:
            self.give_up(opened)
            for binding in sockets.keys() - set(opened):
                close_listening(sockets[binding])
            raise

    def give_up(self, unwanted: Iterable[Binding]) -> None:
        """Accept no more connections there."""
        for binding in unwanted:
            self._acceptors.pop(binding).close()

    def cut(self) -> None:
        """End all connections."""
        self._cut(tuple(self.connections))

    def cut_clients(self, which: WhichClients) -> frozenset[Connection]:
        """End the connections of these clients; those over calls of their own end soon."""
        cut = frozenset(one for one in self.connections if which.has(*one.peer) and one.cut_as is None)
        self._cut(cut, How.CUT_BY_ADMIN)
        return cut

    def figures(self) -> Figures:
        """What fits together, at one moment."""
        counters = self.counters
        return tuple(self.connections), counters.sent, counters.received, dict(counters.refusals)

    def _allows(self, connection: Connection) -> bool:
        """Whether the same client could connect anew to the same port of the target."""
        return allows(
            self.config, connection.client, connection.local, connection.target_port
        ) and self._sides.came_by(connection.sock, self.config.side.group)

    def _tick_later(self) -> None:
        """Look each second while any connection has an end."""
        if self._timer is None and any(one.ends_at < math.inf for one in self.connections):
            self._timer = self._loop.after(TICK_S, self._tick, self.cut)

    def _tick(self) -> None:
        self._timer = None
        now = time.monotonic()
        self._cut([one for one in self.connections if one.ends_at <= now])
        self._tick_later()

    def _cut(self, connections: Iterable[Connection], how: How = How.CUT) -> None:
        """End these; a bug in ending one keeps none of the others."""
        for connection in connections:
            self._loop.guarded(connection.fail, connection.cut, how)

    # For its acceptors

    def _accepted(self, binding: Binding, sock: socket.socket, peer: SocketAddress) -> None:
        """Refuse a stranger, or one too many, before doing anything else; carry everybody else."""
        try:
            sock.getpeername()
        except OSError:  # it has left, and costs neither a place nor a stream, however many such there are
            sock.close()
            return
        address = address_of(peer[0])
        client = unmapped(address)
        if client not in self.config.sources:
            self._refuse(NotAdmitted.STRANGER, sock, client)
            return
        if not self._sides.came_by(sock, self.config.side.group):
            self._refuse(NotAdmitted.SIDE, sock, client)
            return
        local = _local(sock) if binding[0].is_unspecified else binding
        connection = Connection(self, self.config, sock, (address, peer[1]), client, local, time.monotonic())
        refusal = self.account.admit(connection)
        if refusal is not None:
            self._refuse(refusal, sock, client)
            return
        self.connections.add(connection)
        self.counters.total += 1
        self._loop.guarded(connection.fail, self._begin, connection)

    def _begin(self, connection: Connection) -> None:
        connection.line = self._means.log.opened(self.config, connection.client_name, connection.local[1])
        self._carrier.carry(connection)

    def _refuse(self, refusal: NotAdmitted, sock: socket.socket, client: IPAddress) -> None:
        abort(sock)
        self.counters.refused(refusal)
        self._warn(refusal, lambda: f"refused {client}: {self.account.words(refusal)}")

    # As the owner of its connections

    def failed(self, connection: Connection, kind: str | None, error: str) -> None:
        self.counters.failed(error)
        if kind is not None:
            self.counters.refused(kind)
            self.way = WAYS.get(kind, self.way)
        self._warn(kind or "trouble", lambda: f"{connection.client}: {error}")

    def ended(self, connection: Connection, how: How) -> None:
        if connection not in self.connections:
            return
        self.connections.discard(connection)
        self.account.leave(connection)
        self.counters.closed(connection)
        if how is How.CLOSED:
            self.way = Way.IDLE
        elif how is How.MADE_ROOM:
            self.counters.refused(how)
            self._warn(how, lambda: f"ended the idlest connection of {connection.client} to let others in")
        self._means.log.ended(connection.line, self.config, connection, how)

    def _warn(self, kind: str, message: Callable[[], str]) -> None:
        warn(_logger, self._limit, kind, lambda: f"{self._name}: {message()}")


def _local(sock: socket.socket) -> Binding:
    """The address of this qube, and the port, that a client has connected to."""
    address, port = sock.getsockname()[:2]
    return unmapped(address_of(address)), port
