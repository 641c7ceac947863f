# SPDX-License-Identifier: GPL-2.0-or-later
"""Who has which port: an enabled rule claims its ports until its time is over, whether it is open or not.

Two rules conflict that would listen at one address and port of a qube, or that reach one port of a target
from one qube and say otherwise about autostart, which dom0's policy cannot tell apart. Who changes rules
refuses a second claim. Qubes' own tools may bring two together all the same, as they change netvms: then the
first by name has it.
"""

from typing import NamedTuple

from qubes_fwd_qrexec.common.rules import NamedRule
from qubes_fwd_qrexec.common.values import IPAddress, QubeName, RuleName


class Conflict(NamedTuple):
    """Which rule has the port already; ``text`` says it in a sentence with the way out."""

    rival: tuple[QubeName, RuleName]
    text: str


class _Claim(NamedTuple):
    """Numbers first, as with a thousand rules almost all comparisons end there."""

    first: int
    last: int
    addresses: tuple[IPAddress, ...]
    source: NamedRule


class Claims:
    """What the rules that were taken claim, by the qube that listens for them."""

    def __init__(self) -> None:
        self._ports: dict[QubeName, list[_Claim]] = {}
        self._calls: dict[tuple[QubeName, QubeName], list[NamedRule]] = {}

    def take(self, source: NamedRule, listener: QubeName) -> Conflict | None:
        """Let a rule have what it claims, or say which one has it."""
        rule = source.rule
        ports = self._ports.setdefault(listener, [])
        calls = self._calls.setdefault((listener, source.target), [])
        claim = _Claim(rule.listen_ports.first, rule.listen_ports.last, rule.listen_addresses, source)
        conflict = _taken(claim, ports, listener) or _torn(source, calls, listener)
        if conflict is None:
            ports.append(claim)
            calls.append(source)
        return conflict


def _taken(claim: _Claim, others: list[_Claim], listener: QubeName) -> Conflict | None:
    for other in others:
        if (
            other.first <= claim.last
            and claim.first <= other.last
            and other.source.rule.proto is claim.source.rule.proto
            and _overlap(claim.addresses, other.addresses)
        ):
            ports = other.source.rule.listen_ports.worded()
            return Conflict(
                other.source[:2],
                f"Rule {other.source} has {ports} of {listener} already; take another port or listen "
                "address, or remove or disable that rule.",
            )
    return None


def _torn(source: NamedRule, others: list[NamedRule], listener: QubeName) -> Conflict | None:
    for other in others:
        if source.rule.autostart != other.rule.autostart and source.rule.target_ports.overlaps(
            other.rule.target_ports
        ):
            return Conflict(
                other[:2],
                f"Rule {other} reaches the same port of {other.target} from {listener} and says otherwise "
                "about autostart, and dom0's policy cannot tell the two apart; give both the same autostart.",
            )
    return None


def _overlap(some: tuple[IPAddress, ...], others: tuple[IPAddress, ...]) -> bool:
    """Whether two listeners would claim one address; a wildcard claims all of its family, and no other."""
    return any(
        a.version == b.version and (a == b or a.is_unspecified or b.is_unspecified)
        for a in some
        for b in others
    )
