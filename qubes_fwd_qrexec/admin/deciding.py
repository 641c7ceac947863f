# SPDX-License-Identifier: GPL-2.0-or-later
"""What mode=auto becomes: decided once, when somebody adds, changes or confirms a rule, and stored.

Packets go by nft where nothing is against it: it is faster, and it is the only mode for UDP. Whatever is
stored undecided goes over qrexec, so that no update opens an IP path by itself.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.common.report import REPORT_MAX_BYTES, QubeReport, ReportError
from qubes_fwd_qrexec.common.rules import ForwardRule, Mode, NamedRule, Proto, Proxy, Transport
from qubes_fwd_qrexec.common.services import STATUS_SERVICE

from . import checks
from .answers import AnswerError
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
    asked where their servers listen.
    """
    rules = ((key, snapshot.stored.get(key)) for key in keys)
    return {
        key: _decided(named, snapshot.inventory, now, backend)
        for key, named in rules
        if isinstance(named, NamedRule) and named.rule.mode is Mode.AUTO
    }


def _decided(named: NamedRule, inventory: Inventory, now: float, backend: Backend | None) -> Decision:
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
    if rule.proto is Proto.UDP:
        return Decision(by_nft)
    is_at_loopback = against is None and backend is not None and _is_at_loopback(named, inventory, backend)
    if against is not None or is_at_loopback:
        return Decision(replace(rule, mode=Mode.QREXEC), against, is_at_loopback=is_at_loopback)
    return Decision(by_nft)


def _is_at_loopback(named: NamedRule, inventory: Inventory, backend: Backend) -> bool:
    """Whether the target says that its server listens at loopback addresses alone, where no packets get to.
    If it lies, only its own forward goes the other way.
    """
    if not inventory.qubes[named.target].is_running or not inventory.offers(named.target):
        return False
    # Of a range, the first port stands for all.
    service = f"{STATUS_SERVICE}+{named.rule.proto}.{named.rule.target_ports.first}"
    try:
        untrusted_answer = backend.ask(named.target, service, REPORT_MAX_BYTES, _TIMEOUT_S)
        trial = QubeReport.parse(untrusted_answer).trial
    except (AnswerError, ReportError):
        return False
    return trial is not None and trial.reason == Refusal.LOOPBACK
