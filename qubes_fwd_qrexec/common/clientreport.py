# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is connected to the forwards of an exposed qube, and whom dom0 has cut.

`ClientReport` is a part of the answer to ``qubes.ForwardStatus+clients``, and dom0 parses it as all of that
answer (`report`). ``qubes.ForwardCut+KEY`` gets `WhichClients` on a line of stdin and answers with a
`CutReport`; KEY is that of a forward, ``fwd.TARGET.NAME`` or ``udp.TARGET.NAME``.
"""

import re
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Any, Self

from .document import VERSION, Reader, load
from .errors import TextError
from .values import (
    IPAddress,
    Proto,
    QubeName,
    RuleName,
    address_text,
    parse_address,
    parse_port,
    parse_qube_name,
    parse_rule_name,
    unmapped,
)

CLIENTS = "clients"
"""The argument of ``qubes.ForwardStatus`` that asks who is connected."""
CLIENTS_MAX = 2000
"""How many clients one answer has; it says how many more there are."""
WHICH_MAX_BYTES = 80
"""More than the longest line of `WhichClients` has."""
# Most names of interfaces; Linux gives them at most 15 bytes (IFNAMSIZ).
_ZONE = re.compile(r"[a-zA-Z0-9_.-]{1,15}\Z", re.ASCII)


def parse_client_address(text: str) -> IPAddress:
    """An address; a link-local one of IPv6 may have its zone (``fe80::1%eth0``). Raises `TextError`."""
    bare, percent, zone = text.partition("%")
    address = parse_address(bare)
    if not percent:
        return address
    if not isinstance(address, IPv6Address) or not _may_have(address, zone):
        raise TextError(text, "an IPv4 or IPv6 address, with a zone only if it is link-local")
    return IPv6Address(text)


def sayable(address: IPAddress) -> IPAddress:
    """A client's address, without its zone if `parse_client_address` does not take that."""
    if isinstance(address, IPv6Address) and address.scope_id and not _may_have(address, address.scope_id):
        return unmapped(address)
    return address


def _may_have(address: IPv6Address, zone: str) -> bool:
    return address.is_link_local and _ZONE.match(zone) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientReport:
    """One connection, or one flow of UDP: its forward, and its client's ``address`` and ``port``.

    ``since`` is in UNIX seconds; ``sent`` and ``received`` are bytes from and to the client; nothing has
    moved for ``idle_s`` seconds. ``is_draining``: its forward no longer allows it, and it may finish.
    """

    target: QubeName
    name: RuleName
    proto: Proto
    address: IPAddress
    port: int
    since: int
    sent: int
    received: int
    idle_s: int
    is_draining: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "name": self.name,
            "proto": self.proto,
            "address": str(self.address),
            "port": self.port,
            "since": self.since,
            "sent": self.sent,
            "received": self.received,
            "idle_s": self.idle_s,
            "is_draining": self.is_draining,
        }

    @classmethod
    def read(cls, untrusted: Reader) -> Self:
        return cls(
            target=untrusted.parsed("target", parse_qube_name),
            name=untrusted.parsed("name", parse_rule_name),
            proto=untrusted.one_proto("proto"),
            address=untrusted.parsed("address", parse_client_address),
            port=untrusted.port("port"),
            since=untrusted.number("since"),
            sent=untrusted.number("sent"),
            received=untrusted.number("received"),
            idle_s=untrusted.number("idle_s"),
            is_draining=untrusted.flag("is_draining"),
        )


@dataclass(frozen=True, slots=True)
class WhichClients:
    """Clients of a forward: all of them, those of one address, or one by address and port.

    An address without a zone stands for that address in every zone.
    """

    address: IPAddress | None = None
    port: int | None = None

    def __post_init__(self) -> None:
        if self.address is None and self.port is not None:
            raise TextError(f":{self.port}", "a port with its address")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Nothing for all, ``ADDRESS``, ``ADDRESS:PORT`` or ``[ADDRESS]:PORT``. Raises `TextError`."""
        if not text:
            return cls()
        host, colon, port = text.rpartition(":")
        is_bracketed = host.startswith("[") and host.endswith("]")
        if colon and (is_bracketed or ":" not in host):
            return cls(parse_client_address(host[1:-1] if is_bracketed else host), parse_port(port))
        return cls(parse_client_address(text))

    def __str__(self) -> str:
        if self.address is None:
            return ""
        return str(self.address) if self.port is None else address_text(self.address, self.port)

    def has(self, address: IPAddress, port: int) -> bool:
        """Whether a client is one of them."""
        if self.address is None:
            return True
        return self.address in (address, unmapped(address)) and self.port in (None, port)


@dataclass(frozen=True, slots=True)
class CutReport:
    """The answer to ``qubes.ForwardCut``: how many connections or flows were cut, or why none could be."""

    cut: int
    problem: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {"version": VERSION, "cut": self.cut, "problem": self.problem}

    @classmethod
    def parse(cls, untrusted_answer: bytes) -> Self:
        """Raises `ReportError`."""
        untrusted = Reader(load(untrusted_answer), "the answer to a cut")
        untrusted.check_version()
        return cls(untrusted.number("cut"), untrusted.optional("problem", untrusted.text))
