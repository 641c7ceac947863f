# SPDX-License-Identifier: GPL-2.0-or-later
"""A forwarding rule as the user asked for it: a value, and its form as one line of options.

    action=forward mode=qrexec forwardtype=external proto=tcp srcports=80-80 dstports=8080-8080
      srchosts=192.168.0.0/16 expire=1893456000 comment=demo for the office      (one line)

The vocabulary is that of Qubes firewall rules and of the forwarding proposal of 2021, in which ``srcports``
are the exposed ports. Options may come in any order and are printed in one order; ``comment`` takes the rest
of its line. A rule knows nothing about qubes: `admin.plan` decides whether it can work.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import NamedTuple, Self

from . import values
from .clients import Clients
from .errors import RuleError, TextError
from .options import Form, Option, one_of, read, split
from .values import IPAddress, ListenPorts, Proto, QubeName, RuleName, Sources, TargetPorts, yes_no


class Mode(StrEnum):
    """How the traffic travels between exposed qube and target."""

    AUTO = "auto"
    NFT = "nft"
    QREXEC = "qrexec"


class ForwardType(StrEnum):
    """Where the rule is exposed: in the outermost qube of the netvm chain, or in the target's netvm."""

    EXTERNAL = "external"
    INTERNAL = "internal"


class Transport(StrEnum):
    """How qrexec mode carries connections of TCP: many in one call, or one call for each."""

    AUTO = "auto"
    MUX = "mux"
    CALL = "call"


class Proxy(StrEnum):
    """Whether the target's server gets the client's address, by the PROXY protocol, and in which version."""

    OFF = "off"
    V1 = "v1"
    V2 = "v2"


