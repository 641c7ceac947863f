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

from qubes_fwd_qrexec.common.rules import BrokenRule, NamedRule
from qubes_fwd_qrexec.common.values import QubeName

from .checks import is_over, judged
from .claims import Claims, claims_of
from .inventory import Inventory
from .states import Alone, Cause, Forward, Key, Plan


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
            is_same = was is not None and _is_same(was.forward, entry, now)
            alone[entry[:2]] = was if was is not None and is_same else _alone(entry, *basis, now)
    forwards: dict[Key, Forward] = {key: each.forward for key, each in alone.items()}
    taken = Claims()
    for key in sorted(alone, key=lambda key: (key in newcomers, key)) if newcomers else alone:
        conflict = taken.take(*alone[key])
        if conflict is not None:
            forwards[key] = forwards[key].with_finding(conflict)
    broken = tuple(entry for entry in ordered if isinstance(entry, BrokenRule))
    return Plan(tuple(forwards.values()), broken, alone=alone, basis=basis)


def _alone(named: NamedRule, inventory: Inventory, stock: Collection[QubeName], now: float) -> Alone:
    forward = judged(named, inventory, now, stock)
    return Alone(forward, claims_of(forward, inventory))


def _is_same(forward: Forward, named: NamedRule, now: float) -> bool:
    """Whether a forward is about this rule, and the clock says the same of it."""
    rule = forward.named.rule
    was_over = forward.finding(Cause.EXPIRED) is not None
    return (rule is named.rule or rule == named.rule) and was_over == is_over(rule, now)
