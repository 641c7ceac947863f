# SPDX-License-Identifier: GPL-2.0-or-later
"""The small values that rules and configurations are made of, each parsed once.

Every parser here takes text that may come from a user or from another qube. It returns a value that needs no
further check, or raises `TextError`. Values print as they parse: ``parse(str(x)) == x``.
"""

import ipaddress
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import NewType, Self

from .errors import TextError

QubeName = NewType("QubeName", str)
RuleName = NewType("RuleName", str)
IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network
# The address and the port that a socket is bound to.
Binding = tuple[IPAddress, int]

PORT_MAX = 65535
# The last second of the year 9999, in UNIX seconds: nobody means a later time, it cannot be shown, and a
# kernel timer may not take it.
TIME_MAX = 253402300799

# At most 31 characters, a letter first: docs/facts.md, Q18.
_QUBE_NAME = re.compile(r"[a-zA-Z][a-zA-Z0-9_.-]{0,30}\Z", re.ASCII)
# 16 characters, together with 31 of the qube's name, "fwd." and a dot, are the 52 that a vm-config name may
# have.
_RULE_NAME = re.compile(r"[a-z][a-z0-9-]{0,15}\Z", re.ASCII)
# int() would also accept "+80", " 80", "8_0", "080" and digits of other scripts.
_PORT = re.compile(r"[1-9][0-9]{0,4}\Z", re.ASCII)
_NUMBER = re.compile(r"(0|[1-9][0-9]{0,18})\Z", re.ASCII)
# The value of a feature: docs/facts.md, A1.
_PRINTABLE = re.compile(r"[\x20-\x7e]*\Z")


class Proto(StrEnum):
    """What a rule forwards. Whatever is about one protocol alone, such as a call, has TCP or UDP."""

    TCP = "tcp"
    UDP = "udp"
    BOTH = "both"

    @property
    def each(self) -> tuple["Proto", ...]:
        """The protocols that it stands for."""
        return (Proto.TCP, Proto.UDP) if self is Proto.BOTH else (self,)

    def overlaps(self, other: "Proto") -> bool:
        """Whether there is a protocol that both stand for."""
        return self is other or Proto.BOTH in (self, other)


def parse_one_proto(text: str) -> Proto:
    """Parse ``tcp`` or ``udp``. Raises `TextError`."""
    if text not in Proto.BOTH.each:
        raise TextError(text, "tcp or udp")
    return Proto(text)


def parse_qube_name(text: str) -> QubeName:
    """A qube's name as Qubes allows it. Raises `TextError`."""
    if not _QUBE_NAME.match(text):
        raise TextError(text, "a qube's name: a letter, then at most 30 of [a-zA-Z0-9_.-]")
    return QubeName(text)


def parse_rule_name(text: str) -> RuleName:
    """A rule's name, unique for its target. Raises `TextError`."""
    if not _RULE_NAME.match(text):
        raise TextError(text, "a rule's name: a small letter, then at most 15 of [a-z0-9-]")
    return RuleName(text)


def parse_port(text: str) -> int:
    """A TCP or UDP port, 1 to 65535, in plain ASCII digits. Raises `TextError`."""
    if not _PORT.match(text) or int(text) > PORT_MAX:
        raise TextError(text, f"a port: a number from 1 to {PORT_MAX}")
    return int(text)


def parse_number(text: str) -> int:
    """A non-negative whole number in plain ASCII digits. Raises `TextError`."""
    if not _NUMBER.match(text):
        raise TextError(text, "a whole number")
    return int(text)


def parse_time(text: str) -> int:
    """UNIX seconds, to the end of the year 9999. Raises `TextError`."""
    seconds = parse_number(text)
    if seconds > TIME_MAX:
        raise TextError(text, f"a time in UNIX seconds, which are at most {TIME_MAX}")
    return seconds


_YES_NO = {
    "yes": True,
    "on": True,
    "true": True,
    "1": True,
    "no": False,
    "off": False,
    "false": False,
    "0": False,
}


def parse_yes_no(text: str) -> bool:
    """``yes`` or ``no``, or what Qubes' own tools take for them. Raises `TextError`."""
    try:
        return _YES_NO[text.lower()]
    except KeyError:
        raise TextError(text, "yes or no") from None