class OnExpire(StrEnum):
    """What becomes of live connections when the rule ends."""

    CUT = "cut"
    DRAIN = "drain"


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a rule's connections; None means the listener's default.

    ``connections`` and ``per_source`` limit connections at one time, ``rate`` new ones in a second.
    """

    connections: int | None = None
    per_source: int | None = None
    rate: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """``connections:1000,per-source:100,rate:50``, any of them. Raises `TextError`."""
        expected = (
            "a list of limits such as connections:1000,per-source:100,rate:50, each once and at least 1"
        )
        known = {field.name.replace("_", "-"): field.name for field in fields(cls)}
        found: dict[str, int] = {}
        for part in text.split(","):
            name, colon, number = part.partition(":")
            try:
                count = values.parse_number(number)
            except TextError:
                raise TextError(text, expected) from None
            if name not in known or not colon or count < 1 or known[name] in found:
                raise TextError(text, expected)
            found[known[name]] = count
        return cls(**found)

    def __str__(self) -> str:
        given = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ",".join(f"{name.replace('_', '-')}:{count}" for name, count in given if count is not None)


NO_LIMITS = Limits()
WILDCARDS = {4: values.parse_address("0.0.0.0"), 6: values.parse_address("::")}
"""What stands for all addresses of each IP version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardRule:
    """One forward, complete and consistent; raises `RuleError` if its options contradict each other.

    ``expire`` is in UNIX seconds; ``has_ended`` records that it was reached, however clocks are set later.
    ``path`` is the netvm chain (the target's netvm first) that the user agreed to. ``owner`` is the target
    for which the rule was made: in a clone it is another qube's name.
    """

    listen_ports: ListenPorts
    target_ports: TargetPorts
    sources: Clients
    mode: Mode = Mode.AUTO
    forward_type: ForwardType = ForwardType.EXTERNAL
    via: QubeName | None = None
    proto: Proto = Proto.TCP
    listen: IPAddress | None = None
    transport: Transport = Transport.AUTO
    proxy: Proxy = Proxy.OFF
    autostart: bool = False
    on_expire: OnExpire = OnExpire.CUT
    enabled: bool = True
    owner: QubeName | None = None
    path: tuple[QubeName, ...] | None = None
    follow_netvm: bool = False
    bypass_tunnel: bool = False
    limits: Limits = NO_LIMITS
    expire: int | None = None
    has_ended: bool = False
    comment: str = ""

    def __post_init__(self) -> None:
        for one, other, problem in self._contradictions():
            raise RuleError(f"options {one!r} and {other!r}", problem, one, other)

    def _contradictions(self) -> Iterable[tuple[str, str, str]]:
        """Pairs of options, and why they do not go together."""
        if len(self.listen_ports) != len(self.target_ports):
            yield (
                "srcports",
                "dstports",
                f"{self.listen_ports} is {_count(self.listen_ports)} and {self.target_ports} is "
                f"{_count(self.target_ports)}; both must have the same number",
            )
        if self.proto is not Proto.TCP and self.proxy is Proxy.V1:
            yield ("proto", "proxy", "version 1 of the PROXY protocol is for TCP alone; use proxy=v2")
        if self.proto is Proto.UDP and self.transport is Transport.CALL:
            yield ("proto", "transport", "single calls carry connections of TCP; leave transport out")
        if self.mode is Mode.NFT and self.transport is not Transport.AUTO:
            yield ("mode", "transport", "transport is about qrexec; leave it out with mode=nft")
        if self.mode is Mode.NFT and self.proxy is not Proxy.OFF:
            yield ("mode", "proxy", "nftables cannot add a PROXY header; use mode=qrexec")
        if self.mode is Mode.NFT and self.autostart:
            yield ("mode", "autostart", "packets cannot start a halted qube; use mode=qrexec")
        if self.transport is Transport.CALL and self.proxy is not Proxy.OFF:
            yield ("transport", "proxy", "PROXY headers need mux calls; use transport=mux")
        if self.sources.has_names and self.forward_type is ForwardType.EXTERNAL:
            yield (
                "srchosts",
                "forwardtype",
                f"an external forward lets in no qubes, such as {str(self.sources).rpartition(',')[2]}; name "
                "networks, or use forwardtype=internal (--internal)",
            )
        if self.listen is not None:
            strangers = [n for n in self.sources.networks if n.version != self.listen.version]
            if strangers:
                yield (
                    "listen",
                    "srchosts",
                    f"{strangers[0]} can never reach {self.listen}: IPv4 and IPv6 do not mix; "
                    f"make a second rule for IPv{strangers[0].version}",
                )

    @property
    def listen_addresses(self) -> tuple[IPAddress, ...]:
        """Where the exposed qube listens: ``listen``, or the wildcard of each IP version by which
        clients may come."""
        if self.listen is not None:
            return (self.listen,)
        return tuple(WILDCARDS[version] for version in sorted(self.sources.versions))

    def target_port(self, listen_port: int) -> int:
        """The target's port for an exposed port of this rule."""
        return listen_port - self.listen_ports.first + self.target_ports.first

    @classmethod
    def parse(cls, line: str) -> Self:
        """Parse the line form. Raises `RuleError` that names option, column and what would be right."""
        return cls.from_options(split(line))

    @classmethod
    def from_options(cls, options: Iterable[Option]) -> Self:
        """Make a rule from options in any order. Raises `RuleError`."""
        given = read(options, _READ_FORMS)
        for name, missing in _MISSING.items():
            if _FORMS[name].field not in given:
                raise RuleError(f"option {name!r}", missing, name)
        del given["action"]
        given.setdefault("target_ports", TargetPorts(given["listen_ports"].first, given["listen_ports"].last))
        return cls(**given)

    @classmethod
    def faults(cls, options: Iterable[Option]) -> list[RuleError]:
        """Everything that keeps options from being a rule, for a form to show at once: what is wrong by
        itself or missing; only without that, the first contradiction. Empty if there is nothing.
        """
        found: list[RuleError] = []
        given = list(options)
        for option in given:
            try:
                read([option], _READ_FORMS)
            except RuleError as error:
                found.append(error)
        names = {_READ_FORMS[option.name].field for option in given if option.name in _READ_FORMS}
        missing = (name for name in _MISSING if _FORMS[name].field not in names)
        found += (RuleError(f"option {name!r}", _MISSING[name], name) for name in missing)
        if not found:
            try:
                cls.from_options(given)
            except RuleError as error:
                found.append(error)
        return found

    @staticmethod
    def option_names() -> tuple[str, ...]:
        """All options, in canonical order."""
        return _CANONICAL

    def options(self) -> dict[str, str]:
        """Options and their texts, in canonical order, without those that have their default."""
        texts = {"action": "forward"}
        for name in _CANONICAL[1:]:
            form = _FORMS[name]
            value = getattr(self, form.field)
            if name in _ALWAYS or value != _DEFAULTS[form.field]:
                texts[name] = form.print(value)
        return texts

    def __str__(self) -> str:
        return " ".join(f"{name}={text}" for name, text in self.options().items())


