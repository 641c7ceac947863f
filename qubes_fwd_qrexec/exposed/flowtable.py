# SPDX-License-Identifier: GPL-2.0-or-later
"""The flows of one forward of UDP: who is let in, for how long, and what a new configuration does to them.

It has flows of those clients alone that sources, side and limits let in: a stranger's datagram costs a look
at the list, and leaves a number in a counter. It belongs to the loop's thread; `udpforward` asks from trio's.
"""

import logging
import math
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address

from qubes_fwd_qrexec.common.clientreport import WhichClients
from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.rules import OnExpire, Proxy
from qubes_fwd_qrexec.common.values import Binding, IPAddress, unmapped
from qubes_fwd_qrexec.mux import ProxyVersion
from qubes_fwd_qrexec.relay.loop import Loop, Timer
from qubes_fwd_qrexec.relay.patience import TICK_S
from qubes_fwd_qrexec.system.datagrams import Arrived
from qubes_fwd_qrexec.system.ingress import Sides
from qubes_fwd_qrexec.system.logs import RateLimit, warn

from .connectionlog import ConnectionLog, FlowHow
from .flow import Carrier, Flow
from .flowcounters import FlowCounters
from .limits import Account, NotAdmitted, Process
from .openports import allows
from .udpport import UdpPort

_logger = logging.getLogger(__name__)

# How many flows a process has at once; docs/numbers.md has so many held.
FLOWS_MAX = 10_000
# For how long a flow in which nothing moves is kept, before the server has answered and after: what Linux'
# conntrack does for UDP (nf_conntrack_udp_timeout and nf_conntrack_udp_timeout_stream).
UNANSWERED_S = 30.0
ANSWERED_S = 120.0
# A client with as many flows as it may have gives up one in which nothing has moved for so long: most clients
# send each query from another port, and say nothing when they have their answer.
QUIET_S = 0.5
# How many flows a second are ended to make room for those of others: each takes a look at a thousand.
YIELDS = 500


@dataclass(frozen=True, slots=True)
class FlowMeans:
    """What the flows of all forwards of a listener share, in the loop's thread."""

    process: Process = field(default_factory=lambda: Process(FLOWS_MAX, yields=YIELDS))
    log: ConnectionLog = field(default_factory=ConnectionLog)


