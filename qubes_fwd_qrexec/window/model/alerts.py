# SPDX-License-Identifier: GPL-2.0-or-later
"""Alerts: what concerns the whole system, such as a hold, as values for the window's bars."""

from collections.abc import Iterator, Sequence
from enum import Enum, auto
from typing import NamedTuple

from qubes_fwd_qrexec.admin.apply import Kind, Step
from qubes_fwd_qrexec.admin.views import steps
from qubes_fwd_qrexec.admin.views.tables import escaped
from qubes_fwd_qrexec.admin.views.times import local

from .look import Look
from .words import _, ngettext

_LINES_MAX = 4
_CLOSING = (Kind.CLOSE_POLICY, Kind.REMOVE_CONFIG, Kind.REVOKE)


class Way(Enum):
    """What its button does."""

    LOOK = auto()
    RESUME = auto()
    APPLY = auto()


class Alert(NamedTuple):
    """``kind`` is the same as long as it is about the same thing; ``lines`` say more. ``label`` is that of
    the button for ``way``, with a mnemonic.
    """

    kind: str
    text: str
    lines: tuple[str, ...] = ()
    way: Way | None = None
    label: str = ""
    is_bad: bool = False


def alerts(look: Look | None, left: Sequence[str], trouble: str | None) -> Iterator[Alert]:
    """What there is to say, the gravest first; ``left`` is what qubes say that goes on and should not."""
    if look is None:
        return  # the window itself says so
    if trouble is not None:
        text = _("What is shown may be old: it is from {time}.").format(time=local(int(look.now)))
        yield Alert("trouble", text, _few([trouble]), Way.LOOK, _("Re_load"), is_bad=True)
    can_change = look.read_only is None
    if look.plan.is_held:
        is_sure = trouble is None and not (look.due or left or look.snapshot.problems)
        nothing = _("Everything is held: nothing is open, whatever the rules ask for.")
        text = nothing if is_sure else _("Everything is held.")
        yield Alert("held", text, (), *_way(Way.RESUME, _("_Resume…"), can_change))
    if look.read_only is not None:
        text = _("Nothing can be changed from here: {reason}.").format(reason=escaped(look.read_only))
        yield Alert("read-only", text)
    # What only writes the same policy in other words is nobody's trouble.
    due = [step for step in look.due if step.lines or not step.is_policy]
    if due or left:
        yield _due(due, left, can_change)
    if look.watch_start is not None:
        text = _(
            "Expiry and netvm changes take effect only at the next apply, because qvm-forward watch is not "
            "running here."
        )
        start = _("To start it: {command}.").format(command=look.watch_start)
        way = _way(Way.APPLY, _("Apply _now"), can_change and not due)
        yield Alert("unwatched", text, (start,), *way)
    if problems := look.snapshot.problems:
        text = ngettext("{count} item could not be read.", "{count} items could not be read.", len(problems))
        yield Alert("unread", text.format(count=len(problems)), _few(problems))


def _due(due: Sequence[Step], left: Sequence[str], can_change: bool) -> Alert:
    """What `apply` would change, and what qubes say that goes on."""
    lines = [*left, *(word for step in due for word in steps.words(step))]
    if not due:
        return Alert("due", _("Something is still going on that no rule asks for."), _few(lines), is_bad=True)
    is_open = bool(left) or any(step.kind in _CLOSING for step in due)
    if is_open:
        text = _("What is in force is not what the rules ask for, and may let in more.")
    else:
        text = _("Not everything that the rules ask for is in force.")
    return Alert("due", text, _few(lines), *_way(Way.APPLY, _("A_pply"), can_change), is_bad=is_open)


def _way(way: Way, label: str, can_change: bool) -> tuple[Way | None, str]:
    return (way, label) if can_change else (None, "")


def _few(lines: Sequence[str]) -> tuple[str, ...]:
    """The first of many."""
    shown = [escaped(line) for line in lines[:_LINES_MAX]]
    if (more := len(lines) - len(shown)) > 0:
        shown.append(ngettext("and {count} more", "and {count} more", more).format(count=more))
    return tuple(shown)
