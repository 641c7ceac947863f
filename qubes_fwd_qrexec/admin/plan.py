# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules and inventory to plan: for every rule where it is exposed, how it travels, and whether it may.

Nothing is read or changed here. Each rule is first judged by itself. Then an enabled rule claims its ports
until its time is over, whether it is open or not. Two conflict if they would listen at one address and port
of a qube, or if they reach one port of a target from one qube with different autostart, which dom0's policy
cannot tell apart. Every command refuses a second claim. Qubes' own tools can still bring two together when
they change netvms: then the first by name has the port.
"""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from qubes_fwd_qrexec.common.rules import BrokenRule, NamedRule
from qubes_fwd_qrexec.common.values import IPAddress, QubeName

from .checks import judged, listener_of
from .inventory import Chain, Inventory
from .states import Cause, Finding, Forward, Key, Plan

# These open only after a command, which checks their ports then. So copies that clones inherit claim nothing.
_ASLEEP = frozenset((Cause.CLONED, Cause.EXPIRED, Cause.DISABLED))


def plan(
    stored: Iterable[NamedRule | BrokenRule],
    inventory: Inventory,
    now: float,
    *,
    newcomers: Collection[Key] = (),
    stock: Collection[QubeName] = (),
) -> Plan:
    """What becomes of each stored rule at the time ``now`` (UNIX seconds).

    ``newcomers`` names rules that are not stored yet: what conflicts with them was there first. ``stock``
    are the targets that dom0 now allows to be called over the stock service: while such a target runs, it
    lacks what has been installed in its template since it started.
    """
    ordered = sorted(stored, key=lambda entry: (entry.target, entry.name))
    rules = (entry for entry in ordered if isinstance(entry, NamedRule))
    forwards: dict[Key, Forward] = {rule[:2]: judged(rule, inventory, now, stock) for rule in rules}
    claims = _Claims()
    for key in sorted(forwards, key=lambda key: (key in newcomers, key)):
        forward = forwards[key]
        home = _home(forward)
        conflict = None if home is None else claims.take(forward.named, home)
        if conflict is not None:
            forwards[key] = forward.with_finding(conflict)
    return Plan(tuple(forwards.values()), tuple(entry for entry in ordered if isinstance(entry, BrokenRule)))


def _home(forward: Forward) -> QubeName | None:
    """Where a rule claims its ports: at the netvms that were agreed to, since it opens again by itself when
    they are back.
    """
    rule = forward.named.rule
    if forward.cause in _ASLEEP:
        return None
    followed = forward.chain if rule.follow_netvm else ()
    return listener_of(rule, Chain(followed or rule.path or forward.chain))


class _Claim(NamedTuple):
    """The numbers are compared first: with a thousand rules, almost all comparisons end there."""

    first: int
    last: int
    addresses: tuple[IPAddress, ...]
    named: NamedRule


class _Claims:
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
                return Finding(Cause.CONFLICT, qube=listener, rival=other.named, case="port")
        for reaching in self._calls.get((listener, named.target, not rule.autostart), ()):
            if rule.target_ports.overlaps(reaching.rule.target_ports):
                return Finding(Cause.CONFLICT, qube=listener, rival=reaching, case="autostart")
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
