# SPDX-License-Identifier: GPL-2.0-or-later
"""Words for what qubes do not confirm of forwards by nft.

A forward is closed when one qube of its path has closed it. So it counts as open only if none has said so.
"""

from collections.abc import Collection, Iterable, Mapping

from qubes_fwd_qrexec.admin.apply import Outcome
from qubes_fwd_qrexec.admin.confirming import Lack, Place, Unconfirmed, is_nft, unconfirmed, wanted
from qubes_fwd_qrexec.admin.inventory import CONFIG_PREFIX
from qubes_fwd_qrexec.common.errors import ConfigError
from qubes_fwd_qrexec.common.nftconfig import parse_nft_key
from qubes_fwd_qrexec.common.nftreport import Why

from .session import Session
from .tables import escaped

_LACKS: dict[str, str] = {
    Lack.STILL_IN_FORCE: "does not say that it is closed",
    Lack.DRAINS: "lets its connections go on for up to an hour, because of on-expire=drain",
    Lack.NOT_IN_FORCE: "does not have it in force",
    Lack.NO_FAMILY: "forwards no {said}; if {said} was switched on since it started, restart it",
    Lack.NO_SERVICE: "does not have qubes-fwd-qrexec, or was started before its template had it",
    Lack.NO_ANSWER: "does not answer",
    Why.NO_TABLE: "has no firewall of Qubes to let it through",
    Why.OVER: "says that its time is over; is its clock right?",
    Why.FAILED: "cannot put it in force",
}


def words(doubt: Unconfirmed) -> str:
    """What a qube does not confirm, and why."""
    about = f"{name(doubt.key)}: " if doubt.key else ""
    return f"{about}{lack(doubt)}"


def lack(doubt: Unconfirmed) -> str:
    """The same where it is clear which forward it is about."""
    said = _LACKS[doubt.lack].format(said=doubt.said)
    because = f": {escaped(doubt.said)}" if doubt.said and doubt.said not in said else ""
    return f"{doubt.qube} {said}{because}"


def name(key: str) -> str:
    """The rule that an entry is about, as users write it."""
    try:
        return " ".join(parse_nft_key(key))
    except ConfigError:
        return ascii(key)


def still_open(doubts: Collection[Unconfirmed], told: Mapping[Place, str | None]) -> tuple[Unconfirmed, ...]:
    """Those of forwards that were to be closed, and that no qube of their path says are closed. What goes on
    for a while because its rule says so is none of them.
    """
    doubted = {(doubt.qube, doubt.key) for doubt in doubts}
    closed = {
        key
        for place, value in told.items()
        if is_nft(place) and wanted(place, value) is None
        if (place[0], key := place[1].removeprefix(CONFIG_PREFIX)) not in doubted
    }
    left = (doubt for doubt in doubts if not doubt.is_opening and doubt.lack != Lack.DRAINS)
    return tuple(doubt for doubt in left if doubt.key not in closed)


def silent(doubts: Collection[Unconfirmed], told: Mapping[Place, str | None]) -> list[Unconfirmed]:
    """The doubts about all of a qube as doubts about its forwards, where no other qube has closed those."""
    paths: dict[str, list[Unconfirmed | None]] = {}
    for qube, feature in filter(is_nft, told):
        doubt = next((doubt for doubt in doubts if doubt.qube == qube), None)
        paths.setdefault(feature.removeprefix(CONFIG_PREFIX), []).append(doubt)
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
    """Ask the qubes that were told something, and warn of what they do not confirm. Returns whether all that
    was to be closed is closed.
    """
    return warn(unconfirmed(outcome.told, session.backend), outcome.told, session)


def warn(doubts: Collection[Unconfirmed], told: Mapping[Place, str | None], session: Session) -> bool:
    """Warn of doubts about what qubes were told. Returns whether all that was to be closed is closed."""
    left = still_open(doubts, told)
    for doubt in doubts:
        session.warn(f"{'still open: ' if doubt in left else 'note: '}{words(doubt)}")
    for key in dict.fromkeys(doubt.key for doubt in doubts if doubt.is_opening):
        session.warn(f"'qvm-forward diagnose {name(key)}' says what helps")
    for command in ways_out(left):
        session.warn(f"'{command}' closes it whatever the qubes of its path do")
    return not left
