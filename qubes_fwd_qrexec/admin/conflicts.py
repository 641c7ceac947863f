# SPDX-License-Identifier: GPL-2.0-or-later
"""Who has which port: the claims of live forwards, of which the earlier one stands.

Two forwards conflict that would listen at one address and port of a qube, or that share a line of
dom0's policy and ask different things of it.

A forward that is not live may become so without anybody's word: its netvm returns, or the mark of a tunnel
goes. Then it claims its port, so whoever makes another one for that port is told before: `rivals`.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from qubes_fwd_qrexec.rules import ForwardType
from qubes_fwd_qrexec.values import IPAddress, QubeName

from . import policy
from .states import Cause, Forward, Plan


class _Ports(NamedTuple):
    """A claim to ports; numbers first, as with a thousand rules almost all comparisons end there."""

    first: int
    last: int
    addresses: tuple[IPAddress, ...]
    forward: Forward


class Claims:
    """What the forwards that were taken hold, by the qube that listens and by the call that they make."""

    def __init__(self) -> None:
        self._ports: dict[str | None, list[_Ports]] = {}
        self._calls: dict[tuple[object, ...], list[Forward]] = {}

    def take(self, forward: Forward) -> str | None:
        """Let a forward have what it asks for; or say in a sentence which one has it already."""
        rule = forward.source.rule
        ports = self._ports.setdefault(forward.exposed, [])
        claim = _Ports(rule.listen_ports.first, rule.listen_ports.last, rule.listen_addresses, forward)
        calls = self._calls.setdefault((forward.exposed, forward.source.target, forward.service), [])
        problem = _taken(claim, ports) or _torn(forward, calls)
        if problem is None:
            ports.append(claim)
            calls.append(forward)
        return problem


# These come back when somebody says so, and are judged then.
_ASLEEP = frozenset((Cause.CLONED, Cause.EXPIRED, Cause.DISABLED))


def _home(forward: Forward) -> QubeName | None:
    """Where a forward listens, or will when what holds it back has passed; None if that needs a word."""
    rule = forward.source.rule
    if forward.cause in _ASLEEP:
        return None
    if forward.is_live or rule.via is not None:
        return forward.exposed
    agreed = None
    if rule.path:
        agreed = rule.path[-1 if rule.forward_type is ForwardType.EXTERNAL else 0]
    if rule.path is None or rule.follow_netvm:
        return forward.exposed or agreed
    return agreed


def _meet(one: Forward, other: Forward) -> bool:
    """Whether two forwards would claim one port if both were live.

    Two rules of one target that were agreed to for different ways never are: they take turns.
    """
    some, its = one.source.rule, other.source.rule
    home = _home(one)
    if home is None or home != _home(other) or not some.listen_ports.overlaps(its.listen_ports):
        return False
    follows = some.follow_netvm or its.follow_netvm or some.path is None or its.path is None
    if one.source.target == other.source.target and not follows and some.path != its.path:
        return False
    return _overlap(some.listen_addresses, its.listen_addresses)


def rivals(forward: Forward, planned: Iterable[Forward]) -> Iterator[Forward]:
    """The others that would claim a port of this one if both were live, where one of the two is not."""
    for other in planned:
        both_live = forward.is_live and other.is_live
        if not both_live and other.source[:2] != forward.source[:2] and _meet(forward, other):
            yield other


def check_rivals(forward: Forward, planned: Plan, before: Plan | None) -> str | None:
    """A sentence about a rival that was none ``before`` the change, if there is one."""
    old = None if before is None else before.find(*forward.source[:2])
    for rival in rivals(forward, planned):
        its = None if before is None else before.find(*rival.source[:2])
        if old is not None and its is not None and _meet(old, its):
            continue
        port = f"{rival.source.rule.listen_ports.worded()} of {_home(rival)}"
        if rival.is_live:
            what = f"has {port}, to which this one would come back by itself, as it is only {forward.state}"
        else:
            what = f"is {rival.state} now, and comes back to {port} by itself as soon as it may"
        way_out = "take another port or listen address, or remove or disable that rule"
        return f"Rule {rival.source} {what}; {way_out}."
    return None


def _taken(claim: _Ports, others: list[_Ports]) -> str | None:
    first, last = claim.first, claim.last
    for other in others:
        if other.first <= last and first <= other.last and _overlap(claim.addresses, other.addresses):
            taken = other.forward
            return (
                f"Rule {taken.source} has {taken.source.rule.listen_ports.worded()} of {taken.exposed} "
                "already; take another port or listen address, or remove or disable that rule."
            )
    return None


def _torn(forward: Forward, others: list[Forward]) -> str | None:
    for other in others:
        if forward.source.rule.autostart != other.source.rule.autostart and _calls(forward) & _calls(other):
            return (
                f"Rule {other.source} reaches the same port of {other.source.target} from {other.exposed} "
                "and says otherwise about autostart, and dom0's policy cannot tell the two apart; "
                "give both the same autostart."
            )
    return None


def _calls(forward: Forward) -> set[tuple[str, ...]]:
    """Service, argument, source and target of each line of policy; a tunnel's has its whole range."""
    return {tuple(line.split()[:4]) for line in policy.lines(forward)}


def _overlap(some: tuple[IPAddress, ...], others: tuple[IPAddress, ...]) -> bool:
    """Whether two listeners would claim one address; a wildcard claims all of its family, and no other."""
    return any(
        a.version == b.version and (a == b or a.is_unspecified or b.is_unspecified)
        for a in some
        for b in others
    )
