# SPDX-License-Identifier: GPL-2.0-or-later
"""What an exposed qube gets to know about a forward, and no more.

dom0 writes each `ListenerConfig` as feature ``vm-config.fwd.TARGET.NAME`` of the exposed qube, or
``vm-config.udp.TARGET.NAME`` for UDP. Qubes copies it to the qube's QubesDB as
``/vm-config/fwd.TARGET.NAME``, where the listener reads it. The qube learns neither the target's addresses
nor the names of other qubes nor comments.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Self

from . import entries, values
from .errors import ConfigError
from .options import Form, one_of
from .rules import NO_LIMITS, ForwardRule, Limits, OnExpire, Proxy, Transport
from .services import FORWARD_SERVICE, UDP_SERVICE
from .values import IPAddress, ListenPorts, Proto, QubeName, RuleName, Sources, TargetPorts

# By another kind of key an older listener sees nothing of UDP, and opens nothing for it.
_KINDS = {Proto.TCP: "fwd", Proto.UDP: "udp"}
# How many qrexec calls a listener makes at once. A qube has room for 30 vchans over all targets
# (docs/facts.md, Q2), and its other calls need some of them.
CALLS_MAX = 20


class Service(StrEnum):
    """The qrexec service that is called in the target."""

    FORWARD_TCP = FORWARD_SERVICE
    FORWARD_UDP = UDP_SERVICE
    CONNECT_TCP = "qubes.ConnectTCP"

    @property
    def proto(self) -> Proto:
        """What it carries: TCP or UDP, and no service both."""
        return Proto.UDP if self is Service.FORWARD_UDP else Proto.TCP


class Side(StrEnum):
    """The interfaces of the exposed qube through which connections may come."""

    OUTER = "outer"
    """Everything that is neither an uplink nor a vif: NICs, and the interfaces of a VPN."""
    UPLINK = "uplink"
    """The interface to the qube's own netvm."""
    VIFS = "vifs"
    """The interfaces to other qubes."""

    @property
    def group(self) -> int:
        """The interface group, as qubes-core-agent-linux sets it in network/setup-ip and vif-route-qubes."""
        return {Side.OUTER: 0, Side.UPLINK: 1, Side.VIFS: 2}[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerConfig:
    """One forward, as its listener needs it.

    ``transport`` is never ``auto``. ``expire`` is in UNIX seconds. ``text`` is what it prints. Raises
    `ConfigError` for contradictions, and if it does not fit into QubesDB.
    """

    target: QubeName
    name: RuleName
    side: Side
    listen: tuple[IPAddress, ...]
    listen_ports: ListenPorts
    target_ports: TargetPorts
    sources: Sources
    service: Service
    transport: Transport
    proxy: Proxy = Proxy.OFF
    on_expire: OnExpire = OnExpire.CUT
    expire: int | None = None
    limits: Limits = NO_LIMITS
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.listen_ports) != len(self.target_ports):
            raise ConfigError(f"{self.key}: srcports and dstports differ in length")
        if self.transport is Transport.AUTO:
            raise ConfigError(f"{self.key}: transport is undecided; mux or call would be right")
        if self.service is Service.CONNECT_TCP and self.transport is not Transport.CALL:
            raise ConfigError(
                f"{self.key}: {self.service} carries one connection; transport=call would be right"
            )
        if self.proto is Proto.UDP and self.transport is not Transport.MUX:
            raise ConfigError(f"{self.key}: {self.service} carries many flows; transport=mux would be right")
        if self.proto is Proto.UDP and self.proxy is Proxy.V1:
            raise ConfigError(f"{self.key}: proxy=v1 is for TCP alone; proxy=v2 would be right")
        object.__setattr__(self, "text", entries.print_value(self, _FORMS, _REQUIRED))
        entries.check_size(self.key, self.text)

    @classmethod
    def of_rule(
        cls,
        target: QubeName,
        name: RuleName,
        rule: ForwardRule,
        sources: Sources,
        service: Service,
        transport: Transport,
        side: Side,
    ) -> Self:
        """The configuration for a rule, once the plan has decided all else: ``sources`` are its clients,
        as networks."""
        return cls(
            target=target,
            name=name,
            side=side,
            listen=tuple(a for a in rule.listen_addresses if a.version in sources.versions),
            listen_ports=rule.listen_ports,
            target_ports=rule.target_ports,
            sources=sources,
            service=service,
            transport=transport,
            proxy=rule.proxy,
            on_expire=rule.on_expire,
            expire=rule.expire,
            limits=rule.limits,
        )

    @property
    def proto(self) -> Proto:
        """TCP or UDP: a rule that forwards both has a configuration for each."""
        return self.service.proto

    @property
    def key(self) -> str:
        """Its name below ``/vm-config/``, such as ``fwd.TARGET.NAME``: always at most 52 characters."""
        return str(ForwardKey(self.target, self.name, self.proto))

    def narrows(self, old: "ListenerConfig") -> bool:
        """Whether the old one may have allowed a connection that this one does not allow."""
        ports, before = self.listen_ports, old.listen_ports
        families = {address.version for address in self.listen if address.is_unspecified}
        return (
            not self.sources.cover(old.sources)
            or self.side is not old.side
            or not (ports.first <= before.first and before.last <= ports.last)
            or self.target_port(ports.first) != old.target_port(ports.first)
            or not all(a in self.listen or a.version in families for a in old.listen)
        )

    def target_port(self, listen_port: int) -> int:
        """The target's port for an exposed port."""
        return listen_port - self.listen_ports.first + self.target_ports.first

    @classmethod
    def parse(cls, key: str, untrusted_value: str) -> Self:
        """Parse the value of ``key``. Raises `ConfigError` that names the key and the option."""
        target, name, proto = parse_key(key)
        given = entries.parse_value(key, untrusted_value, _FORMS, _REQUIRED)
        if given["service"].proto is not proto:
            raise ConfigError(f"{key}: {given['service']} does not carry {proto}")
        return cls(target=target, name=name, **given)

    def __str__(self) -> str:
        return self.text


