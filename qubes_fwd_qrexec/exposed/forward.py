# SPDX-License-Identifier: GPL-2.0-or-later
"""One forward in the exposed qube: its listening sockets, its connections, and how each one ends."""

import logging
import math
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address

import trio

from qubes_fwd_qrexec.common.clientreport import WhichClients
from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.errors import RefusedError
from qubes_fwd_qrexec.common.report import ForwardReport, Way
from qubes_fwd_qrexec.common.rules import OnExpire, Transport
from qubes_fwd_qrexec.common.values import Binding, IPAddress, unmapped
from qubes_fwd_qrexec.relay.acceptloop import (
    accept_until_closed,
    close_listening,
    open_listening,
    peer_of,
)
from qubes_fwd_qrexec.relay.copy import abort, close_well, read_out, undelivered_bytes
from qubes_fwd_qrexec.relay.socketbuffers import WAITING_BYTES, set_size
from qubes_fwd_qrexec.system.bugs import Bugs
from qubes_fwd_qrexec.system.ingress import came_by
from qubes_fwd_qrexec.system.lifetime import Expiry
from qubes_fwd_qrexec.system.logs import RateLimit, warn

from .connectionlog import ConnectionLog, How
from .counters import WAYS, Carried, Counters
from .flowtable import FlowMeans
from .limits import Account, NotAdmitted, Process
from .openports import allows, bindings, last_said, open_all, places
from .transports import Transports

_logger = logging.getLogger(__name__)

# docs/behaviours.md, 12: what arrived before an abort is delivered before the RST, within this time.
DELIVERY_S = 1.0
_DELIVERY_LOOK_S = 0.02
# Who cuts connections is answered when they have ended, which takes a turn or two.
_CUTTING_S = 1.0
_CUTTING_LOOK_S = 0.01

# How long connections may go on after their rule has ended. dom0 tells the target the same (`allowance`).
# There must be an end, and an hour is a long download.
DRAIN_MAX_S = 3600.0


@dataclass(frozen=True, slots=True)
class Means:
    """What all forwards of a listener share."""

    transports: Transports
    tasks: trio.Nursery
    process: Process = field(default_factory=Process)
    log: ConnectionLog = field(default_factory=ConnectionLog)
    shortage: RateLimit = field(default_factory=RateLimit)
    flows: FlowMeans = field(default_factory=FlowMeans)

    @property
    def bugs(self) -> Bugs:
        """Where bugs of this process are counted."""
        return self.transports.relays.loop.bugs


class _Connection:
    """One accepted connection, from when it is let in until it has ended."""

    __slots__ = ("carried", "client", "cut_as", "local", "peer", "scope", "sock", "target_port")

    def __init__(self, sock: socket.socket, peer: Binding, target_port: int) -> None:
        self.sock = sock
        self.peer = peer
        self.client: IPAddress = unmapped(peer[0])
        address, port = sock.getsockname()[:2]
        self.local: Binding = unmapped(ip_address(address)), port
        self.target_port = target_port
        self.carried = Carried(time.monotonic())
        self.scope = trio.CancelScope()
        self.cut_as: How | None = None

    @property
    def moved_at(self) -> float:
        return self.carried.moved_at

    @property
    def since(self) -> float:
        return self.carried.since

    @property
    def sent(self) -> int:
        return self.carried.sent

    @property
    def received(self) -> int:
        return self.carried.received

    @property
    def ends_at(self) -> float:
        """When it must be over at the latest (trio's clock); never, as long as its forward allows it."""
        return self.scope.deadline

    def cut(self, how: How | None = None) -> None:
        """End it now: both sides see RST. ``how`` is what the log says, if not that its forward has ended."""
        self.cut_as = how
        self.scope.cancel()

    def make_room(self) -> None:
        self.cut(How.MADE_ROOM)


def _allows(config: ListenerConfig, connection: _Connection) -> bool:
    """Whether the same client could connect anew to the same port of the target."""
    return allows(config, connection.client, connection.local, connection.target_port) and came_by(
        connection.sock, config.side.group
    )


