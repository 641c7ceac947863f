# SPDX-License-Identifier: GPL-2.0-or-later
"""What one qube on the path of a forward by nft gets to know about it, and no more.

The path is the exposed qube, further hops, and the target. A hop sends packets on to the next qube of the
path; the target lets them in. dom0 writes each `NftConfig` as feature ``vm-config.nft.TARGET.NAME`` of its
qube. A hop learns the address of the next qube, and of none beyond.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from ipaddress import IPv4Address, IPv6Address
from typing import Self

from . import entries, values
from .config import Side
from .errors import ConfigError, TextError
from .options import Form, one_of
from .rules import NO_LIMITS, Limits, OnExpire
from .values import IPAddress, ListenPorts, Proto, QubeName, RuleName, Sources, TargetPorts

# nftables shifts a range by a map with an element for each port; 10,000 take 146 KiB and 0.26 s.
SHIFTED_MAX = 1024
_KIND = "nft"


class Role(StrEnum):
    """What a qube does with the packets of a forward."""

    HOP = "hop"
    """It sends them on to the next qube."""
    TARGET = "target"
    """It lets them in."""


class Loss(StrEnum):
    """In what way a configuration may let through less than an earlier one."""

    CLIENTS = "clients"
    PORTS = "ports"
    TIME = "time"
    WAY = "way"
    """By which interfaces and to which address packets come, and where they are sent on to. Of these, no
    other qube of the path knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NftConfig:
    """One forward, as one qube of its path needs it.

    Packets come by ``side`` to ``listen_ports``, at the exposed qube to ``listen`` alone if that is given. A
    hop sends them to ``target_ports`` of the next qube, which has ``to4`` and ``to6``; a family without
    address is not forwarded. ``family`` is the one IP version that reaches a target whose sources are of
    both. ``expire`` is in UNIX seconds. ``limits`` are for the exposed qube. ``text`` is what it prints.
    Raises `ConfigError` for contradictions, and if it does not fit into QubesDB.
    """

    target: QubeName
    name: RuleName
    role: Role
    side: Side
    proto: Proto
    listen_ports: ListenPorts
    target_ports: TargetPorts
    sources: Sources
    listen: IPAddress | None = None
    to4: IPv4Address | None = None
    to6: IPv6Address | None = None
    family: int | None = None
    on_expire: OnExpire = OnExpire.CUT
    expire: int | None = None
    limits: Limits = NO_LIMITS
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        problem = self._contradiction()
        if problem is not None:
            raise ConfigError(f"{self.key}: {problem}")
        object.__setattr__(self, "text", entries.print_value(self, _FORMS, _REQUIRED))
        entries.check_size(self.key, self.text)

    def _contradiction(self) -> str | None:
        is_shifted = self.is_shifted
        if len(self.listen_ports) != len(self.target_ports):
            return "srcports and dstports differ in length"
        if self.role is Role.TARGET:
            if is_shifted or self.listen is not None or self.to4 is not None or self.to6 is not None:
                return "a target has the same srcports and dstports, and neither listen, to4 nor to6"
            if self.family is not None and self.family not in self.sources.versions:
                return f"family={self.family}: srchosts names no network of it"
            return None
        if self.family is not None:
            return "family is for a target; a hop has to4 or to6"
        if not self.versions:
            return "a hop has to4 or to6"
        if not self.versions <= self.sources.versions:
            return "to4 needs an IPv4 network in srchosts, and to6 an IPv6 network"
        if self.listen is not None and (self.listen.is_unspecified or self.versions != {self.listen.version}):
            return "listen is one address, of the only family that has to4 or to6"
        if is_shifted and len(self.listen_ports) > SHIFTED_MAX:
            return f"srcports and dstports differ; that is possible for {SHIFTED_MAX} ports at most"
        return None

    @property
    def key(self) -> str:
        """Its name below ``/vm-config/``: ``nft.TARGET.NAME``, which always has at most 52 characters."""
        return f"{_KIND}.{self.target}.{self.name}"

    @property
    def versions(self) -> frozenset[int]:
        """The IP versions that it forwards or lets in: one of 4 and 6, or both."""
        if self.role is Role.TARGET:
            return self.sources.versions if self.family is None else frozenset((self.family,))
        return frozenset(next_hop.version for next_hop in (self.to4, self.to6) if next_hop is not None)

    @property
    def is_shifted(self) -> bool:
        """Whether packets leave for other ports than those to which they came."""
        return self.listen_ports.first != self.target_ports.first

    @property
    def digest(self) -> str:
        """By this a qube tells dom0 what is in force: 16 hexadecimal digits."""
        return sha256(f"{self.key} {self}".encode("ascii")).hexdigest()[:16]

    def narrows(self, old: "NftConfig") -> bool:
        """Whether the old one may have let through a packet that this one does not, or sent it to another
        place; not whether it lasted longer.
        """
        return not self.lost(old) <= {Loss.TIME}

    def lost(self, old: "NftConfig") -> frozenset[Loss]:
        """In what way the old one may have let through packets that this one does not."""
        ports, before = self.listen_ports, old.listen_ports
        is_way_lost = (
            (self.role, self.side) != (old.role, old.side)
            or self.target_ports.first - ports.first != old.target_ports.first - before.first
            or (old.to4 is not None and self.to4 != old.to4)
            or (old.to6 is not None and self.to6 != old.to6)
            or self.listen not in (None, old.listen)
        )
        are_lost = {
            Loss.CLIENTS: not self.sources.cover(old.sources) or not old.versions <= self.versions,
            Loss.PORTS: not set(old.proto.each) <= set(self.proto.each)
            or not (ports.first <= before.first and before.last <= ports.last),
            Loss.TIME: self.expire is not None and (old.expire is None or old.expire > self.expire),
            Loss.WAY: is_way_lost,
        }
        return frozenset(loss for loss, is_lost in are_lost.items() if is_lost)

    @classmethod
    def parse(cls, key: str, untrusted_value: str) -> Self:
        """Parse the value of ``key``. Raises `ConfigError` that names the key and the option."""
        target, name = parse_nft_key(key)
        return cls(target=target, name=name, **entries.parse_value(key, untrusted_value, _FORMS, _REQUIRED))

    def __str__(self) -> str:
        return self.text


