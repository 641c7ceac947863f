# SPDX-License-Identifier: GPL-2.0-or-later
"""One forward of TCP in the exposed qube, as the listener sees it.

Its listening sockets and connections belong to the loop's thread (`connectiontable`). What the listener asks
for is done there when the method returns; only connections over calls of their own end a moment later.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import trio

from qubes_fwd_qrexec.common.clientreport import WhichClients
from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.report import ForwardReport, Way
from qubes_fwd_qrexec.common.rules import OnExpire, Transport
from qubes_fwd_qrexec.common.values import Binding
from qubes_fwd_qrexec.relay.acceptloop import BindError, open_listening
from qubes_fwd_qrexec.system.lifetime import Expiry

from .connection import Connection
from .connectiontable import ConnectionTable, Figures, TableMeans
from .flowtable import FlowMeans
from .openports import bindings, last_said, open_all, places
from .transports import Transports

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
    connections: TableMeans = field(default_factory=TableMeans)
    flows: FlowMeans = field(default_factory=FlowMeans)


class OpenForward:
    """A forward that is open: it listens from the start, and ends with `close`."""

    def __init__(self, config: ListenerConfig, means: Means) -> None:
        """Bind all ports. Raises `BindError` if one cannot be bound, and then none is."""
        self.config = config
        self.expiry = Expiry(config.expire)
        self._transports = means.transports
        self._relays = means.transports.relays
        carrier = means.transports.carrier(config)
        self.table = ConnectionTable(config, str(self), carrier, self._relays.loop, means.connections)
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
        self.config = config
        carrier = self._transports.carrier(config)
        self._relays.do_now(partial(self.table.take, config, str(self), carrier, DRAIN_MAX_S))
        self._open(bindings(config) - self.table.listening)

    def give_up(self, config: ListenerConfig) -> None:
        """Stop listening on what is not in ``config``."""
        self._close(self.table.listening - bindings(config))

    @property
    def is_listening(self) -> bool:
        """Whether every configured port is open."""
        return self.table.listening == bindings(self.config)

    def close(self) -> None:
        """End the forward: stop listening, and cut live connections or let them go on, as the rule says."""
        self.stop_listening()
        if self.config.on_expire is OnExpire.CUT:
            self.cut()

    def cut(self) -> None:
        """End all connections."""
        self._relays.do_now(self.table.cut)

    async def cut_clients(self, which: WhichClients) -> int:
        """Cut connections of these clients; return how many, once they have ended or after `_CUTTING_S`."""
        cut = self._relays.do_now(partial(self.table.cut_clients, which))
        with trio.move_on_after(_CUTTING_S):
            while not cut.isdisjoint(self.live):  # noqa: ASYNC110 - each ends by itself
                await trio.sleep(_CUTTING_LOOK_S)
        return len(cut)

    @property
    def live(self) -> frozenset[Connection]:
        """All connections. What they have counted may be read here; all else is for the loop's thread."""
        return frozenset(self.table.connections)  # in one step, while the loop's thread may change it

    @property
    def connections(self) -> int:
        """How many connections are live."""
        return len(self.table.connections)

    def stop_listening(self) -> None:
        """Close the listening sockets; connections go on."""
        self._close(self.table.listening)

    def _open(self, wanted: Iterable[Binding]) -> None:
        opened = open_all(wanted, open_listening)
        if not opened:
            return
        try:
            self._relays.do_now(partial(self.table.open, opened))
        except OSError as error:
            raise BindError(f"{self}: cannot watch its sockets: {error.strerror}") from error

    def _close(self, unwanted: frozenset[Binding]) -> None:
        if unwanted:
            self._relays.do_now(partial(self.table.give_up, unwanted))

    def report(self, figures: Figures | None = None) -> ForwardReport:
        """The state of this forward now, with the figures of its table if somebody has asked for these."""
        table, pool = self.table, self._transports.pool(self.config)
        live, sent, received, refused = figures or self._relays.do_now(table.figures)
        way = table.way if self.config.transport is Transport.CALL else Way.IDLE
        last_error, last_error_at = last_said(
            table.counters.last_error, None if pool is None else pool.last_problem
        )
        return ForwardReport(
            target=self.config.target,
            name=self.config.name,
            since=int(table.counters.since),
            connections=len(live),
            total=table.counters.total,
            refused=refused,
            sent=sent + sum(connection.sent for connection in live),
            received=received + sum(connection.received for connection in live),
            transport=self.config.transport,
            way=way if pool is None else pool.way,
            mux_calls=0 if pool is None else pool.count,
            is_listening=self.is_listening,
            last_error=last_error,
            last_error_at=last_error_at,
        )
