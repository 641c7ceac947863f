# SPDX-License-Identifier: GPL-2.0-or-later
"""An accepted connection carried to its target, by the transport that its forward says.

`Transports` keeps what forwards share: the budget of calls, and the tunnels to each target.
"""

import socket
from ipaddress import ip_address

import trio

from .budget import Budget
from .call import Caller, CallTimeouts, Ending, relay_over_call
from .callbudget import CallBudget
from .config import ListenerConfig, Service
from .counters import Carried
from .crowd import source_key
from .relaythread import RelayThread
from .rules import Proxy, Transport
from .tunnel import Origin, ProxyVersion
from .tunnels import LINGER_S, Tunnels
from .values import TargetPorts

_PROXY_VERSIONS = {Proxy.OFF: ProxyVersion.OFF, Proxy.V1: ProxyVersion.V1, Proxy.V2: ProxyVersion.V2}

_TunnelsKey = tuple[str, str, TargetPorts]


class Transports:
    """Made once for a listener; carries every connection of every forward."""

    def __init__(
        self,
        client: tuple[str, ...],
        relays: RelayThread,
        tasks: trio.Nursery,
        calls_max: int,
        timeouts: CallTimeouts,
        linger_s: float = LINGER_S,
    ) -> None:
        self.relays = relays
        self._client = client
        self._tasks = tasks
        self.calls = CallBudget(tasks, calls_max, bugs=relays.loop.bugs)
        self._timeouts = timeouts
        self._linger_s = linger_s
        self._budget = Budget()
        self._tunnels: dict[_TunnelsKey, Tunnels] = {}
        self._is_draining = False

    async def carry(
        self,
        config: ListenerConfig,
        port: int,
        accepted: socket.socket,
        carried: Carried | None = None,
        origin: Origin | None = None,
    ) -> Ending:
        """Carry a connection that was accepted on ``port``; an `Ending` with an error asks for an abort.

        ``origin`` is said where it is no TCP connection.

        Raises `RefusedError` when there is no call to be had, OSError when the connection is gone.
        """
        origin = origin or _origin(accepted)
        if config.transport is Transport.TUNNEL:
            tunnels = self._tunnels_for(config)
            proxy = _PROXY_VERSIONS[config.proxy]
            return await tunnels.relay(accepted, config.target_port(port), origin, proxy, carried)
        caller = Caller(
            self._client,
            config.target,
            f"{config.service}+{config.target_port(port)}",
            self.calls,
            ((config.target, config.name), *source_key(origin.client)),
            ends_with_server=config.service is Service.CONNECT_TCP,
        )
        return await relay_over_call(accepted, caller, self.relays, self._timeouts, carried)

    def tunnels(self, config: ListenerConfig) -> Tunnels | None:
        """The tunnels that the forward uses, if there were any yet."""
        return self._tunnels.get(_tunnels_key(config))

    def reconfigured(self, configs: list[ListenerConfig]) -> None:
        """The configuration is new, and with it the policy: ask dom0 again, and let go what nobody needs."""
        needed = {_tunnels_key(config) for config in configs if config.transport is Transport.TUNNEL}
        for key in self._tunnels.keys() - needed:
            self._tunnels.pop(key).retire()
        self.calls.expect(len(needed))
        self.calls.forget_refusals()

    def drain(self) -> None:
        """The listener stops: no more tunnels, and each that is there ends with its last stream."""
        self._is_draining = True
        for tunnels in self._tunnels.values():
            tunnels.retire()

    def _tunnels_for(self, config: ListenerConfig) -> Tunnels:
        key = _tunnels_key(config)
        if key not in self._tunnels:
            ports = config.target_ports
            self._tunnels[key] = Tunnels(
                self._client,
                self.calls,
                config.target,
                f"{config.service}+{ports.brief()}+tunnel",
                ports,
                self.relays,
                self._budget,
                self._tasks,
                self._timeouts.half_close_s,
                self._linger_s,
                self._timeouts.idle_s,
            )
            if self._is_draining:
                self._tunnels[key].retire()
        return self._tunnels[key]


def _tunnels_key(config: ListenerConfig) -> _TunnelsKey:
    """Target, service and ports: what dom0 judges."""
    return config.target, config.service, config.target_ports


def _origin(accepted: socket.socket) -> Origin:
    """Who is connected to what. Raises OSError when the client has left."""
    client, client_port = accepted.getpeername()[:2]
    exposed, exposed_port = accepted.getsockname()[:2]
    return Origin(ip_address(client), client_port, ip_address(exposed), exposed_port)
