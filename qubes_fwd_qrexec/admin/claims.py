# SPDX-License-Identifier: GPL-2.0-or-later
"""Who has which port: an enabled rule claims its ports until its time is over, whether it is open or not.

Two rules conflict if they would listen at one address and port of a qube. They also conflict if they reach
one port of a target from one qube with different autostart, which dom0's policy cannot tell apart. Every
command refuses a second claim. Qubes' own tools can still bring two together, as they change netvms: then the
first by name has the port.
"""

from typing import NamedTuple

from qubes_fwd_qrexec.common.rules import NamedRule
from qubes_fwd_qrexec.common.values import IPAddress, QubeName

from .states import Cause, Finding


class _Claim(NamedTuple):
    """The numbers are compared first: with a thousand rules, almost all comparisons end there."""

    first: int
    last: int
    addresses: tuple[IPAddress, ...]
    named: NamedRule


class Claims:
    """What the rules that were taken claim, by the qube that listens for them."""

    def __init__(self) -> None:
        self._ports: dict[QubeName, list[_Claim]] = {}
        self._calls: dict[tuple[QubeName, QubeName, bool], list[NamedRule]] = {}

    def take(self, named: NamedRule, listener: QubeName) -> Finding | None:
        """Give a rule what it claims, or return the conflict with the rule that has it."""
        rule = named.rule
        first, last = rule.listen_ports.first, rule.listen_ports.last
        claim = _Claim(first, last, rule.listen_addresses, named)
        ports = self._ports.setdefault(listener, [])
        sharing = [other for other in ports if other[0] <= last and first <= other[1]]
        for other in sharing:
            if other.named.rule.proto is rule.proto and _overlap(claim.addresses, other.addresses):
                return Finding(Cause.CONFLICT, qube=listener, rival=other.named, detail="port")
        for reaching in self._calls.get((listener, named.target, not rule.autostart), ()):
            if rule.target_ports.overlaps(reaching.rule.target_ports):
                return Finding(Cause.CONFLICT, qube=listener, rival=reaching, detail="autostart")
        ports.append(claim)
        self._calls.setdefault((listener, named.target, rule.autostart), []).append(named)
        return None


def _overlap(some: tuple[IPAddress, ...], others: tuple[IPAddress, ...]) -> bool:
    """Whether two listeners would claim one address; a wildcard claims all of its family, and no other."""
    return any(
        a.version == b.version and (a == b or a.is_unspecified or b.is_unspecified)
        for a in some
        for b in others
    )