class OpenForward:
    """A forward that is open: it listens from the start, and ends with `close`."""

    def __init__(self, config: ListenerConfig, means: Means) -> None:
        """Bind all ports. Raises `BindError` if one cannot be bound, and then none is."""
        self.config = config
        self.expiry = Expiry(config.expire)
        self.account = Account(config.limits, means.process)
        self._means = means
        self.counters = Counters()
        self._way = Way.IDLE
        self._limit = RateLimit()
        self._listening: dict[Binding, socket.socket] = {}
        self.live: set[_Connection] = set()
        self._open(bindings(config))

    def __str__(self) -> str:
        return f"{self.config.target} {self.config.name} ({places(self.config)})"

    def reconfigure(self, config: ListenerConfig) -> None:
        """Take a new configuration. It affects neither unchanged ports nor connections that it still allows.

        Connections that it no longer allows are cut, or have `DRAIN_MAX_S` left with on-expire=drain. Raises
        `BindError` if new ports cannot be opened. Everything else is in force even then: dom0 may have
        narrowed or ended something, and does not learn at once that a port is taken.
        """
        self.give_up(config)
        if config.expire != self.config.expire:
            self.expiry = Expiry(config.expire)  # unchanged, it keeps the wall clock of when it was set
        self.account.change(config.limits)
        self.config = config
        for connection in self.live:
            if _allows(config, connection):
                connection.scope.deadline = math.inf
            elif config.on_expire is OnExpire.CUT:
                connection.cut()
            else:
                ends_at = trio.current_time() + DRAIN_MAX_S
                connection.scope.deadline = min(connection.scope.deadline, ends_at)
        self._open(bindings(config) - self._listening.keys())

    def give_up(self, config: ListenerConfig) -> None:
        """Stop listening on what is not in ``config``."""
        self._close(self._listening.keys() - bindings(config))

    @property
    def is_listening(self) -> bool:
        """Whether every configured port is open."""
        return self._listening.keys() == bindings(self.config)

    def close(self) -> None:
        """End the forward: stop listening, and cut live connections or let them go on, as the rule says."""
        self.stop_listening()
        if self.config.on_expire is OnExpire.CUT:
            self.cut()

    def cut(self) -> None:
        """End all connections."""
        for connection in self.live:
            connection.cut()

    async def cut_clients(self, which: WhichClients) -> int:
        """Cut connections of these clients; return how many, once they have ended or after `_CUTTING_S`."""
        cut = {one for one in self.live if which.has(*one.peer) and not one.scope.cancel_called}
        for connection in cut:
            connection.cut(How.CUT_BY_ADMIN)
        with trio.move_on_after(_CUTTING_S):
            while cut & self.live:  # noqa: ASYNC110 - each ends by itself
                await trio.sleep(_CUTTING_LOOK_S)
        return len(cut)

    @property
    def connections(self) -> int:
        """How many connections are live."""
        return len(self.live)

    def stop_listening(self) -> None:
        """Close the listening sockets; connections go on."""
        self._close(set(self._listening))

    def _open(self, wanted: Iterable[Binding]) -> None:
        opened = open_all(wanted, open_listening)
        self._listening |= opened
        for (_, port), sock in opened.items():
            accepted = partial(self._accepted, port)
            means = self._means
            means.tasks.start_soon(accept_until_closed, sock, accepted, means.shortage, means.bugs)

    def _close(self, unwanted: Iterable[Binding]) -> None:
        for binding in unwanted:
            close_listening(self._listening.pop(binding))

    def _accepted(self, port: int, accepted: socket.socket) -> None:
        """Refuse a stranger, or one too many, before doing anything else; serve everybody else."""
        peer = peer_of(accepted)
        if peer is None:
            accepted.close()
            return
        connection = _Connection(accepted, peer, self.config.target_port(port))
        refusal = self._refusal(connection)
        if refusal is not None:
            abort(accepted)
            self.counters.refused(refusal)
            self._warn(refusal, f"refused {connection.client}: {self.account.words(refusal)}")
            return
        set_size(accepted, WAITING_BYTES)
        self.live.add(connection)
        self._means.tasks.start_soon(self._serve, port, connection)

    def _refusal(self, connection: _Connection) -> NotAdmitted | None:
        """Why it is not let in. Without a reason it counts as let in, until `_serve` ends."""
        if connection.client not in self.config.sources:
            return NotAdmitted.STRANGER
        if not came_by(connection.sock, self.config.side.group):
            return NotAdmitted.SIDE
        return self.account.admit(connection)

    async def _serve(self, port: int, connection: _Connection) -> None:
        """Carry one connection. It ends with an abort unless both directions ended well."""
        accepted, carried = connection.sock, connection.carried
        self.counters.opened(carried)
        line = self._means.log.opened(self.config, accepted.getpeername, port)
        how = How.CUT
        try:
            with connection.scope:
                is_well, how = await self._relay(port, accepted, connection.client, carried)
                if is_well:
                    close_well(accepted)
                else:
                    await delivered(accepted)
        except Exception as bug:
            if self._means.transports.relays.has_failed:
                raise
            how = How.BUG
            self._means.bugs.note(bug)
        finally:
            how = connection.cut_as or how
            if how is How.MADE_ROOM:
                self.counters.refused(how)
                self._warn(how, f"ended the idlest connection of {connection.client} to let others in")
            self.live.discard(connection)
            abort(accepted)
            self.account.leave(connection)
            self.counters.closed(carried)
            self._means.log.ended(line, self.config, carried, how)

    async def _relay(
        self, port: int, accepted: socket.socket, peer: IPAddress, carried: Carried
    ) -> tuple[bool, How]:
        """Carry it. Returns whether it ended well, and how; if not well, a warning is in the log."""
        try:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ending = await self._means.transports.carry(self.config, port, accepted, carried)
        except RefusedError as error:
            self._failed(error.kind, str(error))
            self._warn(error.kind, f"{peer}: {error}")
            return False, How.REFUSED
        except OSError as error:
            self._failed(None, str(error))
            self._warn("trouble", f"{peer}: {error}")
            return False, How.ABORTED
        if ending.error is not None:
            self._failed(ending.refusal, ending.error)
            self._warn(ending.refusal or "trouble", f"{peer}: {ending.error}")
        elif self.config.transport is Transport.CALL:
            self._way = Way.IDLE
        return ending.error is None, ending.how

    def _failed(self, kind: str | None, error: str) -> None:
        """Count a failure; without a mux call it also shows what is wrong on the way to the target."""
        self.counters.failed(error)
        if kind is not None:
            self.counters.refused(kind)
        if self.config.transport is Transport.CALL:
            self._way = WAYS.get(kind or "", self._way)

    def report(self) -> ForwardReport:
        """The figures and the state of this forward now."""
        counters, pool = self.counters, self._means.transports.pool(self.config)
        way = self._way
        if self.config.transport is Transport.MUX:
            way = Way.IDLE if pool is None else pool.way
        last_error, last_error_at = last_said(
            counters.last_error, None if pool is None else pool.last_problem
        )
        return ForwardReport(
            target=self.config.target,
            name=self.config.name,
            since=int(counters.since),
            connections=counters.connections,
            total=counters.total,
            refused=dict(counters.refusals),
            sent=counters.sent,
            received=counters.received,
            transport=self.config.transport,
            way=way,
            mux_calls=0 if pool is None else pool.count,
            is_listening=self.is_listening,
            last_error=last_error,
            last_error_at=last_error_at,
        )

    def _warn(self, kind: str, message: str) -> None:
        warn(_logger, self._limit, kind, f"{self}: {message}")


async def delivered(accepted: socket.socket, bound_s: float | None = None) -> None:
    """Wait a moment until the client has what it was sent, as an abort drops the rest.

    The kernel has no event for it, so this polls; one look is nearly always enough.
    """
    with trio.move_on_after(DELIVERY_S if bound_s is None else bound_s):
        while undelivered_bytes(accepted):
            read_out(accepted)
            await trio.sleep(_DELIVERY_LOOK_S)
