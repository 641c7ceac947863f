# SPDX-License-Identifier: GPL-2.0-or-later
"""What the firewall of an exposed qube should contain for its forwards, and how to get there.

The tables ``ip qubes`` and ``ip6 qubes`` drop incoming traffic, after the chain ``custom-input``, which is
the user's. In it we have one rule, tagged by its comment, that jumps to a chain of ours; both exist only
while a forward needs them. A change never names any other rule, chain or table.

Rules are compared by their comments, which end in a digest of the rule: nft prints the same rule differently
from version to version.

A rule names the side that connections may come from, the port, and the address, unless the forward listens on
all of them. So a program that has the same port at another address is not exposed; and on all addresses the
kernel lets nobody else listen beside the listener.

All of this is text and values; `nfttool` applies it.
"""

import hashlib
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network
from typing import Any

from qubes_fwd_qrexec.common.config import ListenerConfig, Side
from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.values import Binding, IPAddress, IPNetwork, PortRange

# qubes-core-agent-linux network/qubes-ipv4.nft and qubes-ipv6.nft.
TABLE = "qubes"
USERS_CHAIN = "custom-input"
# The name of our chain, and the comment of the rule that jumps to it.
OURS = "qubes-fwd-qrexec"
# 48 bits; a comment has at most 128 characters (libnftnl, NFTNL_UDATA_COMMENT_MAXLEN), a key at most 52.
_DIGEST_CHARACTERS = 12


class NftError(ForwardError):
    """The firewall cannot be read or changed; the text says why."""


class Family(StrEnum):
    """The nftables families in which Qubes has a table for incoming traffic."""

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


# Only packets that begin a connection: the rest passes by Qubes' own rule for established connections until
# the listener ends it, and what belongs to no connection is dropped as always.
JUMP = Rule(OURS, f"meta l4proto tcp ct state new jump {OURS}")


@dataclass(frozen=True, slots=True)
class Seen:
    """What one family's table has of ours.

    ``jumps`` are the handles of our rules in the user's chain; ``is_jump_right`` if there is exactly one,
    the right one, behind all rules of the user. ``comments`` are those of our chain's rules, None without a
    chain. ``is_foreign`` if another rule jumps to our chain, so that it cannot be deleted.
    """

    jumps: tuple[int, ...] = ()
    is_jump_right: bool = False
    comments: tuple[str, ...] | None = None
    is_foreign: bool = False


def rules(
    configs: Iterable[ListenerConfig], family: Family, listening: Container[Binding]
) -> tuple[Rule, ...]:
    """The rules of our chain in one family: one for each network, address and range of ports.

    ``listening`` is where the listener listens; a port of a forward that is not among these gets no rule.
    Adjacent ports share a rule. There is no single rule with a set, because nft prints the networks of a set
    joined or not, depending on its version.
    """
    return tuple(
        Rule(config.key, " ".join((*match, "accept")))
        for config in sorted(configs, key=lambda config: config.key)
        for match in _matches(config, family, listening)
    )


def is_waiting(config: ListenerConfig, listening: Container[Binding]) -> bool:
    """Whether the listener does not yet listen on every address and port of a forward."""
    return any((address, port) not in listening for address in config.listen for port in config.listen_ports)


def _matches(
    config: ListenerConfig, family: Family, listening: Container[Binding]
) -> Iterator[tuple[str, ...]]:
    listen = sorted({address for address in config.listen if address.version == family.version}, key=int)
    for address in listen:
        to = () if address.is_unspecified else (f"{family} daddr {address}",)
        all_ports = [f"tcp dport {ports.brief()}" for ports in _open_ports(config, address, listening)]
        for network in _networks(config, family):
            of = () if network.prefixlen == 0 else (f"{family} saddr {network}",)
            yield from ((*_by(config.side), *of, *to, ports) for ports in all_ports)


def _by(side: Side) -> tuple[str, ...]:
    """The interfaces of a side, by group and never by index: eth0 and vifs are replaced with the netvm."""
    this = f"iifgroup {side.group}"
    return (this, 'iifname != "lo"') if side is Side.OUTER else (this,)


