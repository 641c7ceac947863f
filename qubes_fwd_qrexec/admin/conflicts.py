# SPDX-License-Identifier: GPL-2.0-or-later
"""Who has which port: the claims of live forwards, of which the earlier one stands.

Two forwards conflict that would listen at one address and port of a qube, or that share a line of
dom0's policy and ask different things of it.
"""

from typing import NamedTuple

from qubes_fwd_qrexec.values import IPAddress

from . import policy
from .states import Forward


class _Ports(NamedTuple):
    """A claim to ports; numbers first, as with a thousand rules almost all comparisons end there."""

    first: int
    last: int
    addresses: tuple[IPAddress, ...]
    forward: Forward


class Claims:
    """What the forwards that were taken hold, by the qube that listens and by the call that they make."""

    def __init__(self) -> None:
        self._ports: dict[str | None, list[_Ports]] = {}
        self._calls: dict[tuple[object, ...], list[Forward]] = {}

    def take(self, forward: Forward) -> str | None:
        """Let a forward have what it asks for; or say in a sentence which one has it already."""
        rule = forward.source.rule
        ports = self._ports.setdefault(forward.exposed, [])
        claim = _Ports(rule.listen_ports.first, rule.listen_ports.last, rule.listen_addresses, forward)
        calls = self._calls.setdefault((forward.exposed, forward.source.target, forward.service), [])
        problem = _taken(claim, ports) or _torn(forward, calls)
        if problem is None:
            ports.append(claim)
            calls.append(forward)
        return problem


def _taken(claim: _Ports, others: list[_Ports]) -> str | None:
    first, last = claim.first, claim.last
    for other in others:
        if other.first <= last and first <= other.last and _overlap(claim.addresses, other.addresses):
            taken = other.forward
            return (
                f"Rule {taken.source} has port {taken.source.rule.listen_ports.brief()} of {taken.exposed} "
                "already; take another port or listen address, or remove or disable that rule."
            )
    return None


def _torn(forward: Forward, others: list[Forward]) -> str | None:
    for other in others:
        if forward.source.rule.autostart != other.source.rule.autostart and _calls(forward) & _calls(other):
            return (
                f"Rule {other.source} reaches the same port of {other.source.target} from {other.exposed} "
                "and says otherwise about autostart, and dom0's policy cannot tell the two apart; "
                "give both the same autostart."
            )
    return None


def _calls(forward: Forward) -> set[tuple[str, ...]]:
    """Service, argument, source and target of each line of policy; a tunnel's has its whole range."""
    return {tuple(line.split()[:4]) for line in policy.lines(forward)}


def _overlap(some: tuple[IPAddress, ...], others: tuple[IPAddress, ...]) -> bool:
    """Whether two listeners would claim one address; a wildcard claims all of its family, and no other."""
    return any(
        a.version == b.version and (a == b or a.is_unspecified or b.is_unspecified)
        for a in some
        for b in others
    )