class FlowTable:
    """The ports and flows of one forward; ``name`` is how the log calls it."""

    def __init__(
        self, config: ListenerConfig, name: str, carrier: Carrier, loop: Loop, means: FlowMeans
    ) -> None:
        self.config = config
        self.counters = FlowCounters()
        self.account = Account(config.limits, means.process, quiet_s=QUIET_S)
        self.ports: dict[Binding, UdpPort] = {}
        self._name = name
        self._carrier = carrier
        self._loop = loop
        self._means = means
        self._sides = Sides()
        self._limit = RateLimit()
        self._timer: Timer | None = None
        self._ticked_at = 0.0

    @property
    def flows(self) -> list[Flow]:
        return [flow for port in self.ports.values() for flow in port.flows.values()]

    @property
    def draining(self) -> frozenset[Binding]:
        """Where no new flows are taken, and old ones go on."""
        return frozenset(binding for binding, port in tuple(self.ports.items()) if not port.is_open)

    @property
    def listening(self) -> frozenset[Binding]:
        """The addresses and ports where new flows are taken."""
        return frozenset(binding for binding, port in tuple(self.ports.items()) if port.is_open)

    # What its forward asks for

    def take(self, config: ListenerConfig, name: str, carrier: Carrier, drain_s: float) -> None:
        """Take a new configuration: flows that it no longer allows end, at once or within ``drain_s``."""
        self.config, self._name, self._carrier = config, name, carrier
        self.account.change(config.limits)
        ends_at = time.monotonic() + drain_s
        for port in list(self.ports.values()):
            for flow in list(port.flows.values()):
                if self._allows(port, flow):
                    flow.ends_at = math.inf
                    flow.carrier = carrier  # no more calls are made for the forward as it was
                    if flow.proxy is not self._proxy:
                        port.begin_anew(flow, self._proxy)
                elif config.on_expire is OnExpire.CUT:
                    port.end(flow, FlowHow.CUT)
                else:
                    flow.ends_at = min(flow.ends_at, ends_at)
        self._close_unused()

    def open(self, sockets: Mapping[Binding, socket.socket]) -> None:
        """Take new flows at these sockets, which it owns. Raises OSError, with all of them closed, when the
        kernel can watch no more."""
        waiting = dict(sockets)
        opened = []
        try:
            while waiting:
                binding, sock = waiting.popitem()
                try:
                    self.ports[binding] = UdpPort(self._loop, binding, sock, self)
                except OSError:
                    sock.close()
                    raise
                opened.append(binding)
        except OSError:
            for sock in waiting.values():
                sock.close()
            for binding in opened:
                self.ports.pop(binding).close()
            raise

    def reopen(self, wanted: Iterable[Binding]) -> frozenset[Binding]:
        """Take new flows again where sockets are still there for old ones, and return where that is."""
        found = frozenset(binding for binding in wanted if binding in self.ports)
        for binding in found:
            self.ports[binding].is_open = True
        return found

    def give_up(self, unwanted: Iterable[Binding], *, is_cut: bool) -> None:
        """Take no more flows there. The sockets are closed, unless flows go on in them.

        A port that was closed meanwhile, as its last flow has ended, is no fault.
        """
        for binding in unwanted:
            port = self.ports.get(binding)
            if port is not None:
                port.is_open = False
                if is_cut:
                    del self.ports[binding]
                    port.close()
        self._close_unused()

    def cut(self) -> None:
        """End all flows."""
        for flow in self.flows:
            flow.owner.end(flow, FlowHow.CUT)
        self._close_unused()

    def cut_clients(self, which: WhichClients) -> int:
        """End the flows of these clients, and return how many."""
        cut = [flow for flow in self.flows if which.has(*flow.peer)]
        for flow in cut:
            flow.owner.end(flow, FlowHow.CUT_BY_ADMIN)
        self._close_unused()
        return len(cut)

    def count_lost(self) -> None:
        """Count what the kernel had no room for until now."""
        for port in self.ports.values():
            port.count_lost()

    @property
    def _proxy(self) -> ProxyVersion:
        """The header in front of each datagram to the server."""
        return ProxyVersion.V2 if self.config.proxy is Proxy.V2 else ProxyVersion.OFF

    def _allows(self, port: UdpPort, flow: Flow) -> bool:
        """Whether the same client could begin the same flow anew."""
        local = flow.local_address, port.port
        return allows(self.config, flow.client, local, flow.target_port) and self.lets_in_by(flow.interface)

    def _close_unused(self) -> None:
        for binding, port in list(self.ports.items()):
            if not port.is_open and not port.flows:
                self.ports.pop(binding).close()

    # For its ports

    def newcomer(self, port: UdpPort, arrived: Arrived, now: float) -> Flow | None:
        if not port.is_open:
            return None
        client = unmapped(ip_address(arrived.sender[0]))
        if client not in self.config.sources:
            self._refuse(NotAdmitted.STRANGER, client)
            return None
        if not self.lets_in_by(arrived.interface):
            self._refuse(NotAdmitted.SIDE, client)
            return None
        flow = Flow(
            port,
            self._carrier,
            arrived.sender,
            client,
            arrived.local,
            arrived.interface,
            self.config.target_port(port.port),
            self._proxy,
            now,
        )
        refusal = self.account.admit(flow)
        if refusal is not None:
            self._refuse(refusal, client)
            return None
        self.counters.total += 1
        flow.line = self._means.log.opened(self.config, flow.client_name, port.port)
        if self._timer is None:
            self._ticked_at = now
            self._timer = self._loop.after(TICK_S, self._tick, self.cut)
        return flow

    def lets_in_by(self, interface: int) -> bool:
        return self._sides.is_by(interface, self.config.side.group)

    def port_failed(self, port: UdpPort) -> None:
        self.ports.pop(port.binding, None)

    def flow_over(self, flow: Flow, how: FlowHow) -> None:
        self.account.leave(flow)
        if how is FlowHow.MADE_ROOM:
            self.counters.refused(how)
            self._warn(how, lambda: f"ended a quiet flow of {flow.client} to make room for another")
        self._means.log.ended(flow.line, self.config, flow, how)

    def not_carried(self, flow: Flow, kind: str, error: str) -> None:
        self.counters.refused(kind)
        self.counters.failed(error)
        self._warn(kind, lambda: f"{flow.client}: {error}")

    def _refuse(self, refusal: NotAdmitted, client: IPAddress) -> None:
        self.counters.refused(refusal)
        self._warn(refusal, lambda: f"refused {client}: {self.account.words(refusal)}")

    def _warn(self, kind: str, message: Callable[[], str]) -> None:
        warn(_logger, self._limit, kind, lambda: f"{self._name}: {message()}")

    def _tick(self) -> None:
        """A second has passed: end the flows whose time is over."""
        self._timer = None
        now = time.monotonic()
        late_s = now - self._ticked_at - TICK_S
        self._ticked_at = now
        if late_s > TICK_S:  # this process was stopped, which is nobody's silence
            for flow in self.flows:
                flow.moved_at = min(now, flow.moved_at + late_s)
        for port in list(self.ports.values()):
            for flow in list(port.flows.values()):
                if now - flow.moved_at >= (ANSWERED_S if flow.is_answered else UNANSWERED_S):
                    port.end(flow, FlowHow.IDLE)
                elif now >= flow.ends_at:
                    port.end(flow, FlowHow.CUT)
        self._close_unused()
        if self.account.connections:
            self._timer = self._loop.after(TICK_S, self._tick, self.cut)
