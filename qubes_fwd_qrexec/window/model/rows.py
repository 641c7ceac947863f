# SPDX-License-Identifier: GPL-2.0-or-later
"""The rules as the list shows them: those that a filter lets through, by target, at a time."""

from collections.abc import Callable, Iterator
from enum import Enum, auto
from itertools import groupby
from typing import NamedTuple

from qubes_fwd_qrexec.admin.states import Key, State
from qubes_fwd_qrexec.admin.views.render import Role
from qubes_fwd_qrexec.common.values import QubeName

from .entries import Entry
from .look import Look
from .words import _

Item = QubeName | Key
"""A group by its qube, or a rule."""


class Row(NamedTuple):
    """One rule, in words that need no colour.

    ``mark`` is what it is: OPEN, CLOSED ... ``at`` is where it is exposed, ``mode`` how its traffic travels,
    ``to`` where it gets to. ``role`` is that of the qube that was asked for. ``note`` says what the mark
    alone does not. ``is_live``: it is open, will open by itself, or is still in force. ``is_anybody``: it
    lets in anybody, or what is in force does.
    """

    key: Key
    state: State
    mark: str
    who: str
    at: str
    mode: str
    to: str
    ends: str
    comment: str
    role: str
    is_anybody: bool
    is_live: bool
    note: str = ""


class Group(NamedTuple):
    """The rules of one target, with its label, icon and netvms; for ENDED, those that have ended."""

    qube: QubeName
    label: str
    icon: str
    netvms: str
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


_SHOWS: dict[Show, Callable[[Entry], bool]] = {
    Show.ALL: lambda entry: True,
    Show.OPEN: lambda entry: entry.is_live,
    Show.WAITING_FOR_YOU: lambda entry: entry.cause.state is State.SUSPENDED,
    Show.CLOSED: lambda entry: not entry.is_live,
}
ENDED = QubeName("")
"""Stands for the group of the rules that have ended."""
ALL = Filter()
SOON_S = 120.0
"""From so long before the end of a rule on, the time that is left is told in seconds."""


def groups(look: Look, wanted: Filter = ALL, now: float | None = None) -> Iterator[Group]:
    """The rules that are wanted, by targets; those that have ended come last, in one group. Each group is
    made when it is asked for.
    """
    now = look.now if now is None else now
    fits, words = _SHOWS[wanted.show], wanted.text.casefold().split()
    roles = _roles()
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
                mark=entry.mark,
                who=entry.who,
                at=entry.at,
                mode=entry.mode,
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
    return Group(target, qube.label, qube.icon, " - ".join(inventory.chain(target).qubes), rows)


def qubes(look: Look) -> list[QubeName]:
    """Those that any forward passes, sorted."""
    return sorted({QubeName(qube) for entry in look.entries.rules for qube in entry.roles})


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