def yes_no(value: bool) -> str:
    return "yes" if value else "no"


def parse_printable(text: str) -> str:
    """Text that a feature can contain: printable ASCII on one line. Raises `TextError`."""
    if not _PRINTABLE.match(text):
        raise TextError(text, "printable ASCII on one line, which is all that a Qubes feature can hold")
    return text


def parse_address(text: str) -> IPAddress:
    """An IPv4 or IPv6 address without a zone. Raises `TextError`."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise TextError(text, "an IPv4 or IPv6 address") from None
    if isinstance(address, IPv6Address) and (address.scope_id or address.ipv4_mapped):
        raise TextError(text, "an address without zone, and not IPv4 written as IPv6")
    return address


def address_text(address: IPAddress | str, port: int | str) -> str:
    """``192.0.2.1:80`` or ``[2001:db8::1]:80``."""
    return f"[{address}]:{port}" if ":" in str(address) else f"{address}:{port}"


def unmapped(address: IPAddress) -> IPAddress:
    """``::ffff:192.0.2.1`` as ``192.0.2.1``; any other address as it is, but without a zone.

    A dual-stack socket reports IPv4 peers as IPv4-mapped addresses, which are in no IPv4 network.
    """
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        return IPv6Address(int(address))
    return address


def parse_network(text: str) -> IPNetwork:
    """An IPv4 or IPv6 network; a bare address is a network of one address. Raises `TextError`."""
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        try:
            whole = ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise TextError(text, "a network such as 192.168.0.0/16 or fd00::/8") from None
        raise TextError(text, f"a network: bits of the host are set; {whole} would be right") from None
    if isinstance(network, IPv6Network):
        if "%" in text:
            raise TextError(text, "a network without zone")
        if network.network_address.ipv4_mapped is not None:
            raise TextError(text, "a network written in its own family: IPv4 as IPv4")
    if _covers(_NOBODY, [network]):
        raise TextError(
            text,
            "a network of clients: no client has such an address (unspecified, multicast or broadcast), "
            "and everybody is the word any",
        )
    return network


# No client has such an address: docs/facts.md, R5.
_NOBODY: tuple[IPNetwork, ...] = tuple(
    map(ipaddress.ip_network, ("0.0.0.0/8", "224.0.0.0/4", "255.255.255.255", "::/128", "ff00::/8"))
)
# RFC 6890: no client on the Internet has such an address. All other networks together are everybody.
_NOT_GLOBAL = (
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
    *("192.168.0.0/16", "224.0.0.0/3"),
)
_EVERYBODY = {4: ipaddress.ip_network("0.0.0.0/0"), 6: ipaddress.ip_network("2000::/3")}


def _union(networks: Iterable[IPNetwork], version: int) -> list[IPNetwork]:
    """The networks of one IP version, without overlaps and as few as possible."""
    if version == 4:
        return list(ipaddress.collapse_addresses(n for n in networks if isinstance(n, IPv4Network)))
    return list(ipaddress.collapse_addresses(n for n in networks if isinstance(n, IPv6Network)))


def _everybody(networks: Sequence[IPNetwork]) -> IPNetwork | None:
    """The network of everybody of one IP version, if these networks let in all of that."""
    for version, whole in _EVERYBODY.items():
        # Comparing two numbers is enough for almost every rule.
        if sum(n.num_addresses for n in networks if n.version == version) >= whole.num_addresses // 2:
            padded = (*networks, *map(ipaddress.ip_network, _NOT_GLOBAL))
            if _covers(_union(padded, version), [whole]):
                return whole
    return None


def _covers(some: Sequence[IPNetwork], others: Iterable[IPNetwork]) -> bool:
    """Whether each of the others is within one of these."""
    return all(any(_is_within(network, wide) for wide in some) for network in others)


def _is_within(network: IPNetwork, wide: IPNetwork) -> bool:
    if isinstance(network, IPv4Network):
        return isinstance(wide, IPv4Network) and network.subnet_of(wide)
    return isinstance(wide, IPv6Network) and network.subnet_of(wide)


# Many rules have the same clients, and nothing else of a rule takes as long to parse and to print.
_SOURCES_KEPT = 1024


@lru_cache(_SOURCES_KEPT)
def _printed(networks: tuple[IPNetwork, ...]) -> str:
    return ",".join(map(str, networks))


@dataclass(frozen=True, slots=True)
class PortRange:
    """Ports from ``first`` to ``last``, both included; printed as ``N-M``, like port ranges in Qubes."""

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last <= PORT_MAX:
            raise TextError(str(self), f"a range of ports from 1 to {PORT_MAX}, the smaller first")

    @classmethod
    def parse(cls, text: str) -> Self:
        """``N`` or ``N-M``. Raises `TextError`."""
        first, dash, last = text.partition("-")
        try:
            return cls(parse_port(first), parse_port(last if dash else first))
        except TextError:
            raise TextError(
                text, f"a port or range of ports: N or N-M, from 1 to {PORT_MAX}, the smaller first"
            ) from None

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    def __len__(self) -> int:
        return self.last - self.first + 1

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.last + 1))

    def __contains__(self, port: object) -> bool:
        return isinstance(port, int) and self.first <= port <= self.last

    def brief(self) -> str:
        """For people: ``80`` for one port, ``80-90`` for more."""
        return str(self.first) if self.first == self.last else str(self)

    def worded(self) -> str:
        """For people: ``port 80``, ``ports 80-90``."""
        return f"port{'' if self.first == self.last else 's'} {self.brief()}"

    def overlaps(self, other: "PortRange") -> bool:
        return self.first <= other.last and other.first <= self.last


class ListenPorts(PortRange):
    """The ports that are exposed (a rule's ``srcports``)."""

    __slots__ = ()


class TargetPorts(PortRange):
    """The ports of the target's own server (a rule's ``dstports``)."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Sources:
    """The networks of clients that may connect, or anybody.

    ``networks`` is sorted, IPv4 first, and empty only if ``anyone`` is true: there is no value for nobody.
    """

    networks: tuple[IPNetwork, ...]
    anyone: bool = False

    def __post_init__(self) -> None:
        if self.anyone == bool(self.networks):
            raise TextError(str(self), "networks, comma-separated, or the word any")
        everybody = _everybody(self.networks)
        if everybody is not None:
            family, wildcard = ("IPv4", "0.0.0.0") if everybody.version == 4 else ("IPv6", "::")
            raise TextError(
                str(self),
                f"named networks: it lets in everybody by {family}, which is said by the word any "
                f"(and listen={wildcard} for {family} alone)",
            )

    @classmethod
    def of(cls, networks: Iterable[IPNetwork]) -> Self:
        ordered = sorted(set(networks), key=lambda n: (n.version, int(n.network_address), n.prefixlen))
        return cls(tuple(ordered))

    @staticmethod
    @lru_cache(_SOURCES_KEPT)
    def parse(text: str) -> "Sources":
        """Networks, comma-separated, or ``any``. Raises `TextError`."""
        if text == "any":
            return Sources((), anyone=True)
        parts = text.split(",")
        if "any" in parts:
            raise TextError(text, "a list of networks: any lets in everybody, and stands alone")
        return Sources.of(map(parse_network, parts))

    def __str__(self) -> str:
        return "any" if self.anyone else _printed(self.networks)

    def __contains__(self, address: IPAddress) -> bool:
        """Whether a client may connect; IPv4-mapped addresses count as IPv4, and zones are ignored."""
        plain = unmapped(address)
        return self.anyone or any(plain in n for n in self.networks if n.version == plain.version)

    def cover(self, others: "Sources") -> bool:
        """Whether these let in everybody whom the others let in."""
        if self.anyone or others.anyone:
            return self.anyone
        return _covers([*_union(self.networks, 4), *_union(self.networks, 6)], others.networks)

    @property
    def versions(self) -> frozenset[int]:
        """The IP versions of the networks: a subset of {4, 6}."""
        # IPv4 is first, so that the first and the last are of all versions that there are.
        return frozenset((4, 6)) if self.anyone else frozenset(self.networks[n].version for n in (0, -1))
