# SPDX-License-Identifier: GPL-2.0-or-later
"""What the desktop is told of: that a forward opens, ends by itself, is suspended or closed, and a hold.

It is found by comparing two looks. Who disables or removes a rule knows, and is told nothing.

Gio hands the text of a notification to the desktop's server as it is, and servers such as xfce4-notifyd take
that for markup. Others show it as it is, so that escapes of markup would be seen there. Hence nothing that
any of them takes for markup is in a notice.
"""

from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from itertools import islice
from typing import NamedTuple

from qubes_fwd_qrexec.admin.states import Cause, Forward, Key, State
from qubes_fwd_qrexec.admin.views import reasons
from qubes_fwd_qrexec.admin.views.tables import escaped, shortened
from qubes_fwd_qrexec.admin.views.times import print_time
from qubes_fwd_qrexec.common.rules import BrokenRule

from .board import Later
from .look import Look
from .words import _, ngettext

# An import stores rule after rule: what comes within a second of each other is told at once.
QUIET_S = 1.0
MOST_S = 10.0
NAMED_MAX = 3
"""Of more rules than that, whose state becomes the same, one notice has the number."""
_BODY_MAX = 500


class Notice(NamedTuple):
    """Plain text for a notification; a later one takes the place of that with the same ``id``."""

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
    HELD = "held"


class Change(NamedTuple):
    """A rule of which somebody wants to know; the rule is None where it is about all."""

    kind: Kind
    rule: Forward | BrokenRule | None = None

    @property
    def name(self) -> str:
        """Of the rule, as users write it."""
        return str(self.rule.named if isinstance(self.rule, Forward) else self.rule)

    @property
    def is_to_anybody(self) -> bool:
        return isinstance(self.rule, Forward) and self.rule.finding(Cause.ANYBODY) is not None


_OPEN, _LIVE = (Kind.OPEN, Kind.WAITING), (Kind.OPEN, Kind.WAITING, Kind.DENIED)
_KINDS = {State.WAITING: Kind.WAITING, State.SUSPENDED: Kind.SUSPENDED, State.EXPIRED: Kind.ENDED}
_KINDS |= {State.REFUSED: Kind.CLOSED}


def changes(before: Look, after: Look) -> Iterator[Change]:
    """What became of each rule between two looks."""
    if after.plan.is_held:
        if not before.plan.is_held:
            yield Change(Kind.HELD)
        return
    old = {forward.named[:2]: forward for forward in before.plan}
    for forward in after.plan:
        kind, was = _kind(forward, after.denials), old.get(forward.named[:2])
        was_kind = None if was is None else _kind(was, before.denials)
        if kind in _LIVE:
            is_new = kind != was_kind or (was is not None and _opening(was) != _opening(forward))
            # That a qube of it was halted is not told.
            if is_new and not (kind is Kind.WAITING and was_kind in _LIVE):
                yield Change(kind, forward)
        elif kind is not None and was_kind in _LIVE:
            yield Change(kind, forward)
    for rule in after.plan.broken:
        was = before.plan.find(rule.target, rule.name)
        if was is not None and was.is_live:
            yield Change(Kind.CLOSED, rule)


def _kind(forward: Forward, denials: Mapping[Key, str]) -> Kind | None:
    if forward.state is State.ACTIVE:
        return Kind.DENIED if forward.named[:2] in denials else Kind.OPEN
    return _KINDS.get(forward.state)


def _opening(forward: Forward) -> tuple[object, ...]:
    """Who gets where by a forward."""
    rule = forward.named.rule
    where = forward.exposed, forward.side, rule.listen, rule.listen_ports
    return *where, rule.sources, rule.target_ports, rule.proto


def notices(found: list[Change], look: Look) -> Iterator[Notice]:
    """How to tell changes after which the look was taken: many of one kind in one notice."""
    # What is due is done at once where `watch` runs.
    is_due = bool(look.due) and look.watch_start is not None
    tail = _("Not all of this is in force: 'qvm-forward watch' does not run.") if is_due else ""
    for kind in Kind:
        some = list({change.name: change for change in found if change.kind is kind}.values())
        if len(some) > NAMED_MAX:
            yield _notice(f"{kind}", _title_of_many(kind, len(some)), _names(some), tail, some)
        else:
            for each in some:
                yield _notice(each.name, _title(each), _body(each, look), tail, [each])


