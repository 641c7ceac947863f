# SPDX-License-Identifier: GPL-2.0-or-later
"""What an exposed qube gets to know about a forward, and no more.

dom0 writes each `ListenerConfig` as feature ``vm-config.fwd.TARGET.NAME`` of the exposed qube. Qubes carries
it to the qube's QubesDB as ``/vm-config/fwd.TARGET.NAME``, where the listener reads it. The qube learns
neither the target's addresses nor the names of other qubes nor comments.
"""

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Self

from . import values
from .errors import ConfigError, RuleError, TextError
from .options import Form, one_of, read, split
from .rules import NO_LIMITS, ForwardRule, Limits, OnExpire, Proxy, Transport
from .services import FORWARD_SERVICE
from .values import IPAddress, ListenPorts, QubeName, RuleName, Sources, TargetPorts

VERSION = 1
# Names of vm-config features have at most 52 characters: docs/facts.md, A2.
KEY_MAX = 52
# A value in QubesDB has at most 3071 bytes; a larger one can keep a qube from starting: docs/facts.md, A3.
VALUE_MAX = 3071
_KEY_PREFIX = "fwd."


# How many qrexec calls a listener makes at once. A qube has room for 30 vchans over all targets
# (docs/facts.md, Q2), and its other calls need some of them.
CALLS_MAX = 20


class Service(StrEnum):
    """The qrexec service that is called in the target."""

    FORWARD_TCP = FORWARD_SERVICE
    CONNECT_TCP = "qubes.ConnectTCP"


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

    ``transport`` is never ``auto``. ``expire`` is in UNIX seconds. Raises `ConfigError` for contradictions,
    and if it does not fit into QubesDB.
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

    def __post_init__(self) -> None:
        if len(self.listen_ports) != len(self.target_ports):
            raise ConfigError(f"{self.key}: srcports and dstports differ in length")
        if self.transport is Transport.AUTO:
            raise ConfigError(f"{self.key}: transport is undecided; mux or call would be right")
        if self.service is Service.CONNECT_TCP and self.transport is not Transport.CALL:
            raise ConfigError(
                f"{self.key}: {self.service} carries one connection; transport=call would be right"
            )
        if len(str(self)) > VALUE_MAX:
            raise ConfigError(
                f"{self.key}: the configuration has {len(str(self))} bytes and QubesDB takes {VALUE_MAX}; "
                "name fewer or larger networks in srchosts"
            )

    @classmethod
    def of_rule(
        cls,
        target: QubeName,
        name: RuleName,
        rule: ForwardRule,
        service: Service,
        transport: Transport,
        side: Side,
    ) -> Self:
        """The configuration for a rule, once the plan has decided service, transport and side."""
        return cls(
            target=target,
            name=name,
            side=side,
            listen=rule.listen_addresses,
            listen_ports=rule.listen_ports,
            target_ports=rule.target_ports,
            sources=rule.sources,
            service=service,
            transport=transport,
            proxy=rule.proxy,
            on_expire=rule.on_expire,
            expire=rule.expire,
            limits=rule.limits,
        )

    @property
    def key(self) -> str:
        """Its name below ``/vm-config/``: ``fwd.TARGET.NAME``, which always has at most 52 characters."""
        return f"{_KEY_PREFIX}{self.target}.{self.name}"

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
        target, name = parse_key(key)
        _check_version(key, untrusted_value)
        try:
            options = list(split(untrusted_value))
            newer = [option for option in options if option.name not in _FORMS]
            if newer:
                raise ConfigError(
                    f"{key}: {newer[0].place}: unknown option; if dom0's package is newer than this qube's, "
                    f"update this qube's template. Known are {', '.join(_FORMS)}"
                )
            given = read(options, _FORMS)
        except RuleError as error:
            raise ConfigError(f"{key}: {error}") from None
        if given.pop("version", None) != VERSION:
            raise ConfigError(f"{key}: option 'version' is missing; this listener reads version={VERSION}")
        for field, option in _REQUIRED.items():
            if field not in given:
                raise ConfigError(f"{key}: option {option!r} is missing")
        return cls(target=target, name=name, **given)

    def __str__(self) -> str:
        options = [f"version={VERSION}"]
        for option, form in _FORMS.items():
            if form.field != "version":
                value = getattr(self, form.field)
                if form.field in _REQUIRED or value != _DEFAULTS[form.field]:
                    options.append(f"{option}={form.print(value)}")
        return " ".join(options)


def is_forward_key(key: str) -> bool:
    """Whether an entry of ``/vm-config/`` is one of ours."""
    return key.startswith(_KEY_PREFIX)


def parse_key(key: str) -> tuple[QubeName, RuleName]:
    """The target and the rule in ``fwd.TARGET.NAME``; rule names have no dot. Raises `ConfigError`."""
    target, _, name = key.removeprefix(_KEY_PREFIX).rpartition(".")
    try:
        if not is_forward_key(key):
            raise TextError(key, f"{_KEY_PREFIX}TARGET.NAME")
        return values.parse_qube_name(target), values.parse_rule_name(name)
    except TextError as error:
        raise ConfigError(f"entry {key!a}: {error}") from None


def _check_version(key: str, untrusted_value: str) -> None:
    """Check the version before anything else: in another version every word may have another meaning."""
    versions = [word for word in untrusted_value.split(" ") if word.startswith("version=")]
    if versions and versions[0] != f"version={VERSION}":
        raise ConfigError(
            f"{key}: {versions[0][:32]!a}, written for another version; this listener reads "
            f"version={VERSION}. dom0's package and this qube's may be one release apart, and no more"
        )


def _parse_addresses(text: str) -> tuple[IPAddress, ...]:
    return tuple(values.parse_address(part) for part in text.split(","))


_FORMS = {
    "version": Form("version", values.parse_number),
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
_REQUIRED = {
    "service": "service",
    "transport": "transport",
    "side": "side",
    "listen": "listen",
    "listen_ports": "srcports",
    "target_ports": "dstports",
    "sources": "srchosts",
}
_DEFAULTS = {field.name: field.default for field in fields(ListenerConfig)}
