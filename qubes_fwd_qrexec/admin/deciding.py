# SPDX-License-Identifier: GPL-2.0-or-later
"""What mode=auto becomes: decided once, when somebody adds, changes or confirms a rule, and stored.

Packets go by nft where nothing is against it, as it is faster. Whatever is stored undecided goes over qrexec,
so that no update opens an IP path by itself.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.common.rules import ForwardRule, Mode, NamedRule, Proxy, Transport
from qubes_fwd_qrexec.common.values import QubeName

from . import checks
from .answers import AnswerError, ask_status, at_once
from .backend import Backend
from .inventory import Inventory
from .snapshot import Snapshot
from .states import Finding, Key, State

# The answer takes some tenths of a second.
_TIMEOUT_S = 4.0


class Decision(NamedTuple):
    """A rule with its mode. Against nft is ``against``, or that the rule asks for ``option``, or that the
    server listens at loopback addresses alone, or nothing.
    """

    rule: ForwardRule
    against: Finding | None = None
    option: str = ""
    is_at_loopback: bool = False


def decided(
    snapshot: Snapshot, keys: Iterable[Key], now: float, backend: Backend | None = None
) -> dict[Key, Decision]:
    """What is decided about those of some rules that have mode=auto. With ``backend``, targets that run are
    asked where their servers listen, all at once.
    """
    inventory, found = snapshot.inventory, dict[Key, Decision]()
    for key in keys:
        named = snapshot.stored.get(key)
        if isinstance(named, NamedRule) and named.rule.mode is Mode.AUTO:
            found[key] = _decided(named, inventory, now)
    if backend is not None:
        # Of a range, the first port stands for all.
        asked = [
            (key, f"{proto}.{decision.rule.target_ports.first}")
            for key, decision in found.items()
            if decision.rule.mode is Mode.NFT
            and inventory.qubes[key[0]].is_running
            and inventory.offers(key[0])
            for proto in decision.rule.proto.each
        ]
        answers = at_once(lambda each: _is_at_loopback(each[0][0], each[1], backend), asked)
        for key in {key for (key, _), is_at_loopback in answers.items() if is_at_loopback}:
            found[key] = Decision(replace(found[key].rule, mode=Mode.QREXEC), is_at_loopback=True)
    return found


def _decided(named: NamedRule, inventory: Inventory, now: float) -> Decision:
    """By what dom0 knows itself."""
    rule = named.rule
    over_qrexec = replace(rule, mode=Mode.QREXEC)
    options = {
        "proxy": rule.proxy is not Proxy.OFF,
        "transport": rule.transport is not Transport.AUTO,
        "autostart": rule.autostart,
    }
    if option := next((option for option, is_given in options.items() if is_given), ""):
        return Decision(over_qrexec, option=option)
    by_nft = replace(rule, mode=Mode.NFT)
    forward = checks.judged(named._replace(rule=by_nft), inventory, now, ())
    against = next((stop for stop in forward.stops if stop.cause.state is State.REFUSED), None)
    return Decision(by_nft) if against is None else Decision(over_qrexec, against)


def _is_at_loopback(target: QubeName, argument: str, backend: Backend) -> bool:
    """Whether the target says that its server listens at loopback alone, where no packets get to."""
    try:
        trial = ask_status(backend, target, argument, _TIMEOUT_S).trial
    except AnswerError:
        return False
    return trial is not None and trial.reason == Refusal.LOOPBACK