def _notice(about: str, title: str, body: str, tail: str, some: list[Change]) -> Notice:
    is_alarming = any(change.kind in _OPEN and change.is_to_anybody for change in some)
    body = shortened(_plain(body), _BODY_MAX)
    return Notice(about, _plain(title), f"{body} {tail}".rstrip(), is_alarming)


def _plain(text: str) -> str:
    """Without what a server may take for markup."""
    return text.replace("&", r"\x26").replace("<", r"\x3c").replace(">", r"\x3e")


def _title(change: Change) -> str:
    if change.kind is Kind.HELD:
        return _("Everything is held")
    name = escaped(change.name)
    if change.kind is Kind.OPEN and change.is_to_anybody:
        return _("{rule} is open to anybody").format(rule=name)
    if change.kind is Kind.WAITING and change.is_to_anybody:
        return _("{rule} will be open to anybody").format(rule=name)
    titles = {
        Kind.OPEN: _("{rule} is open"),
        Kind.WAITING: _("{rule} will be open"),
        Kind.DENIED: _("{rule} is denied by dom0"),
        Kind.ENDED: _("{rule} has ended"),
        Kind.SUSPENDED: _("{rule} is suspended"),
        Kind.CLOSED: _("{rule} is closed"),
    }
    return titles[change.kind].format(rule=name)


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
    }
    return titles[kind].format(count=count)


def _names(some: list[Change]) -> str:
    """Which they are, and how many of them are open to anybody."""
    names = ", ".join(escaped(change.name) for change in islice(some, NAMED_MAX))
    more = len(some) - NAMED_MAX
    text = ngettext("{names} and {count} more.", "{names} and {count} more.", more)
    text = text.format(names=names, count=more)
    if some[0].kind in _OPEN and (count := sum(change.is_to_anybody for change in some)):
        anybody = ngettext("{count} of them to anybody.", "{count} of them to anybody.", count)
        text = f"{anybody.format(count=count)} {text}"
    return text


def _body(change: Change, look: Look) -> str:
    rule = change.rule
    if rule is None:
        return _("Nothing opens any more until you resume. The rules are kept as they are.")
    if isinstance(rule, BrokenRule):
        return _("Its rule cannot be read: {problem}").format(problem=escaped(rule.problem))
    if change.kind is Kind.ENDED:
        return _("Its time is over, and nobody new can connect.")
    if change.kind is Kind.DENIED:
        return escaped(look.denials.get(rule.named[:2], ""))
    if rule.cause is Cause.NETVM_CHANGED:
        moved = escaped(reasons.filled("{moved}.", rule, rule.decisive))
        closed = _("It stays closed until you confirm it.")
        return f"{moved} {closed}"
    sentence = escaped(reasons.sentence(rule))
    return f"{sentence} {_end(rule)}" if change.kind in _OPEN else sentence


def _end(forward: Forward) -> str:
    expire = forward.named.rule.expire
    if expire is None:
        return _("It stays open until you end it.")
    return _("It ends at {time}.").format(time=print_time(expire))


class Notifier:
    """Sends notices of what changes from look to look, when it has been quiet for a second."""

    def __init__(self, send: Callable[[Notice], None], later: Later) -> None:
        self._send = send
        self._later = later
        self._last: Look | None = None
        self._found: list[Change] = []
        self._cancels: list[Callable[[], None]] = []

    def looked(self, look: Look) -> None:
        """There is a look. Of the first nothing is told."""
        before, self._last = self._last, look
        found = [] if before is None else list(changes(before, look))
        if not found:
            return
        if not self._found:
            self._cancels = [self._later(MOST_S, self._tell)]
        self._found += found
        for cancel in self._cancels[1:]:
            cancel()
        self._cancels[1:] = [self._later(QUIET_S, self._tell)]

    def _tell(self) -> None:
        for cancel in self._cancels:
            cancel()
        found, self._found, self._cancels = self._found, [], []
        if self._last is not None:
            for notice in notices(found, self._last):
                self._send(notice)
