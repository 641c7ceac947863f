# SPDX-License-Identifier: GPL-2.0-or-later
"""An accepted connection carried to its target, by the transport that its forward says.

`Transports` keeps what forwards to the same target share: its slots and back-off, and its tunnels.
"""

import socket
from ipaddress import ip_address

import trio

from .budget import Budget
from .call import CallTimeouts, Ending, relay_over_call
from .config import ListenerConfig
from .counters import Carried
from .errors import RefusedError
from .relaythread import RelayThread
from .rules import Proxy, Transport
from .targets import Target
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
        self._calls_max = calls_max
        self._timeouts = timeouts
        self._linger_s = linger_s
        self._budget = Budget()
        self._targets: dict[str, Target] = {}
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
        is_tcp = origin is None
        origin = origin or _origin(accepted)
        if config.transport is Transport.TUNNEL:
            tunnels = self._tunnels_for(config)
            proxy = _PROXY_VERSIONS[config.proxy]
            return await tunnels.relay(accepted, config.target_port(port), origin, proxy, carried)
        target = self._target(config.target)
        service = f"{config.service}+{config.target_port(port)}"
        async with target.slot(service):
            if is_tcp:
                _origin(accepted)  # it may have left while it waited
            try:
                ending = await relay_over_call(
                    accepted, self._client, config.target, service, self.relays, self._timeouts, carried
                )
            except OSError as error:
                raise RefusedError(f"cannot start {self._client[0]}: {error.strerror}") from error
        if ending.is_refused:
            target.refused(service, "the last call was refused")
        elif ending.received_bytes:
            target.accepted(service)
        return ending

    def tunnels(self, config: ListenerConfig) -> Tunnels | None:
        """The tunnels that the forward uses, if there were any yet."""
        return self._tunnels.get(_tunnels_key(config))

    def reconfigured(self, configs: list[ListenerConfig]) -> None:
        """The configuration is new, and with it the policy: ask dom0 again, and let go what nobody needs."""
        for target in self._targets.values():
            target.forget_refusals()
        needed = {_tunnels_key(config) for config in configs if config.transport is Transport.TUNNEL}
        for key in self._tunnels.keys() - needed:
            self._tunnels.pop(key).retire()

    def drain(self) -> None:
        """The listener stops: no more tunnels, and each that is there ends with its last stream."""
        self._is_draining = True
        for tunnels in self._tunnels.values():
            tunnels.retire()

    def _target(self, name: str) -> Target:
        if name not in self._targets:
            self._targets[name] = Target(name, self._calls_max)
        return self._targets[name]

    def _tunnels_for(self, config: ListenerConfig) -> Tunnels:
        key = _tunnels_key(config)
        if key not in self._tunnels:
            ports = config.target_ports
            self._tunnels[key] = Tunnels(
                self._client,
                self._target(config.target),
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
