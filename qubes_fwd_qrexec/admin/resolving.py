# SPDX-License-Identifier: GPL-2.0-or-later
"""Whom a rule lets in at its exposed qube: from names of qubes and tags to networks.

A qube is let in by the addresses that Qubes gave it, and only where these prove who it is: in its own netvm,
whose antispoofing drops what the qube sends from any other address, and what others send from this one
(docs/facts.md, F7). So a name lets in nobody unless the exposed qube is its netvm.
"""

import ipaddress
from collections.abc import Collection, Iterator
from typing import NamedTuple

from qubes_fwd_qrexec.common.errors import TextError
from qubes_fwd_qrexec.common.rules import NamedRule
from qubes_fwd_qrexec.common.values import IPNetwork, QubeName, Sources

from .inventory import ADMIN, TEMPLATE, Inventory, Qube
from .states import Cause, Finding, LetIn


class Named(NamedTuple):
    """A rule's clients as networks, None if that is nobody; who of them is known by name; what was found."""

    sources: Sources | None
    let_in: tuple[LetIn, ...]
    findings: tuple[Finding, ...]


def resolved(named: NamedRule, exposed: QubeName, inventory: Inventory) -> Named:
    """Whom a rule lets in at its exposed qube."""
    target, _, rule = named
    clients = rule.sources
    if not clients.has_names:
        return Named(clients.fixed, (), ())
    found: list[Finding] = []
    behind: list[tuple[str, Qube]] = []
    for name in clients.qubes:
        qube = inventory.get(name)
        if qube is None:
            found.append(Finding(Cause.SOURCE_GONE, name, case="qube"))
        elif qube.netvm != exposed:
            case = "netvm" if qube.netvm not in (None, target) else "none"
            found.append(Finding(Cause.SOURCE_ELSEWHERE, name, detail=qube.netvm or "", case=case))
        else:
            behind.append((name, qube))
    for tag in clients.tags:
        tagged = [q for q in inventory.qubes.values() if tag in q.tags and q.klass not in (ADMIN, TEMPLATE)]
        behind += ((f"@tag:{tag}", qube) for qube in tagged if qube.netvm == exposed)
        if others := [qube.name for qube in tagged if qube.netvm != exposed]:
            found.append(Finding(Cause.TAG_ELSEWHERE, exposed, detail=", ".join(others), case=tag))
    versions = {address.version for address in rule.listen_addresses}
    let_in = tuple(LetIn(asked, qube.name, (*_addresses(qube, versions),)) for asked, qube in behind)
    for qube in {qube.name: qube for _, qube in behind}.values():
        if qube.provides_network:
            found.append(Finding(Cause.SOURCE_NETVM, qube.name))
        if not [*_addresses(qube, versions)]:
            found.append(Finding(Cause.SOURCE_GONE, qube.name, case="address"))
    networks = [*clients.networks, *(address for each in let_in for address in each.addresses)]
    if not networks:
        return Named(None, let_in, (*found, Finding(Cause.NO_SOURCE, exposed)))
    try:
        return Named(Sources.of(networks), let_in, (*found,))
    except TextError as error:
        return Named(None, let_in, (*found, Finding(Cause.TOO_LARGE, detail=str(error), case="bytes")))


def _addresses(qube: Qube, versions: Collection[int]) -> Iterator[IPNetwork]:
    for address in (qube.ip, qube.ip6):
        if address is not None and (network := ipaddress.ip_network(address)).version in versions:
            yield network