def _open_ports(
    config: ListenerConfig, address: IPAddress, listening: Container[Binding]
) -> Iterator[PortRange]:
    """The ports that the listener listens on, in ranges as long as possible."""
    first = None
    for port in config.listen_ports:
        if (address, port) not in listening:
            if first is not None:
                yield PortRange(first, port - 1)
            first = None
        elif first is None:
            first = port
    if first is not None:
        yield PortRange(first, config.listen_ports.last)


def _networks(config: ListenerConfig, family: Family) -> Sequence[IPNetwork]:
    """The networks of clients, without overlaps; the whole family if anybody may connect."""
    if config.sources.anyone:
        return [ip_network("0.0.0.0/0" if family is Family.IP else "::/0")]
    networks = config.sources.networks
    if family is Family.IP:
        return list(collapse_addresses(n for n in networks if isinstance(n, IPv4Network)))
    return list(collapse_addresses(n for n in networks if isinstance(n, IPv6Network)))


def usable_families(chains: list[dict[str, Any]]) -> list[Family]:
    """The families that have Qubes' table and the user's chain, by the output of ``nft -j list chains``.

    A qube without IPv6 has no ``ip6 qubes``, or one that is for anti-spoofing alone.
    """
    there = {(chain.get("family"), chain.get("table"), chain.get("name")) for chain in _of(chains, "chain")}
    return [family for family in Family if (family, TABLE, USERS_CHAIN) in there]


def seen(table: list[dict[str, Any]]) -> Seen:
    """What is ours in the output of ``nft -j list table`` for one table."""
    rules = list(_of(table, "rule"))
    users = [rule for rule in rules if rule.get("chain") == USERS_CHAIN]
    ours = [rule for rule in users if _is_tagged(rule) and _jumps_to_us(rule)]
    has_chain = any(chain.get("name") == OURS for chain in _of(table, "chain"))
    in_chain = tuple(str(rule.get("comment", "")) for rule in rules if rule.get("chain") == OURS)
    return Seen(
        jumps=tuple(int(rule["handle"]) for rule in ours),
        is_jump_right=len(ours) == 1 and users[-1] is ours[0] and ours[0]["comment"] == JUMP.comment,
        comments=in_chain if has_chain else None,
        is_foreign=any(_jumps_to_us(rule) and rule not in ours for rule in rules),
    )


def transaction(family: Family, wanted: tuple[Rule, ...], seen: Seen) -> str:
    """The input of ``nft -f -`` that makes everything right, all or nothing; empty if it is right."""
    if is_right(wanted, seen):
        return ""
    table = f"{family} {TABLE}"
    lines = [f"delete rule {table} {USERS_CHAIN} handle {handle}" for handle in seen.jumps]
    if wanted:
        # Behind the user's own rules: what they drop stays dropped.
        lines += [f"add chain {table} {OURS}", f"flush chain {table} {OURS}"]
        lines += [f"add rule {table} {OURS} {rule}" for rule in wanted]
        lines += [f"add rule {table} {USERS_CHAIN} {JUMP}"]
    elif seen.comments is not None:
        lines += [f"flush chain {table} {OURS}"]
        lines += [] if seen.is_foreign else [f"delete chain {table} {OURS}"]
    return "".join(f"{line}\n" for line in lines)


def is_right(wanted: tuple[Rule, ...], seen: Seen) -> bool:
    """Whether the table has exactly the wanted rules, and what leads to them."""
    if wanted:
        return seen.is_jump_right and seen.comments == tuple(rule.comment for rule in wanted)
    return not seen.jumps and (seen.comments is None or (seen.is_foreign and not seen.comments))


def _of(listing: list[dict[str, Any]], kind: str) -> Iterator[dict[str, Any]]:
    return (entry[kind] for entry in listing if kind in entry)


def _is_tagged(rule: dict[str, Any]) -> bool:
    return str(rule.get("comment", "")).partition(" ")[0] == OURS


def _jumps_to_us(rule: dict[str, Any]) -> bool:
    return any(
        isinstance(part, dict) and isinstance(to := part.get(verb), dict) and to.get("target") == OURS
        for part in rule.get("expr", [])
        for verb in ("jump", "goto")
    )
