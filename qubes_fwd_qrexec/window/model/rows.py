# SPDX-License-Identifier: GPL-2.0-or-later
"""What the list of rules shows, and the sentence above it: how much is open, and to whom."""

from collections.abc import Callable, Iterator
from enum import Enum, auto
from itertools import groupby
from typing import NamedTuple

from qubes_fwd_qrexec.admin.states import Key, State
from qubes_fwd_qrexec.admin.views.render import Role
from qubes_fwd_qrexec.common.values import QubeName

from .entries import Entry
from .inforce import Force
from .look import Look
from .words import _, ngettext

Item = QubeName | Key
"""A group by its qube, or a rule."""


class Row(NamedTuple):
    """One rule, in words that need no colour.

    ``mark`` is what it is: OPEN, CLOSED ... ``at`` is where it is exposed, ``way`` how its traffic travels,
    ``to`` where it gets to. ``role`` is that of the qube that was asked for. ``note`` says what the mark
    alone does not. ``is_live``: it is open, will open by itself, or is still in force. ``is_anybody``: it
    lets in anybody, or what is in force does.
    """

    key: Key
    state: State
    mark: str
    who: str
    at: str
    way: str
    to: str
    ends: str
    comment: str
    role: str
    is_anybody: bool
    is_live: bool
    note: str = ""


class Group(NamedTuple):
    """The rules of one target, with its label, icon and netvms; without a qube, those whose time is over."""

    qube: QubeName
    label: str
    icon: str
    chain: str
    rows: tuple[Row, ...]


class Show(Enum):
    """Which rules are shown: all, those that are live, that wait for the user's word, that are closed."""

    ALL = auto()
    OPEN = auto()
    WAITING_FOR_YOU = auto()
    CLOSED = auto()


class Filter(NamedTuple):
    """Which rules are shown: by state, those that pass ``qube``, and those that say each word of ``text``."""

    show: Show = Show.ALL
    qube: QubeName | None = None
    text: str = ""


class Tone(Enum):
    """The worst that the summary says. UNKNOWN: more may be open than is known."""

    CLOSED = auto()
    OPEN = auto()
    ANYBODY = auto()
    HELD = auto()
    UNKNOWN = auto()


class Summary(NamedTuple):
    """How much is open. ``asks`` are the forwards that wait for the user's word."""

    text: str
    tone: Tone
    asks: int


_SHOWS: dict[Show, Callable[[Entry], bool]] = {
    Show.ALL: lambda entry: True,
    Show.OPEN: lambda entry: entry.is_live,
    Show.WAITING_FOR_YOU: lambda entry: entry.cause.state is State.SUSPENDED,
    Show.CLOSED: lambda entry: not entry.is_live,
}
ENDED = QubeName("")
"""Stands for the group of the rules whose time is over."""


ALL = Filter()
SOON_S = 120.0
"""From so long before the end of a rule on, the time that is left is told in seconds."""


def groups(look: Look, wanted: Filter = ALL, now: float | None = None) -> Iterator[Group]:
    """The rules that are wanted, by targets; those whose time is over come last, in one group. Each group is
    made when it is asked for.
    """
    now = look.now if now is None else now
    fits, words = _SHOWS[wanted.show], wanted.text.casefold().split()
    marks, roles = _marks(), _roles()
    ended: list[Row] = []
    for target, entries in groupby(look.entries.rules, lambda entry: entry.key[0]):
        found: list[Row] = []
        for entry in entries:
            role = None if wanted.qube is None else entry.roles.get(wanted.qube)
            if (wanted.qube is not None and role is None) or not fits(entry):
                continue
            if words and not all(word in entry.searched for word in words):
                continue
            row = Row(
                key=entry.key,
                state=entry.state,
                mark=_mark(entry, marks),
                who=entry.who,
                at=entry.at,
                way=entry.way,
                to=entry.to,
                ends=ends(entry.expire, now, has_ended=entry.has_ended) if entry.at else "",
                comment=entry.comment,
                role="" if role is None else roles[role],
                is_anybody=entry.is_anybody,
                is_live=entry.is_live,
                note=entry.note,
            )
            (ended if entry.state is State.EXPIRED else found).append(row)
        if found:
            yield _group(look, target, tuple(found))
    if ended:
        yield Group(ENDED, "", "", "", tuple(ended))


def _group(look: Look, target: QubeName, rows: tuple[Row, ...]) -> Group:
    inventory = look.snapshot.inventory
    qube = inventory.qubes[target]
    return Group(target, qube.label, qube.icon, " - ".join((target, *inventory.chain(target).qubes)), rows)


def qubes(look: Look) -> list[QubeName]:
    """Those that any forward passes, sorted."""
    return sorted({QubeName(qube) for entry in look.entries.rules for qube in entry.roles})


def mark(state: State) -> str:
    """The word for a state."""
    return _marks()[state]


def mark_of(entry: Entry) -> str:
    """The word for what a rule is, and what is in force of it."""
    return _mark(entry, _marks())


def _marks() -> dict[State, str]:
    return {
        # Translators: the states of a forward, each in a word.
        State.ACTIVE: _("OPEN"),
        State.WAITING: _("WAITING"),
        State.SUSPENDED: _("SUSPENDED"),
        State.EXPIRED: _("ENDED"),
        State.DISABLED: _("CLOSED"),
        State.REFUSED: _("REFUSED"),
        State.BROKEN: _("BROKEN"),
        State.HELD: _("HELD"),
    }


def _mark(entry: Entry, marks: dict[State, str]) -> str:
    if entry.force is Force.STILL:
        return _("STILL OPEN")
    if entry.force is Force.NOT_YET and entry.is_live:
        return _("NOT IN FORCE")
    return _("DENIED") if entry.is_denied else marks[entry.state]


