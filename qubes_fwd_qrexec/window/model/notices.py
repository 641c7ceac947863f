# SPDX-License-Identifier: GPL-2.0-or-later
"""What the desktop is told of: that a forward opens, ends by itself, is suspended or closed, and a hold.

It is found by comparing two looks. Who disables or removes a rule knows, and is told nothing.

Gio hands the text of a notification to the desktop's server as it is, and servers such as xfce4-notifyd take
that for markup. Others show it as it is, so that escapes of markup would be seen there. Hence nothing that
any of them takes for markup is in a notice.
"""

from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from typing import NamedTuple

from qubes_fwd_qrexec.admin.states import Cause, Forward, Key, State
from qubes_fwd_qrexec.admin.views import reasons
from qubes_fwd_qrexec.admin.views.tables import escaped, shortened

from .board import Later
from .entries import Entry
from .inforce import Force
from .look import Look
from .reopening import end
from .words import _, ngettext

# An import stores rule after rule: what comes within a second of each other is told at once.
QUIET_S = 1.0
MOST_S = 10.0
NAMED_MAX = 3
"""Of more rules than that, whose state becomes the same, one notice has the number."""
_BODY_MAX = 500


class Notice(NamedTuple):
    """Plain text for a notification; a later one takes the place of that with the same ``id``. One that
    ``is_alarming`` stays until somebody has seen it, or it is not so any more.
    """

    id: str
    title: str
    body: str
    is_alarming: bool = False


class Kind(StrEnum):
    """What has become of a rule, or of all."""

    OPEN = "open"
    WAITING = "waiting"
    DENIED = "denied"
    ENDED = "ended"
    SUSPENDED = "suspended"
    CLOSED = "closed"
    STILL = "still"
    HELD = "held"


class Change(NamedTuple):
    """What somebody wants to know of a rule; it is None where it cannot be read. Without an entry it is about
    all rules.
    """

    kind: Kind
    entry: Entry | None = None
    rule: Forward | None = None

    @property
    def name(self) -> str:
        """Of the rule, as users write it."""
        return "" if self.entry is None else escaped(" ".join(self.entry.key))

    @property
    def opens_to_anybody(self) -> bool:
        return self.kind in _OPEN and self.entry is not None and self.entry.is_anybody


_OPEN = (Kind.OPEN, Kind.WAITING)
_LIVE = (*_OPEN, Kind.DENIED, Kind.STILL)
_KINDS = {State.ACTIVE: Kind.OPEN, State.WAITING: Kind.WAITING, State.SUSPENDED: Kind.SUSPENDED}
_KINDS |= {State.EXPIRED: Kind.ENDED, State.REFUSED: Kind.CLOSED, State.BROKEN: Kind.CLOSED}


def changes(before: Look, after: Look) -> Iterator[Change]:
    """What became of each rule between two looks."""
    if after.plan.is_held:
        if not before.plan.is_held:
            yield Change(Kind.HELD)
        return
    kinds = {entry.key: _kind(entry) for entry in before.entries.rules}
    olds, news = _by_key(before), _by_key(after)
    for entry in after.entries.rules:
        kind, was = _kind(entry), kinds.get(entry.key)
        old, new = olds.get(entry.key), news.get(entry.key)
        if kind in (Kind.OPEN, Kind.DENIED):
            is_told = kind != was or (old is not None and new is not None and _opening(old) != _opening(new))
        elif kind is Kind.WAITING:
            # That a qube of it was halted is not told.
            is_told = was not in _LIVE
        else:
            is_told = kind != was and was in _LIVE
        if is_told and kind is not None:
            yield Change(kind, entry, new)


def _by_key(look: Look) -> dict[Key, Forward]:
    return {forward.named.key: forward for forward in look.plan}


def _kind(entry: Entry) -> Kind | None:
    """None where it is closed as somebody wants it, or is not in force yet."""
    if entry.force is Force.STILL:
        return Kind.STILL
    if entry.force is Force.NOT_YET and entry.is_live:
        return None
    return Kind.DENIED if entry.is_denied else _KINDS.get(entry.state)


def _opening(forward: Forward) -> tuple[object, ...]:
    """Who gets where by a forward."""
    rule = forward.named.rule
    where = forward.exposed, forward.side, rule.listen, rule.listen_ports
    return *where, rule.sources, rule.target_ports, rule.proto


def notices(found: Iterable[Change], look: Look) -> Iterator[Notice]:
    """How to tell changes, of which the look is the last: many of one kind in one notice."""
    last = {entry.key: entry for entry in look.entries.rules}
    by_kind: dict[Kind, dict[str, Change]] = {kind: {} for kind in Kind}
    for change in found:
        now = None if change.entry is None else last.get(change.entry.key)
        # What should be closed is still in force for a moment, and worth a word only if it stays so.
        if change.kind is not Kind.STILL or (now is not None and _kind(now) is Kind.STILL):
            by_kind[change.kind][change.name] = change._replace(entry=now or change.entry)
    for kind, named in by_kind.items():
        some = [*named.values()]
        if len(some) > NAMED_MAX:
            yield _notice(f"{kind}", _title_of_many(kind, len(some)), _names(some), some)
        else:
            for each in some:
                yield _notice(each.name, _title(each), _body(each), [each])


