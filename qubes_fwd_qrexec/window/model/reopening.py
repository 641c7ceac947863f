# SPDX-License-Identifier: GPL-2.0-or-later
"""What would open again if the hold were lifted, shown before the user agrees to that."""

from collections.abc import Iterator
from typing import NamedTuple

from qubes_fwd_qrexec.admin.states import Cause, Plan
from qubes_fwd_qrexec.admin.views import reasons
from qubes_fwd_qrexec.admin.views.tables import escaped, shortened
from qubes_fwd_qrexec.admin.views.times import print_time

from .look import Look
from .words import _, ngettext

SHOWN_MAX = 100
"""Of more forwards than that, the others are counted."""
_LINE_MAX = 500


class Reopening(NamedTuple):
    """The plan that the user agrees to, and what it opens, in words; what it opens to anybody comes first."""

    plan: Plan
    head: str
    lines: tuple[str, ...]
    is_anybody: bool


def reopening(look: Look, now: float) -> Reopening | None:
    """None if nothing is held. It takes a while."""
    if not look.plan.is_held:
        return None
    planned = look.snapshot.plan(now, is_held=False, known=look.plan)
    count = len(planned.live)
    anybody = sum(forward.finding(Cause.ANYBODY) is not None for forward in planned.live)
    head = ngettext("{count} forward opens again.", "{count} forwards open again.", count).format(count=count)
    if anybody:
        more = ngettext("{count} of them to anybody.", "{count} of them to anybody.", anybody)
        more = more.format(count=anybody)
        head = f"{head} {more}"
    return Reopening(planned, head if count else _("Nothing opens."), tuple(_lines(planned)), anybody > 0)


def _lines(planned: Plan) -> Iterator[str]:
    live = sorted(planned.live, key=lambda forward: forward.finding(Cause.ANYBODY) is None)
    for forward in live[:SHOWN_MAX]:
        sentence = shortened(escaped(f"{forward.named}: {reasons.sentence(forward)}"), _LINE_MAX)
        yield f"{sentence} {end(forward.named.rule.expire)}"
    if (more := len(live) - SHOWN_MAX) > 0:
        yield ngettext("and {count} more", "and {count} more", more).format(count=more)


def end(expire: int | None) -> str:
    """A sentence about until when a rule is open, in UNIX seconds."""
    if expire is None:
        return _("It stays open until you end it.")
    return _("It ends at {time}.").format(time=print_time(expire))
