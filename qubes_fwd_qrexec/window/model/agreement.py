# SPDX-License-Identifier: GPL-2.0-or-later
"""What confirming a rule means: what it was approved for, what it would be now, and what that opens."""

from collections.abc import Iterable
from typing import NamedTuple

from qubes_fwd_qrexec.admin.changing import confirmed_rule
from qubes_fwd_qrexec.admin.seen import Seen
from qubes_fwd_qrexec.admin.states import Cause, Forward, Key
from qubes_fwd_qrexec.admin.views import entrance, reasons
from qubes_fwd_qrexec.common.errors import RefusedError
from qubes_fwd_qrexec.common.rules import Mode, NamedRule

from .entries import mark
from .look import Look
from .preview import preview
from .words import _


class Turn(NamedTuple):
    """One thing that the rule is about, as it was when somebody agreed to it, and as it would be."""

    what: str
    was: str
    will_be: str

    @property
    def is_same(self) -> bool:
        return self.was == self.will_be


class Agreement(NamedTuple):
    """What is agreed to. ``opens`` is what follows, with the state; ``is_to_anybody``: it opens to anybody. A
    ``problem`` keeps it from being agreed to; ``seen`` is what a change is based on.
    """

    seen: Seen
    turns: tuple[Turn, ...] = ()
    opens: str = ""
    notes: tuple[str, ...] = ()
    is_to_anybody: bool = False
    problem: str | None = None


def agreement(look: Look, key: Key, now: float) -> Agreement | None:
    """What confirming a rule would mean at the time ``now``, in UNIX seconds; None if it is not there, or
    cannot be read. It takes as long as a plan.
    """
    snapshot, old = look.snapshot, look.snapshot.stored.get(key)
    forward = look.plan.find(*key)
    if forward is None or not isinstance(old, NamedRule):
        return None
    seen = Seen.of(snapshot, key)
    try:
        rule = confirmed_rule(old, snapshot.inventory)
    except RefusedError as error:
        return Agreement(seen, problem=str(error))
    found = preview(snapshot, now, old._replace(rule=rule), look.plan)
    after = found.forward
    problem = None if found.problem is None else reasons.sentence(after, found.problem)
    notes = (*reasons.notes(after), *reasons.hints(after))
    is_to_anybody = after.is_live and rule.sources.anyone
    opens = f"{mark(after.state)}. {reasons.sentence(after)}"
    return Agreement(seen, _turns(forward, after), opens, notes, is_to_anybody, problem)


def _turns(before: Forward, after: Forward) -> tuple[Turn, ...]:
    target, rule = before.named.target, before.named.rule
    moved = before.finding(Cause.NETVM_CHANGED)
    here = entrance.entrance(after.exposed, after.side)
    was_at = here if moved is None else entrance.entrance(moved.qube, moved.side)
    unknown, way = _("not recorded"), str(after.mode)
    if rule.mode is Mode.AUTO:
        way = _("{mode}, unless the server in {qube} asks for the other").format(mode=after.mode, qube=target)
    return (
        Turn(_("Made for"), str(rule.owner or unknown), target),
        Turn(
            _("Netvms of {qube}").format(qube=target),
            unknown if rule.path is None else _path(rule.path),
            _path(after.chain),
        ),
        Turn(_("Exposed at"), was_at, here),
        Turn(_("Who may connect"), ", ".join(entrance.asked(rule)), entrance.let_in(after)),
        Turn(_("Mode"), before.mode, way),
    )


def _path(qubes: Iterable[str]) -> str:
    return " - ".join(qubes) or _("none")