def _notice(about: str, title: str, body: str, some: list[Change]) -> Notice:
    is_alarming = any(change.kind is Kind.STILL for change in some)
    return Notice(about, _plain(title), shortened(_plain(body), _BODY_MAX), is_alarming)


def _plain(text: str) -> str:
    """Without what a server may take for markup."""
    return text.replace("&", r"\x26").replace("<", r"\x3c").replace(">", r"\x3e")


def _title(change: Change) -> str:
    titles = {
        Kind.OPEN: _("{rule} is open"),
        Kind.WAITING: _("{rule} will be open"),
        Kind.DENIED: _("{rule} is denied by dom0"),
        Kind.ENDED: _("{rule} has ended"),
        Kind.SUSPENDED: _("{rule} is suspended"),
        Kind.CLOSED: _("{rule} is closed"),
        Kind.STILL: _("{rule} is still open"),
        Kind.HELD: _("Everything is held"),
    }
    if change.opens_to_anybody:
        titles[Kind.OPEN] = _("{rule} is open to anybody")
        titles[Kind.WAITING] = _("{rule} will be open to anybody")
    return titles[change.kind].format(rule=change.name)


def _title_of_many(kind: Kind, count: int) -> str:
    titles = {
        Kind.OPEN: ngettext("{count} forward is open", "{count} forwards are open", count),
        Kind.WAITING: ngettext("{count} forward will be open", "{count} forwards will be open", count),
        Kind.DENIED: ngettext(
            "{count} forward is denied by dom0", "{count} forwards are denied by dom0", count
        ),
        Kind.ENDED: ngettext("{count} forward has ended", "{count} forwards have ended", count),
        Kind.SUSPENDED: ngettext("{count} forward is suspended", "{count} forwards are suspended", count),
        Kind.CLOSED: ngettext("{count} forward is closed", "{count} forwards are closed", count),
        Kind.STILL: ngettext("{count} forward is still open", "{count} forwards are still open", count),
    }
    return titles[kind].format(count=count)


def _names(some: list[Change]) -> str:
    """Which they are, and how many of them are open to anybody."""
    names = ", ".join(change.name for change in some[:NAMED_MAX])
    more = len(some) - NAMED_MAX
    text = ngettext("{names} and {count} more.", "{names} and {count} more.", more)
    text = text.format(names=names, count=more)
    if count := sum(change.opens_to_anybody for change in some):
        anybody = ngettext("{count} of them to anybody.", "{count} of them to anybody.", count)
        anybody = anybody.format(count=count)
        text = f"{anybody} {text}"
    return text


def _body(change: Change) -> str:
    rule, entry = change.rule, change.entry
    if entry is None:
        return _("Nothing opens until you resume. The rules are kept as they are.")
    if change.kind is Kind.DENIED:
        return entry.note
    parts = [entry.note]
    if change.kind is Kind.STILL:
        parts.append(_("'qvm-forward apply' closes it."))
    if rule is None:
        parts.append(_("Its rule cannot be read: {problem}").format(problem=entry.comment))
    elif rule.cause is Cause.EXPIRED:
        parts.append(_("It has expired."))
    elif rule.cause is Cause.NETVM_CHANGED:
        parts.append(escaped(reasons.filled("{moved}.", rule, rule.decisive)))
        if change.kind is Kind.SUSPENDED:
            parts.append(_("It stays closed until you confirm it."))
    elif change.kind is not Kind.STILL:
        # Of that the reason would tell how to open it again.
        parts.append(escaped(reasons.sentence(rule)))
    if change.kind in _OPEN and rule is not None:
        parts.append(end(rule.named.rule.expire))
    return " ".join(filter(None, parts))


class Notifier:
    """Sends notices of what changes from look to look, when it has been quiet for a second. Those that alarm
    are withdrawn, by their ids, when there is no reason any more.
    """

    def __init__(self, send: Callable[[Notice], None], withdraw: Callable[[str], None], later: Later) -> None:
        self._send = send
        self._withdraw = withdraw
        self._later = later
        self._last: Look | None = None
        self._found: list[Change] = []
        self._alarms: set[str] = set()
        self._cancels: list[Callable[[], None]] = []

    def looked(self, look: Look) -> None:
        """There is a look. Of the first nothing is told."""
        before, self._last = self._last, look
        self._end_alarms(look)
        found = [] if before is None else list(changes(before, look))
        if not found:
            return
        if not self._found:
            self._cancels = [self._later(MOST_S, self._tell)]
        self._found += found
        for cancel in self._cancels[1:]:
            cancel()
        self._cancels[1:] = [self._later(QUIET_S, self._tell)]

    def _end_alarms(self, look: Look) -> None:
        still = {Change(Kind.STILL, each).name for each in look.entries.rules if _kind(each) is Kind.STILL}
        for about in sorted(self._alarms - still):
            if about != Kind.STILL or not still:
                self._alarms.remove(about)
                self._withdraw(about)

    def _tell(self) -> None:
        for cancel in self._cancels:
            cancel()
        found, self._found, self._cancels = self._found, [], []
        if self._last is not None:
            for notice in notices(found, self._last):
                if notice.is_alarming:
                    self._alarms.add(notice.id)
                self._send(notice)
