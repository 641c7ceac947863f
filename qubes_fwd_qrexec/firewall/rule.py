# SPDX-License-Identifier: GPL-2.0-or-later
"""A rule of the firewall as text, and the parts that every rule of ours is made of.

Rules are compared by their comments, which end in a digest of the rule: nft prints the same rule differently
from version to version.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network, collapse_addresses

from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.values import IPNetwork, Sources

# The kernel counts nanoseconds in 64 bits: docs/facts.md, F15.
_TIME_MAX = (2**64 - 1) // 10**9
# 48 bits; a comment has at most 128 characters (libnftnl, NFTNL_UDATA_COMMENT_MAXLEN), a key at most 52.
_DIGEST_CHARACTERS = 12


class NftError(ForwardError):
    """The firewall cannot be read or changed; the text says why."""


class Family(StrEnum):
    """The nftables families in which Qubes has a table."""

    IP = "ip"
    IP6 = "ip6"

    @property
    def version(self) -> int:
        return 4 if self is Family.IP else 6


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule as nft takes it, without its comment; ``label`` says what it is for."""

    label: str
    text: str

    @property
    def comment(self) -> str:
        digest = hashlib.sha256(self.text.encode()).hexdigest()
        return f"{self.label} {digest[:_DIGEST_CHARACTERS]}"

    def __str__(self) -> str:
        return f'{self.text} comment "{self.comment}"'


def by(side: Side) -> str:
    """The interfaces of a side, by group and never by index: eth0 and vifs are replaced with the netvm."""
    this = f"iifgroup {side.group}"
    return f'{this} iifname != "lo"' if side is Side.OUTER else this


def in_time(expire: int | None) -> str:
    """What ends a rule by itself at a time in UNIX seconds; nothing without one."""
    return "" if expire is None else f" meta time < {min(expire, _TIME_MAX)}"


def networks(sources: Sources, family: Family) -> Sequence[IPNetwork]:
    """The networks of clients in one family, as few as possible; none if ``anyone`` may be one."""
    if family is Family.IP:
        return list(collapse_addresses(n for n in sources.networks if isinstance(n, IPv4Network)))
    return list(collapse_addresses(n for n in sources.networks if isinstance(n, IPv6Network)))