class ForwardKey(NamedTuple):
    """What an entry for a listener is about; it prints as the entry's key."""

    target: QubeName
    name: RuleName
    proto: Proto

    def __str__(self) -> str:
        return f"{_KINDS[self.proto]}.{self.target}.{self.name}"


def is_forward_key(key: str) -> bool:
    """Whether an entry of ``/vm-config/`` configures a listener."""
    return key.startswith(tuple(f"{kind}." for kind in _KINDS.values()))


def parse_key(key: str) -> ForwardKey:
    """Parse ``fwd.TARGET.NAME`` or ``udp.TARGET.NAME``. Raises `ConfigError`."""
    proto = Proto.UDP if key.startswith(f"{_KINDS[Proto.UDP]}.") else Proto.TCP
    return ForwardKey(*entries.parse_key(_KINDS[proto], key), proto)


def _parse_addresses(text: str) -> tuple[IPAddress, ...]:
    return tuple(values.parse_address(part) for part in text.split(","))


_FORMS = {
    "service": Form("service", one_of(Service)),
    "transport": Form("transport", one_of(Transport)),
    "side": Form("side", one_of(Side)),
    "listen": Form("listen", _parse_addresses, lambda addresses: ",".join(map(str, addresses))),
    "srcports": Form("listen_ports", ListenPorts.parse),
    "dstports": Form("target_ports", TargetPorts.parse),
    "srchosts": Form("sources", Sources.parse),
    "proxy": Form("proxy", one_of(Proxy)),
    "on-expire": Form("on_expire", one_of(OnExpire)),
    "expire": Form("expire", values.parse_time),
    "limits": Form("limits", Limits.parse),
}
_REQUIRED = ("service", "transport", "side", "listen", "srcports", "dstports", "srchosts")