def _count(ports: ListenPorts | TargetPorts) -> str:
    return f"{len(ports)} port{'' if len(ports) == 1 else 's'}"


class NamedRule(NamedTuple):
    """A rule with the target and the name under which it is stored."""

    target: QubeName
    name: RuleName
    rule: ForwardRule

    @property
    def key(self) -> tuple[QubeName, RuleName]:
        """Target and name."""
        return self.target, self.name

    def __str__(self) -> str:
        return f"{self.target} {self.name}"


class BrokenRule(NamedTuple):
    """Something stored as a rule that cannot be read: it is shown, but never acted upon."""

    target: QubeName
    name: str
    text: str
    problem: str

    @property
    def key(self) -> tuple[QubeName, str]:
        """Target and name."""
        return self.target, self.name

    def __str__(self) -> str:
        return f"{self.target} {self.name}"


def _parse_action(text: str) -> str:
    if text != "forward":
        raise TextError(text, "'forward', the only action of a forwarding rule")
    return text


def _parse_path(text: str) -> tuple[QubeName, ...]:
    return tuple(map(values.parse_qube_name, text.split(","))) if text else ()


def _merged(some: Clients, more: Clients) -> Clients:
    return Clients.union((some, more))


def _sources_of(version: int) -> Callable[[str], Clients]:
    def parse(text: str) -> Clients:
        sources = Sources.parse(text)
        if sources.anyone or sources.versions != {version}:
            raise TextError(text, f"IPv{version} networks, comma-separated")
        return Clients(sources)

    return parse


_FORMS = {
    "action": Form("action", _parse_action),
    "mode": Form("mode", one_of(Mode)),
    "forwardtype": Form("forward_type", one_of(ForwardType)),
    "via": Form("via", values.parse_qube_name),
    "proto": Form("proto", one_of(Proto)),
    "srcports": Form("listen_ports", ListenPorts.parse),
    "dstports": Form("target_ports", TargetPorts.parse),
    "srchosts": Form("sources", Clients.parse),
    "listen": Form("listen", values.parse_address),
    "transport": Form("transport", one_of(Transport)),
    "proxy": Form("proxy", one_of(Proxy)),
    "autostart": Form("autostart", values.parse_yes_no, yes_no),
    "on-expire": Form("on_expire", one_of(OnExpire)),
    "enabled": Form("enabled", values.parse_yes_no, yes_no),
    "owner": Form("owner", values.parse_qube_name),
    "path": Form("path", _parse_path, ",".join),
    "follow-netvm": Form("follow_netvm", values.parse_yes_no, yes_no),
    "bypass-tunnel": Form("bypass_tunnel", values.parse_yes_no, yes_no),
    "limits": Form("limits", Limits.parse),
    "expire": Form("expire", values.parse_time),
    "ended": Form("has_ended", values.parse_yes_no, yes_no),
    "comment": Form("comment", values.parse_printable),
}
_CANONICAL = tuple(_FORMS)
_ALWAYS = frozenset(("mode", "forwardtype", "proto", "srcports", "dstports", "srchosts"))
_DEFAULTS = {field.name: field.default for field in fields(ForwardRule)}
_MISSING = {
    "action": "missing; a forwarding rule has action=forward",
    "srcports": "missing; it names the exposed port or range, such as srcports=80-80",
    "srchosts": "missing; it names the networks or qubes that may connect, or says any",
}
# The spellings of the 2021 proposal, srchost in XML, src4 and src6 in the API line: read, but never written.
_READ_FORMS = _FORMS | {
    "srchost": Form("sources", Clients.parse),
    "src4": Form("sources", _sources_of(4), merge=_merged),
    "src6": Form("sources", _sources_of(6), merge=_merged),
}
