# SPDX-License-Identifier: GPL-2.0-or-later
"""How much is open, and to whom: the sentence above the list, which the indicator says, too."""

from collections.abc import Iterator
from enum import Enum, auto
from typing import NamedTuple

from qubes_fwd_qrexec.admin.states import State

from .inforce import Force
from .look import Look
from .words import _, ngettext


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
