# SPDX-License-Identifier: GPL-2.0-or-later
"""One forward of UDP in the exposed qube, as the listener sees it: the analog of `forward.OpenForward`.

Its ports and flows belong to the loop's thread (`flowtable`). What the listener asks for is done there when
the method returns: what has ended passes no datagram in either direction any more.
"""

from collections.abc import Collection
from functools import partial

from qubes_fwd_qrexec.common.clientreport import WhichClients
from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.report import ForwardReport
from qubes_fwd_qrexec.common.rules import OnExpire
from qubes_fwd_qrexec.common.values import Binding, Proto
from qubes_fwd_qrexec.relay.acceptloop import BindError
from qubes_fwd_qrexec.system.lifetime import Expiry

from .flow import Flow
from .flowtable import FlowTable
from .forward import DRAIN_MAX_S, Means
from .openports import bindings, last_said, open_all, places
from .udpport import open_udp


class OpenUdpForward:
    """A forward that is open: it takes datagrams from the start, and ends with `close`."""

    def __init__(self, config: ListenerConfig, means: Means) -> None:
        """Bind all ports. Raises `BindError` if one cannot be bound, and then none is."""
        self.config = config
        self.expiry = Expiry(config.expire)
        self._means = means
        self._relays = means.transports.relays
        self._pool = means.transports.flow_pool(config)
        self.table = FlowTable(config, str(self), self._pool, self._relays.loop, means.flows)
        self._open(bindings(config))

    def __str__(self) -> str:
        return f"{self.config.target} {self.config.name} (udp {places(self.config)})"

    def reconfigure(self, config: ListenerConfig) -> None:
        """Take a new configuration. It affects neither unchanged ports nor flows that it still allows.

        Flows that it no longer allows are cut, or have `DRAIN_MAX_S` left with on-expire=drain. Raises
        `BindError` if new ports cannot be opened. Everything else is in force even then: dom0 may have
        narrowed or ended something, and does not learn at once that a port is taken.
        """
        self.give_up(config)
        if config.expire != self.config.expire:
            self.expiry = Expiry(config.expire)  # unchanged, it keeps the wall clock of when it was set
        self.config = config
        self._pool = self._means.transports.flow_pool(config)
        self._relays.do_now(partial(self.table.take, config, str(self), self._pool, DRAIN_MAX_S))
        self._open(bindings(config) - self.table.listening)

    def give_up(self, config: ListenerConfig) -> None:
        """Take no more flows at what is not in ``config``."""
        self._close(self.table.listening - bindings(config), is_cut=config.on_expire is OnExpire.CUT)

    def make_way(self, wanted: Collection[Binding], own: Collection[Binding] = ()) -> None:
        """Cut the flows that go on at ports which were closed, where a forward needs these ports.

        ``own``: the ports that this forward itself is about to open again.
        """
        in_the_way = {
            binding
            for binding in self.table.draining
            if binding not in own and any(_share(binding, other) for other in wanted)
        }
        self._close(in_the_way, is_cut=True)

    @property
    def is_listening(self) -> bool:
        """Whether every configured port is open."""
        return self.table.listening == bindings(self.config)

    def close(self) -> None:
        """End the forward: take no more flows, and cut live ones or let them go on, as the rule says."""
        self._close(self.table.listening, is_cut=self.config.on_expire is OnExpire.CUT)

    def cut(self) -> None:
        """End all flows."""
        self._relays.do_now(self.table.cut)

    async def cut_clients(self, which: WhichClients) -> int:
        """End the flows of these clients, and return how many."""
        return self._relays.do_now(partial(self.table.cut_clients, which))

    @property
    def live(self) -> list[Flow]:
        """All flows. What they have counted may be read here; everything else is for the loop's thread."""
        return self._relays.do_now(lambda: self.table.flows)

    @property
    def connections(self) -> int:
        """How many flows are live."""
        return self.table.account.connections

    def stop_listening(self) -> None:
        """Close the sockets, which ends the flows: the listener that comes next needs the ports."""
        self._close(self.table.listening | self.table.draining, is_cut=True)

    def _open(self, wanted: frozenset[Binding]) -> None:
        # The loop's thread may close such a port at any time, as its last flow ends.
        missing = wanted - self._relays.do_now(partial(self.table.reopen, wanted))
        opened = open_all(missing, open_udp)
        try:
            self._relays.do_now(partial(self.table.open, opened))
        except OSError as error:
            raise BindError(f"{self}: cannot watch its sockets: {error.strerror}") from error

    def _close(self, unwanted: Collection[Binding], *, is_cut: bool) -> None:
        if unwanted:
            self._relays.do_now(partial(self.table.give_up, unwanted, is_cut=is_cut))

    def report(self) -> ForwardReport:
        """The figures and the state of this forward now."""
        self._relays.do_now(self.table.count_lost)
        counters, pool = self.table.counters, self._pool
        last_error, last_error_at = last_said(counters.last_error, pool.last_problem)
        dropped = dict(counters.drops)  # in one step, while the loop's thread may change it
        return ForwardReport(
            target=self.config.target,
            name=self.config.name,
            since=int(counters.since),
            connections=self.connections,
            total=counters.total,
            refused=dict(counters.refusals),
            sent=counters.sent,
            received=counters.received,
            transport=self.config.transport,
            way=pool.way,
            mux_calls=pool.count,
            is_listening=self.is_listening,
            last_error=last_error,
            last_error_at=last_error_at,
            proto=Proto.UDP,
            datagrams_sent=counters.datagrams_sent,
            datagrams_received=counters.datagrams_received,
            dropped={str(reason): number for reason, number in sorted(dropped.items())},
        )


def _share(one: Binding, other: Binding) -> bool:
    """Whether the two cannot both be bound."""
    (ours, port), (theirs, their_port) = one, other
    is_same = ours == theirs or ours.is_unspecified or theirs.is_unspecified
    return port == their_port and ours.version == theirs.version and is_same
