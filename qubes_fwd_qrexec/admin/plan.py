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

from collections.abc import Collection, Iterable, Iterator
from operator import itemgetter

from qubes_fwd_qrexec.common.config import Side
from qubes_fwd_qrexec.common.rules import WILDCARDS, BrokenRule, Mode, NamedRule
from qubes_fwd_qrexec.common.values import QubeName

from .checks import is_over, judged, listener_of
from .inventory import Chain, Inventory
from .states import Alone, Cause, Claim, Finding, Forward, Key, Plan

# These open only after a command, which checks their ports then. So copies that clones inherit claim nothing.
_ASLEEP = frozenset((Cause.CLONED, Cause.EXPIRED, Cause.DISABLED))
# Ports that are looked through together: most claims are in one block, and a block has few.
_BLOCK = 256


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


def claims_of(forward: Forward, inventory: Inventory) -> tuple[Claim, ...]:
    """The ports that a rule claims, at its exposed qube first."""
    named, homes, is_nft = forward.named, _homes(forward), forward.mode is Mode.NFT
    found: list[Claim] = []
    for number, qube in enumerate((*homes, named.target) if homes and is_nft else homes):
        is_own = number == len(homes)
        ports = named.rule.target_ports if is_own else named.rule.listen_ports
        side, addresses = None, named.rule.listen_addresses
        if number:
            # Packets come from a netvm there, and nobody knows by which address they came in.
            side, addresses = Side.UPLINK, tuple(WILDCARDS[each.version] for each in addresses)
        elif is_nft:
            side = inventory.side(qube, named.rule.forward_type)
        found.append(Claim(ports.first, ports.last, side, addresses, qube, named, is_own))
    return tuple(found)


class Claims:
    """What the rules that were taken claim."""

    def __init__(self) -> None:
        # Of each block of ports at a qube, with the number of the rule: the first has the port.
        self._ports: dict[tuple[QubeName, int], list[tuple[int, Claim]]] = {}
        self._calls: dict[tuple[QubeName, QubeName, bool], list[NamedRule]] = {}
        self._count = 0

    def take(self, forward: Forward, claims: tuple[Claim, ...]) -> Finding | None:
        """Give a rule what it claims, or return the conflict with the rule that has it."""
        for claim in claims:
            rival = min(self._rivals(claim), key=itemgetter(0), default=None)
            if rival is not None:
                case = "own-port" if claim.is_own else "port"
                return Finding(Cause.CONFLICT, qube=claim.qube, rival=rival[1].named, case=case)
        if claims and forward.mode is not Mode.NFT:
            conflict = self._take_calls(forward.named, claims[0].qube)
            if conflict is not None:
                return conflict
        self._count += 1
        for claim in claims:
            for block in _blocks(claim):
                self._ports.setdefault((claim.qube, block), []).append((self._count, claim))
        return None

    def _rivals(self, claim: Claim) -> Iterator[tuple[int, Claim]]:
        for block in _blocks(claim):
            for number, other in self._ports.get((claim.qube, block), ()):
                if other.first <= claim.last and claim.first <= other.last and claim.rivals(other):
                    yield number, other

    def _take_calls(self, named: NamedRule, listener: QubeName) -> Finding | None:
        for reaching in self._calls.get((listener, named.target, not named.rule.autostart), ()):
            is_same = named.rule.proto.overlaps(reaching.rule.proto)
            if is_same and named.rule.target_ports.overlaps(reaching.rule.target_ports):
                return Finding(Cause.CONFLICT, qube=listener, rival=reaching, case="autostart")
        self._calls.setdefault((listener, named.target, named.rule.autostart), []).append(named)
        return None


def _blocks(claim: Claim) -> range:
    return range(claim.first // _BLOCK, claim.last // _BLOCK + 1)


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
    lacks what has been installed in its template since it started. ``known`` is an earlier plan: what it
    made of rules alone is not made again, if rule and qubes are still the same.
    """
    ordered = sorted(stored, key=lambda entry: (entry.target, entry.name))
    basis = inventory.without_forwards(), frozenset(stock)
    before = known.alone if known is not None and known.basis == basis else {}
    alone: dict[Key, Alone] = {}
    for entry in ordered:
        if isinstance(entry, NamedRule):
            was = before.get(entry[:2])
            if was is None or not _is_same(was.forward, entry, now):
                forward = judged(entry, basis[0], now, basis[1])
                was = Alone(forward, claims_of(forward, basis[0]))
            alone[entry[:2]] = was
    forwards: dict[Key, Forward] = {key: each.forward for key, each in alone.items()}
    taken = Claims()
    for key in sorted(alone, key=lambda key: (key in newcomers, key)) if newcomers else alone:
        conflict = taken.take(*alone[key])
        if conflict is not None:
            forwards[key] = forwards[key].with_finding(conflict)
    broken = tuple(entry for entry in ordered if isinstance(entry, BrokenRule))
    return Plan(tuple(forwards.values()), broken, alone=alone, basis=basis)


def _is_same(forward: Forward, named: NamedRule, now: float) -> bool:
    """Whether a forward is about this rule, and the clock says the same of it."""
    rule = forward.named.rule
    was_over = forward.finding(Cause.EXPIRED) is not None
    return (rule is named.rule or rule == named.rule) and was_over == is_over(rule, now)
