# SPDX-License-Identifier: GPL-2.0-or-later
"""Words for what qubes do not confirm of forwards by nft.

A forward is closed when one qube of its path has closed it, so it counts as open only if none has said so.
What a change took away of it counts as open if no qube that was told of that has the new entry in force.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress

from qubes_fwd_qrexec.admin.apply import Outcome
from qubes_fwd_qrexec.admin.confirming import Lack, Place, Unconfirmed, lost, unconfirmed, wanted
from qubes_fwd_qrexec.common.errors import ConfigError
from qubes_fwd_qrexec.common.nftconfig import Loss, NftConfig, is_nft_key, parse_nft_key
from qubes_fwd_qrexec.common.nftreport import Why

from .session import Session
from .tables import escaped

_LACKS: dict[str, str] = {
    Lack.STILL_IN_FORCE: "does not say that it is closed",
    Lack.DRAINS: "lets its connections go on for up to an hour, because of on-expire=drain",
    Lack.NOT_IN_FORCE: "does not have it in force",
    Lack.OTHER_IN_FORCE: "has another entry of it in force, which may let in more",
    Lack.NO_WORD: "does not say what it has of it in force",
    Lack.NO_FAMILY: "forwards no {said}; if {said} was switched on since it started, restart it",
    Lack.NO_SERVICE: "does not have qubes-fwd-qrexec, or was started before its template had it",
    Lack.NO_ANSWER: "does not answer",
    Why.NO_TABLE: "has no Qubes firewall to let it through",
    Why.OVER: "says that it has expired; is its clock right?",
    Why.FAILED: "cannot put it in force",
}


def words(doubt: Unconfirmed) -> str:
    """What a qube does not confirm, and why."""
    about = f"{name(doubt.key)}: " if doubt.key else ""
    return f"{about}{lack(doubt)}"


def lack(doubt: Unconfirmed) -> str:
    """The same, if it is clear which forward it is about."""
    said = _LACKS[doubt.lack].format(said=doubt.said)
    because = f": {escaped(doubt.said)}" if doubt.said and doubt.said not in said else ""
    return f"{doubt.qube} {said}{because}"


def name(key: str) -> str:
    """The rule that an entry is about, as users write it."""
    try:
        return " ".join(parse_nft_key(key))
    except ConfigError:
        return ascii(key)


Told = Mapping[Place, str | None]


def still_open(doubts: Collection[Unconfirmed], told: Told, before: Told) -> tuple[Unconfirmed, ...]:
    """Those of forwards that were to be closed, or to let in less, and that no qube of their path says do.
    ``before`` is what qubes had been told.

    What goes on for a while because its rule says so is none of them.
    """
    by_place = {(doubt.qube, doubt.key): doubt for doubt in doubts}
    closed, taken = set[str](), dict[str, frozenset[Loss]]()
    for place, value in told.items():
        doubt, key = by_place.get(place), place[1]
        if not is_nft_key(key) or (doubt is not None and (doubt.may_have_other or not doubt.is_opening)):
            continue
        if wanted(key, value) is None:
            closed.add(key)
        else:
            taken[key] = taken.get(key, frozenset()) | lost(key, before.get(place), value)
    found = []
    for doubt in doubts:
        if doubt.is_opening:
            place = doubt.qube, doubt.key
            left = _lost(doubt, told.get(place), before.get(place))
            is_open = not left <= taken.get(doubt.key, frozenset()) - {Loss.WAY}
        else:
            is_open = doubt.lack != Lack.DRAINS and doubt.key not in closed
        if is_open:
            found.append(doubt)
    return tuple(found)


def _lost(doubt: Unconfirmed, value: str | None, was: str | None) -> frozenset[Loss]:
    """In what a qube that does not have its entry in force may let in more."""
    if not doubt.may_have_other:
        return frozenset()
    if doubt.digest is not None and doubt.digest != _digest(doubt.key, was):
        return frozenset(Loss)  # by an entry that nobody knows
    return lost(doubt.key, was, value)


def _digest(key: str, was: str | None) -> str | None:
    with suppress(ConfigError):
        return None if was is None else NftConfig.parse(key, was).digest
    return None


def let_in(doubt: Unconfirmed, before: Told) -> str:
    """What a qube may still let in by what it was told before; empty if that is not known."""
    was = before.get((doubt.qube, doubt.key))
    if was is None or doubt.digest not in (None, _digest(doubt.key, was)):
        return ""
    try:
        old = NftConfig.parse(doubt.key, was)
    except ConfigError:
        return ""
    protos = " and ".join(old.proto.each)
    return f"it may still let in {old.sources} to {protos} port {old.listen_ports.brief()}"


def silent(doubts: Collection[Unconfirmed], told: Told) -> list[Unconfirmed]:
    """The doubts about all of a qube as doubts about its forwards, where no other qube has closed those."""
    paths: dict[str, list[Unconfirmed | None]] = {}
    for qube, key in told:
        if is_nft_key(key):
            doubt = next((doubt for doubt in doubts if doubt.qube == qube), None)
            paths.setdefault(key, []).append(doubt)
    found = [doubt for doubt in doubts if doubt.key]
    for key, path in paths.items():
        if all(path):
            found += [doubt._replace(key=key) for doubt in path if doubt is not None and not doubt.key]
    return found


def ways_out(doubts: Iterable[Unconfirmed]) -> list[str]:
    """The commands that cut off the targets of forwards that nobody has closed."""
    targets = sorted({parse_nft_key(doubt.key)[0] for doubt in doubts if doubt.key})
    return [f"qvm-prefs {target} netvm ''" for target in targets]


def check(outcome: Outcome, session: Session) -> bool:
    """Ask the qubes that were told something; see `warn`."""
    return warn(unconfirmed(outcome.told, session.backend), outcome.told, outcome.before, session)


def warn(doubts: Collection[Unconfirmed], told: Told, before: Told, session: Session) -> bool:
    """Warn of doubts about what qubes were told. Returns whether all that was to be closed is closed."""
    for line in lines(doubts, told, before):
        session.warn(line)
    return not still_open(doubts, told, before)


def lines(doubts: Collection[Unconfirmed], told: Told, before: Told) -> Iterator[str]:
    """What qubes do not confirm, and what helps, for people."""
    left = still_open(doubts, told, before)
    for doubt in doubts:
        more = let_in(doubt, before) if doubt in left else ""
        yield f"{'still open: ' if doubt in left else 'note: '}{words(doubt)}{more and '; '}{more}"
    for key in dict.fromkeys(doubt.key for doubt in doubts if doubt.is_opening):
        yield f"'qvm-forward diagnose {name(key)}' says what helps"
    for command in ways_out(left):
        yield f"'{command}' closes it whatever the qubes of its path do"
