# SPDX-License-Identifier: GPL-2.0-or-later
"""Whom a rule lets in at its exposed qube: from names of qubes and tags to networks.

A qube is let in by the addresses that Qubes gave it, and only where these prove who it is: in its own netvm,
whose antispoofing drops what the qube sends from any other address, and what others send from this one
(docs/facts.md, F7). So a name lets in nobody unless the exposed qube is its netvm, and no other qube behind
that has the address, as a clone may (F8).
"""

import ipaddress

from qubes_fwd_qrexec.common.errors import TextError
from qubes_fwd_qrexec.common.rules import NamedRule
from qubes_fwd_qrexec.common.values import IPNetwork, QubeName, Sources

from .inventory import ADMIN, TEMPLATE, Inventory, Qube
from .states import Cause, Finding, LetIn


def resolved(
    named: NamedRule, exposed: QubeName, inventory: Inventory
) -> tuple[Sources | None, tuple[LetIn, ...], list[Finding]]:
    """Whom a rule lets in at its exposed qube, None if that is nobody; and who of them it names."""
    clients = named.rule.sources
    if not clients.has_names:
        return clients.fixed, (), []
    behind, found = _behind(named, exposed, inventory)
    owners: dict[IPNetwork, set[QubeName]] = {}
    for qube in inventory.qubes.values():
        for address in _addresses(qube) if qube.netvm == exposed else ():
            owners.setdefault(address, set()).add(qube.name)
    versions = {address.version for address in named.rule.listen_addresses}
    let_in: list[LetIn] = []
    for asked, qube in behind:
        has = [address for address in _addresses(qube) if address.version in versions]
        rivals = {owner for address in has for owner in owners[address]} - {qube.name}
        let_in.append(LetIn(asked, qube.name, tuple(a for a in has if len(owners[a]) == 1)))
        if rivals or not has:
            case = "shared" if rivals else "address"
            found.append(Finding(Cause.SOURCE_NOBODY, qube.name, detail=", ".join(sorted(rivals)), case=case))
        if qube.provides_network:
            found.append(Finding(Cause.SOURCE_NETVM, qube.name))
    networks = {*clients.networks, *(address for each in let_in for address in each.addresses)}
    sources = None
    try:
        if networks:
            sources = Sources.of(networks)
        else:
            found.append(Finding(Cause.NO_SOURCE, exposed))
    except TextError as error:
        found.append(Finding(Cause.TOO_LARGE, detail=str(error), case="bytes"))
    return sources, tuple(let_in), list(dict.fromkeys(found))


def _behind(
    named: NamedRule, exposed: QubeName, inventory: Inventory
) -> tuple[list[tuple[str, Qube]], list[Finding]]:
    """The qubes behind the exposed one that a rule names, each with the name for it there; and the others."""
    target, _, rule = named
    behind: list[tuple[str, Qube]] = []
    found: list[Finding] = []
    for name in rule.sources.qubes:
        qube = inventory.get(name)
        if qube is None:
            found.append(Finding(Cause.SOURCE_NOBODY, name, case="qube"))
        elif qube.netvm != exposed:
            case = "netvm" if qube.netvm not in (None, target) else "none"
            found.append(Finding(Cause.SOURCE_ELSEWHERE, name, detail=qube.netvm or "", case=case))
        else:
            behind.append((name, qube))
    for tag in rule.sources.tags:
        tagged = [q for q in inventory.qubes.values() if tag in q.tags and q.klass not in (ADMIN, TEMPLATE)]
        behind += ((f"@tag:{tag}", qube) for qube in tagged if qube.netvm == exposed)
        if others := [qube.name for qube in tagged if qube.netvm != exposed]:
            found.append(Finding(Cause.TAG_ELSEWHERE, exposed, detail=", ".join(others), case=tag))
    return behind, found


def _addresses(qube: Qube) -> list[IPNetwork]:
    return [ipaddress.ip_network(address) for address in (qube.ip, qube.ip6) if address is not None]