def _roles() -> dict[Role, str]:
    return {
        # Translators: what a qube has to do with a forward.
        Role.TARGET: _("target"),
        Role.EXPOSED: _("exposed"),
        Role.HOP: _("forwards packets"),
        Role.PATH: _("netvm of the target"),
    }


def ends(expire: int | None, now: float, *, has_ended: bool = False) -> str:
    """When a rule ends, or how long ago it has; times are UNIX seconds."""
    if expire is None:
        return _("no end")
    left_s = int(expire - now)
    if has_ended and left_s > 0:
        return _("ended")
    is_over, amount_s = left_s <= 0, abs(left_s)
    if not is_over and amount_s < SOON_S:
        count, text = amount_s, _("ends in {count} s")
    elif amount_s < 2 * 3600:
        count, text = (
            round(amount_s / 60),
            _("ended {count} min ago") if is_over else _("ends in {count} min"),
        )
    elif amount_s < 2 * 86400:
        count, text = round(amount_s / 3600), _("ended {count} h ago") if is_over else _("ends in {count} h")
    else:
        count = round(amount_s / 86400)
        text = _("ended {count} days ago") if is_over else _("ends in {count} days")
    return text.format(count=count)


class _Count(NamedTuple):
    """Sums over all rules; those of ``still`` and ``otherwise`` are forwards, as is ``pending``."""

    ports: int
    anybody: int
    waiting: int
    asks: int
    pending: int
    otherwise: int
    still: int
    denied: int


def summary(look: Look | None, trouble: str | None = None) -> Summary:
    """How much is open, and to whom; never that nothing is, where something else may be. In ``trouble`` the
    look may be old.
    """
    if look is None:
        return Summary(_("What is open is unknown."), Tone.UNKNOWN, 0)
    if trouble is not None:
        was = summary(look)
        text = _("What is open is unknown. Last known: {summary}").format(summary=was.text)
        return Summary(text, Tone.UNKNOWN, was.asks)
    count, is_unread = _counted(look), bool(look.snapshot.problems)
    is_unsure = is_unread or count.still > 0 or count.otherwise > 0
    return Summary(
        " ".join(_sentences(count, is_held=look.plan.is_held, is_unread=is_unread, is_unsure=is_unsure)),
        _tone(count, is_held=look.plan.is_held, is_unsure=is_unsure),
        count.asks,
    )


def _counted(look: Look) -> _Count:
    rules, orphans = look.entries
    return _Count(
        ports=sum(e.ports for e in rules) + sum(sum(o.ports.values()) for o in orphans),
        anybody=sum(e.ports for e in rules if e.is_anybody)
        + sum(sum(o.ports.values()) for o in orphans if o.is_anybody),
        waiting=sum(e.waiting for e in rules),
        asks=sum(e.cause.state is State.SUSPENDED for e in rules),
        pending=sum(e.force is Force.NOT_YET and e.is_live for e in rules),
        otherwise=sum(e.force is Force.OTHERWISE for e in rules),
        still=sum(e.force is Force.STILL for e in rules) + sum(o.force is Force.STILL for o in orphans),
        denied=sum(e.is_denied for e in rules),
    )


def _tone(count: _Count, *, is_held: bool, is_unsure: bool) -> Tone:
    if count.anybody:
        return Tone.ANYBODY
    if is_unsure:
        return Tone.UNKNOWN
    if is_held:
        return Tone.HELD
    return Tone.OPEN if count.ports else Tone.CLOSED


def _sentences(count: _Count, *, is_held: bool, is_unread: bool, is_unsure: bool) -> Iterator[str]:
    if is_held:
        yield _("Everything is held.")
    if count.ports:
        yield _open(count)
    elif not is_unsure and not is_held:
        yield _("Nothing is open.")
    if count.waiting:
        text = ngettext(
            "{count} port opens when a halted qube starts.",
            "{count} ports open when halted qubes start.",
            count.waiting,
        )
        yield text.format(count=count.waiting)
    if count.still:
        text = ngettext(
            "{count} forward should be closed and is still in force.",
            "{count} forwards should be closed and are still in force.",
            count.still,
        )
        yield text.format(count=count.still)
    if count.otherwise:
        text = ngettext(
            "{count} forward is in force as it was before, and may let in more.",
            "{count} forwards are in force as they were before, and may let in more.",
            count.otherwise,
        )
        yield text.format(count=count.otherwise)
    if count.pending:
        text = ngettext(
            "{count} forward is not in force yet.", "{count} forwards are not in force yet.", count.pending
        )
        yield text.format(count=count.pending)
    if count.denied:
        text = ngettext(
            "dom0 denies the calls of {count} forward.",
            "dom0 denies the calls of {count} forwards.",
            count.denied,
        )
        yield text.format(count=count.denied)
    if is_unread:
        yield _("Not everything could be read, so more may be open.")
    if count.asks:
        text = ngettext(
            "{count} forward needs your decision.",
            "{count} forwards need your decision.",
            count.asks,
        )
        yield text.format(count=count.asks)


def _open(count: _Count) -> str:
    ports, anybody = count.ports, count.anybody
    if not anybody:
        text = ngettext("{count} port is open.", "{count} ports are open.", ports)
    elif anybody == ports:
        text = ngettext("{count} port is open, to anybody.", "{count} ports are open, all to anybody.", ports)
    else:
        text = ngettext(
            "{count} port is open, {anybody} to anybody.",
            "{count} ports are open, {anybody} of them to anybody.",
            ports,
        )
    return text.format(count=ports, anybody=anybody)