def is_nft_key(key: str) -> bool:
    """Whether an entry of ``/vm-config/`` is about a forward by nft."""
    return key.startswith(f"{_KIND}.")


def parse_nft_key(key: str) -> tuple[QubeName, RuleName]:
    """The target and the rule in ``nft.TARGET.NAME``. Raises `ConfigError`."""
    return entries.parse_key(_KIND, key)


def _parse_ip4(text: str) -> IPv4Address:
    address = values.parse_address(text)
    if not isinstance(address, IPv4Address):
        raise TextError(text, "an IPv4 address")
    return address


def _parse_ip6(text: str) -> IPv6Address:
    address = values.parse_address(text)
    if not isinstance(address, IPv6Address):
        raise TextError(text, "an IPv6 address")
    return address


def _parse_family(text: str) -> int:
    if text not in ("4", "6"):
        raise TextError(text, "an IP version: 4 or 6")
    return int(text)


_FORMS = {
    "role": Form("role", one_of(Role)),
    "side": Form("side", one_of(Side)),
    "proto": Form("proto", one_of(Proto)),
    "listen": Form("listen", values.parse_address),
    "srcports": Form("listen_ports", ListenPorts.parse),
    "dstports": Form("target_ports", TargetPorts.parse),
    "srchosts": Form("sources", Sources.parse),
    "to4": Form("to4", _parse_ip4),
    "to6": Form("to6", _parse_ip6),
    "family": Form("family", _parse_family),
    "on-expire": Form("on_expire", one_of(OnExpire)),
    "expire": Form("expire", values.parse_time),
    "limits": Form("limits", Limits.parse),
}
_REQUIRED = ("role", "side", "proto", "srcports", "dstports", "srchosts")
