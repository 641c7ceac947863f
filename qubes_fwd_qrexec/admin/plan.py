# SPDX-License-Identifier: GPL-2.0-or-later
"""Rules and inventory to plan: for every rule where it is exposed, how it travels, and whether it may.

Nothing is read or changed here. Each rule is first judged by itself. Then all that are not asleep claim their
ports; if two claim the same port, the first by name has it.
"""

from collections.abc import Collection, Iterable

from qubes_fwd_qrexec.common.rules import BrokenRule, NamedRule
from qubes_fwd_qrexec.common.values import QubeName, RuleName

from .checks import judged, listener_of
from .claims import Claims
from .inventory import Chain, Inventory
from .states import Cause, Forward, Plan

# These open only after a command, which checks their ports then. So copies that clones inherit claim nothing.
_ASLEEP = frozenset((Cause.CLONED, Cause.EXPIRED, Cause.DISABLED))


def plan(
    rules: Iterable[NamedRule],
    inventory: Inventory,
    now: float,
    *,
    broken: Iterable[BrokenRule] = (),
    newcomers: Collection[tuple[QubeName, RuleName]] = (),
    stock: Collection[QubeName] = (),
) -> Plan:
    """What becomes of each rule at the time ``now`` (UNIX seconds).

    ``newcomers`` names rules that are not stored yet: what conflicts with them was there first. ``stock``
    are the targets that dom0 now allows to be called over the stock service: while such a target runs, it
    lacks what has been installed in its template since it started.
    """
    ordered = sorted(rules, key=lambda rule: (rule.target, rule.name))
    forwards = {rule[:2]: judged(rule, inventory, now, stock) for rule in ordered}
    claims = Claims()
    for key in sorted(forwards, key=lambda key: (key in newcomers, key)):
        forward = forwards[key]
        home = _home(forward)
        conflict = None if home is None else claims.take(forward.named, home)
        if conflict is not None:
            forwards[key] = forward.with_finding(conflict)
    return Plan(tuple(forwards.values()), tuple(sorted(broken)))


def _home(forward: Forward) -> QubeName | None:
    """Where a rule claims its ports: at the netvms that were agreed to, since it opens again by itself when
    they are back.
    """
    rule = forward.named.rule
    if forward.cause in _ASLEEP:
        return None
    followed = forward.chain if rule.follow_netvm else ()
    return listener_of(rule, Chain(followed or rule.path or forward.chain))
