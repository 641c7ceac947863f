# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules and inventory to plan: for every rule where it is exposed, how it travels, and whether it may.

Nothing is read or changed here. Each rule is first judged by itself. Then an enabled rule claims its ports
until its time is over, whether it is open or not: at its exposed qube, and by nft at each hop. Two conflict
if they claim one address and port of a qube for the same protocol, unless both go by nft and enter by
different sides: a listener is hidden by a rule of the firewall, by whatever side. A target claims the ports
that packets come to, which would otherwise be sent on or answered by a listener, but never against another
rule to itself. Two rules also conflict if they reach one port of a target from one qube with different
autostart, which dom0's policy cannot tell apart. Every command refuses a second claim. Qubes' own tools can
still bring two together when they change netvms: then the first by name has the port.
"""

from collections.abc import Collection, Iterable
from typing import NamedTuple

from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.common.rules import WILDCARDS, BrokenRule, Mode, NamedRule
from qubes_fwd_qrexec.common.values import IPAddress, QubeName

from .checks import is_over, judged, listener_of
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
    known: Plan | None = None,
) -> Plan:
    """What becomes of each stored rule at the time ``now`` (UNIX seconds).

    ``newcomers`` names rules that are not stored yet: what conflicts with them was there first. ``stock``
    are the targets that dom0 now allows to be called over the stock service: while such a target runs, it
    lacks what has been installed in its template since it started. ``known`` is the plan for the same qubes
    with almost the same rules: those that are the same are not judged again.
    """
    ordered = sorted(stored, key=lambda entry: (entry.target, entry.name))
    rules = (entry for entry in ordered if isinstance(entry, NamedRule))
    before = {} if known is None else known.alone
    alone: dict[Key, Forward] = {}
    for rule in rules:
        was = before.get(rule[:2])
        is_same = (
            was is not None and was.named.rule is rule.rule and _was_over(was) == is_over(rule.rule, now)
        )
        alone[rule[:2]] = was if was is not None and is_same else judged(rule, inventory, now, stock)
    forwards = dict(alone)
    claims = _Claims()
    for key in sorted(forwards, key=lambda key: (key in newcomers, key)):
        forward = forwards[key]
        conflict = claims.take(forward, inventory)
        if conflict is not None:
            forwards[key] = forward.with_finding(conflict)
    broken = tuple(entry for entry in ordered if isinstance(entry, BrokenRule))
    return Plan(tuple(forwards.values()), broken, alone=alone)


def _was_over(forward: Forward) -> bool:
    return forward.finding(Cause.EXPIRED) is not None


def _homes(forward: Forward) -> tuple[QubeName, ...]:
    """Where a rule claims its ports, the exposed qube first: at the netvms that were agreed to, since it
    opens again by itself when they are back.
    """
    rule = forward.named.rule
    if forward.cause in _ASLEEP:
        return ()
    followed = forward.chain if rule.follow_netvm else ()
    agreed = followed or rule.path or forward.chain
    return forward._replace(chain=agreed, exposed=listener_of(rule, Chain(agreed))).hops


class _Claim(NamedTuple):
    """The numbers are compared first: with a thousand rules, almost all comparisons end there.

    ``side`` is None for a listener, which has the port whatever the side. ``is_own``: the rule's target has
    it.
    """

    first: int
    last: int
    side: Side | None
    addresses: tuple[IPAddress, ...]
    named: NamedRule
    is_own: bool = False

    def rivals(self, other: "_Claim") -> bool:
        """Whether only one of two claims to the same port can be had."""
        return (
            not (self.is_own and other.is_own)
            and self.named.rule.proto.overlaps(other.named.rule.proto)
            and (self.side is None or other.side is None or self.side is other.side)
            and _overlap(self.addresses, other.addresses)
        )


class _Claims:
    """What the rules that were taken claim, by the qube where they do."""

    def __init__(self) -> None:
        self._ports: dict[QubeName, list[_Claim]] = {}
        self._calls: dict[tuple[QubeName, QubeName, bool], list[NamedRule]] = {}

    def take(self, forward: Forward, inventory: Inventory) -> Finding | None:
        """Give a rule what it claims, or return the conflict with the rule that has it."""
        named, homes, is_nft = forward.named, _homes(forward), forward.mode is Mode.NFT
        claims: list[tuple[QubeName, _Claim]] = []
        for number, qube in enumerate((*homes, named.target) if homes and is_nft else homes):
            is_own = number == len(homes)
            ports = named.rule.target_ports if is_own else named.rule.listen_ports
            first, last, addresses = ports.first, ports.last, named.rule.listen_addresses
            side = inventory.side(qube, named.rule.forward_type) if is_nft else None
            if number:
                # Packets come from a netvm there, and nobody knows by which address they came in.
                side, addresses = Side.UPLINK, tuple(WILDCARDS[each.version] for each in addresses)
            claim = _Claim(first, last, side, addresses, named, is_own)
            sharing = (o for o in self._ports.get(qube, ()) if o.first <= last and first <= o.last)
            for other in filter(claim.rivals, sharing):
                case = "own-port" if is_own else "port"
                return Finding(Cause.CONFLICT, qube=qube, rival=other.named, case=case)
            claims.append((qube, claim))
        conflict = self._take_calls(named, homes[0]) if homes and not is_nft else None
        if conflict is not None:
            return conflict
        for qube, claim in claims:
            self._ports.setdefault(qube, []).append(claim)
        return None

    def _take_calls(self, named: NamedRule, listener: QubeName) -> Finding | None:
        for reaching in self._calls.get((listener, named.target, not named.rule.autostart), ()):
            is_same = named.rule.proto.overlaps(reaching.rule.proto)
            if is_same and named.rule.target_ports.overlaps(reaching.rule.target_ports):
                return Finding(Cause.CONFLICT, qube=listener, rival=reaching, case="autostart")
        self._calls.setdefault((listener, named.target, named.rule.autostart), []).append(named)
        return None


def _overlap(some: tuple[IPAddress, ...], others: tuple[IPAddress, ...]) -> bool:
    """Whether two claim one address; a wildcard claims all of its family, and no other."""
    return any(
        a.version == b.version and (a == b or a.is_unspecified or b.is_unspecified)
        for a in some
        for b in others
    )
