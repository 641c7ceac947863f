# SPDX-License-Identifier: GPL-2.0-or-later
"""Carries an accepted connection to its target, over the transport that its forward uses.

`Transports` has what forwards share: the budget of calls, and the mux calls to each target.
"""

import socket
from ipaddress import ip_address
from typing import Any

import trio

from qubes_fwd_qrexec.common.config import ListenerConfig, Service
from qubes_fwd_qrexec.common.rules import Proxy, Transport
from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.mux import Origin, ProxyVersion
from qubes_fwd_qrexec.relay.thread import RelayThread
from qubes_fwd_qrexec.system.memory import memory_bytes

from .call import Caller, CallTimeouts, Ending, relay_over_call
from .callbudget import CallBudget
from .callwaits import CallWaits
from .counters import Carried
from .crowd import client_key
from .flowpool import FlowPool
from .limits import budget
from .muxpool import LINGER_S, MuxPool
from .streampool import StreamPool

_PROXY_VERSIONS = {Proxy.OFF: ProxyVersion.OFF, Proxy.V1: ProxyVersion.V1, Proxy.V2: ProxyVersion.V2}

_PoolKey = tuple[str, str, TargetPorts]
_Shared = tuple[tuple[str, ...], CallBudget, str, str, TargetPorts, RelayThread, trio.Nursery]


class Transports:
    """One for each listener; it carries the connections of all forwards."""

    def __init__(
        self,
        qrexec_client: tuple[str, ...],
        relays: RelayThread,
        tasks: trio.Nursery,
        calls_max: int,
        timeouts: CallTimeouts,
        linger_s: float = LINGER_S,
        waits: CallWaits | None = None,
    ) -> None:
        self.relays = relays
        self._qrexec_client = qrexec_client
        self._tasks = tasks
        self.calls = CallBudget(tasks, calls_max, bugs=relays.loop.bugs, waits=waits)
        self._timeouts = timeouts
        self._linger_s = linger_s
        self._budget = budget(memory_bytes())
        self.pools: dict[_PoolKey, StreamPool] = {}
        self.flow_pools: dict[_PoolKey, FlowPool] = {}
        self._is_draining = False

    async def carry(
        self,
        config: ListenerConfig,
        port: int,
        accepted: socket.socket,
        carried: Carried | None = None,
        origin: Origin | None = None,
    ) -> Ending:
        """Carry a connection that was accepted on ``port``. After an `Ending` with an error, abort it.

        ``origin``: who connected, if ``accepted`` is not a TCP socket.

        Raises `RefusedError` if there is no call for it, and OSError if the connection is gone.
        """
        origin = origin or _origin(accepted)
        if config.transport is Transport.MUX:
            pool = self._pool_for(config)
            proxy = _PROXY_VERSIONS[config.proxy]
            return await pool.relay(accepted, config.target_port(port), origin, proxy, carried)
        caller = Caller(
            self._qrexec_client,
            config.target,
            f"{config.service}+{config.target_port(port)}",
            self.calls,
            ((config.target, config.name), *client_key(origin.client)),
            ends_with_server=config.service is Service.CONNECT_TCP,
        )
        return await relay_over_call(accepted, caller, self.relays, self._timeouts, carried)

    def pool(self, config: ListenerConfig) -> StreamPool | None:
        """The pool of mux calls that a forward uses; None before its first connection."""
        return self.pools.get(_pool_key(config))

    def flow_pool(self, config: ListenerConfig) -> FlowPool:
        """The pool of mux calls that a forward of UDP uses."""
        key = _pool_key(config)
        if key not in self.flow_pools:
            self.flow_pools[key] = FlowPool(*self._shared(config), self._linger_s)
            if self._is_draining:
                self.flow_pools[key].retire()
        return self.flow_pools[key]

    def reconfigured(self, configs: list[ListenerConfig]) -> None:
        """The configuration has changed, and perhaps the policy: forget refusals, and pools without use."""
        needed = {_pool_key(config) for config in configs if config.transport is Transport.MUX}
        for key in self.pools.keys() - needed:
            self.pools.pop(key).retire()
        for key in self.flow_pools.keys() - needed:
            self.flow_pools.pop(key).retire()
        self.calls.expect(len(needed))
        self.calls.forget_refusals()

    def drain(self) -> None:
        """The listener stops: open no more mux calls, and let each end with the last that it carries."""
        self._is_draining = True
        pools: list[MuxPool[Any]] = [*self.pools.values(), *self.flow_pools.values()]
        for pool in pools:
            pool.retire()

    def _pool_for(self, config: ListenerConfig) -> StreamPool:
        key = _pool_key(config)
        if key not in self.pools:
            times = self._timeouts.half_close_s, self._linger_s, self._timeouts.idle_s
            self.pools[key] = StreamPool(*self._shared(config), self._budget, *times)
            if self._is_draining:
                self.pools[key].retire()
        return self.pools[key]

    def _shared(self, config: ListenerConfig) -> _Shared:
        """What a pool of either kind needs first."""
        ports = config.target_ports
        service = f"{config.service}+{ports.brief()}+mux"
        return self._qrexec_client, self.calls, config.target, service, ports, self.relays, self._tasks


def _pool_key(config: ListenerConfig) -> _PoolKey:
    """Target, service and ports, by which dom0 judges a mux call."""
    return config.target, config.service, config.target_ports


def _origin(accepted: socket.socket) -> Origin:
    """Who connected to what. Raises OSError if the client has left."""
    client, client_port = accepted.getpeername()[:2]
    exposed, exposed_port = accepted.getsockname()[:2]
    return Origin(ip_address(client), client_port, ip_address(exposed), exposed_port)
