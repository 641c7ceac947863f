# SPDX-License-Identifier: GPL-2.0-or-later
"""The path of a forward by nft: what keeps packets from going it, and what each of its qubes is told.

A path has the target first, then its netvms up to the exposed qube. Each hop knows the address of the qube
before it alone; the exposed port is kept up to the last hop, which sends to the target's port.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from typing import Any

from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.common.nftconfig import SHIFTED_MAX, NftConfig, Role
from qubes_fwd_qrexec.common.rules import ForwardRule, NamedRule
from qubes_fwd_qrexec.common.services import NFT_SERVICE
from qubes_fwd_qrexec.common.values import ListenPorts, QubeName, Sources, TargetPorts

from .inventory import NFT_FEATURE, Inventory, Qube
from .states import Cause, Finding

Path = Sequence[QubeName]
# Such a client is known on its own link alone, and no hop can send anything back to it.
_LINK_LOCAL = IPv6Network("fe80::/10")


def path_to(target: QubeName, exposed: QubeName, chain: Path) -> tuple[QubeName, ...] | None:
    """The path along the target's netvms; None if the exposed qube is none of them."""
    return (target, *chain[: chain.index(exposed) + 1]) if exposed in chain else None


def obstacles(rule: ForwardRule, path: Path, inventory: Inventory) -> Iterator[Finding]:
    """What keeps a path from carrying a rule's packets, and in what it differs from what the rule asks for.

    The first decides where ``mode=auto`` is decided.
    """
    for qube in path:
        if (mark := inventory.whonix_mark(qube)) is not None:
            yield Finding(Cause.NFT_AT_WHONIX, qube, mark=mark)
    for qube in path:
        if not inventory.offers(qube, NFT_SERVICE):
            *_, installed_in = inventory.with_templates(qube)
            system = inventory.other_system(qube)
            yield Finding(Cause.NO_NFT_SERVICE, qube, detail=installed_in.name, case=system)
    for qube in path:
        if not inventory.qubes[qube].features.get(NFT_FEATURE):
            yield Finding(Cause.NFT_SWITCHED_OFF, qube)
    wanted, lacking = _wanted(rule), _lacking(path, inventory)
    for version in sorted(wanted & lacking.keys()):
        # Nobody has asked for IPv6 by itself.
        is_free = rule.listen is None and all(network.version == 4 for network in rule.sources.networks)
        is_enough = is_free and version == 6 and 4 not in lacking
        yield Finding(Cause.IPV4_ALONE if is_enough else Cause.NO_ADDRESS, lacking[version], number=version)
    ports = len(rule.listen_ports)
    if rule.listen_ports.first != rule.target_ports.first and ports > SHIFTED_MAX:
        yield Finding(Cause.TOO_LARGE, number=ports, case="shifted")
    for network in rule.sources.networks:
        # What else fe00::/8 has is in no use.
        if isinstance(network, IPv6Network) and network.prefixlen >= 8 and network.overlaps(_LINK_LOCAL):
            yield Finding(Cause.LINK_LOCAL, detail=str(network))
    if rule.listen is not None and rule.listen.is_loopback:
        yield Finding(Cause.NFT_LOOPBACK)


def _wanted(rule: ForwardRule) -> frozenset[int]:
    """The IP versions that a rule is about."""
    return frozenset(address.version for address in rule.listen_addresses)


def _lacking(path: Path, inventory: Inventory) -> dict[int, QubeName]:
    """The IP versions in which a qube of the path has no address, and the first such qube."""
    found: dict[int, QubeName] = {}
    for qube in map(inventory.qubes.__getitem__, path):
        for version, address in ((4, qube.ip), (6, qube.ip6)):
            if address is None:
                found.setdefault(version, qube.name)
    return found


def without_family(rule: ForwardRule, sources: Sources, path: Path, inventory: Inventory) -> Finding | None:
    """That no IP version that a rule's clients have goes all the way; None if one does.

    Where there are no obstacles, the qubes that it names may still have fewer versions than it is about.
    """
    lacking = _lacking(path, inventory)
    asked = _wanted(rule) & sources.versions
    if asked - lacking.keys():
        return None
    version = min(asked)
    return Finding(Cause.NO_ADDRESS, lacking[version], number=version)


def configs(
    named: NamedRule, sources: Sources, path: Path, side: Side, inventory: Inventory
) -> tuple[tuple[QubeName, NftConfig], ...]:
    """What each qube of a path without obstacles is told; ``side`` is that of the exposed qube, the last, and
    ``sources`` are the rule's clients.

    Raises `ConfigError` if it is too much.
    """
    rule, (target, *_) = named.rule, path
    versions = (_wanted(rule) & sources.versions) - _lacking(path, inventory).keys()
    at_target = NftConfig(
        target=named.target,
        name=named.name,
        role=Role.TARGET,
        side=Side.UPLINK,
        proto=rule.proto,
        listen_ports=ListenPorts(rule.target_ports.first, rule.target_ports.last),
        target_ports=rule.target_ports,
        sources=sources,
        family=None if versions == sources.versions else min(versions),
        on_expire=rule.on_expire,
        expire=rule.expire,
    )
    kept = TargetPorts(rule.listen_ports.first, rule.listen_ports.last)
    at_hops = [
        replace(
            at_target,
            role=Role.HOP,
            family=None,
            listen_ports=rule.listen_ports,
            target_ports=rule.target_ports if following == target else kept,
            **_next_hop(inventory.qubes[following], versions),
        )
        for following in path[:-1]
    ]
    listen = None if rule.listen is None or rule.listen.is_unspecified else rule.listen
    at_hops[-1] = replace(at_hops[-1], side=side, limits=rule.limits, listen=listen)
    return tuple(zip(path, (at_target, *at_hops), strict=True))


def _next_hop(qube: Qube, versions: Collection[int]) -> dict[str, Any]:
    """Where the netvm of a qube routes packets for it, which may not be its address inside (net.fake-ip)."""
    return {
        "to4": IPv4Address(qube.ip) if qube.ip is not None and 4 in versions else None,
        "to6": IPv6Address(qube.ip6) if qube.ip6 is not None and 6 in versions else None,
    }
