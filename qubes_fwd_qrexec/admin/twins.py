# SPDX-License-Identifier: GPL-2.0-or-later
"""Forwards that share a port, one by IPv4 and one by IPv6: nothing is wrong with that, and it is said."""

from collections.abc import Iterable, Iterator

from qubes_fwd_qrexec.common.values import QubeName, RuleName

from .states import Forward


def with_twins(forwards: Iterable[Forward]) -> Iterator[Forward]:
    """Say it of forwards that share a port by IPv4 and IPv6 and lead to different servers: a client that
    knows the exposed qube by a name reaches one or the other."""
    found = list(forwards)
    by_qube: dict[str | None, list[Forward]] = {}
    for forward in sorted(found, key=lambda forward: forward.source.rule.listen_ports.first):
        if forward.is_live:
            by_qube.setdefault(forward.exposed, []).append(forward)
    notes: dict[tuple[QubeName, RuleName], str] = {}
    for sharing in by_qube.values():
        before: list[Forward] = []
        for forward in sharing:
            ports = forward.source.rule.listen_ports
            before = [one for one in before if one.source.rule.listen_ports.last >= ports.first]
            for one in before:
                if _is_elsewhere(one, forward):
                    for this, other in ((one, forward), (forward, one)):
                        family = " and ".join(f"IPv{version}" for version in sorted(_versions(other)))
                        notes[this.source[:2]] = (
                            f"the same port of {this.exposed} leads elsewhere by {family}: {other.source}"
                        )
            before.append(forward)
    for forward in found:
        note = notes.get(forward.source[:2])
        yield forward if note is None else forward._replace(notes=(*forward.notes, note))


def _is_elsewhere(one: Forward, other: Forward) -> bool:
    """Whether they listen by different IP versions, and lead to different servers."""
    port = other.source.rule.listen_ports.first
    return not (_versions(one) & _versions(other)) and _server(one, port) != _server(other, port)


def _versions(forward: Forward) -> set[int]:
    return {address.version for address in forward.source.rule.listen_addresses}


def _server(forward: Forward, port: int) -> tuple[QubeName, int]:
    """Where a listened port leads."""
    rule = forward.source.rule
    return forward.source.target, rule.target_ports.first + port - rule.listen_ports.first
