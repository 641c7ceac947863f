# SPDX-License-Identifier: GPL-2.0-or-later
"""What mode=auto becomes: decided once, when somebody adds, changes or confirms a rule, and stored.

Packets go by nft where nothing is against it: it is faster, and it is the only mode for UDP. Whatever is
stored undecided goes over qrexec, so that no update opens an IP path by itself.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from qubes_fwd_qrexec.common.rules import ForwardRule, Mode, NamedRule, Proto, Proxy, Transport

from . import checks
from .inventory import Inventory
from .snapshot import Snapshot
from .states import Finding, Key, State


class Decision(NamedTuple):
    """A rule with its mode. Against nft is ``against``, or that the rule asks for ``option``, or nothing."""

    rule: ForwardRule
    against: Finding | None = None
    option: str = ""


def decided(snapshot: Snapshot, keys: Iterable[Key], now: float) -> dict[Key, Decision]:
    """What is decided about those of some rules that have mode=auto."""
    if not checks.HAS_NFT:
        return {}
    rules = ((key, snapshot.stored.get(key)) for key in keys)
    return {
        key: _decided(named, snapshot.inventory, now)
        for key, named in rules
        if isinstance(named, NamedRule) and named.rule.mode is Mode.AUTO
    }


def _decided(named: NamedRule, inventory: Inventory, now: float) -> Decision:
    rule = named.rule
    asked = {
        "proxy": rule.proxy is not Proxy.OFF,
        "transport": rule.transport is not Transport.AUTO,
        "autostart": rule.autostart,
    }
    for option in (option for option, is_asked in asked.items() if is_asked and rule.proto is Proto.TCP):
        return Decision(replace(rule, mode=Mode.QREXEC), option=option)
    by_nft = replace(rule, mode=Mode.NFT)
    forward = checks.judged(named._replace(rule=by_nft), inventory, now, ())
    against = next((stop for stop in forward.stops if stop.cause.state is State.REFUSED), None)
    if against is None or rule.proto is Proto.UDP:
        return Decision(by_nft)
    return Decision(replace(rule, mode=Mode.QREXEC), against)
