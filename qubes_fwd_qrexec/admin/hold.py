# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything closed at once and held, whatever is wrong; and the hold lifted again.

The hold is one word in dom0's policy file, which allows nothing while it is there. Whoever plans reads that
file first and finds nothing live. Whoever read it before the hold cannot open anything after it, as what they
write names the text that they read. So the file is written at once, without the lock, and the rest is what
`apply` does. Wherever this is killed after its first write, nothing opens, and the next `apply` closes.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple, TypeVar

from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.rules import NamedRule

from . import policy
from .apply import Step, differences
from .backend import ANY, Backend
from .judged import judged
from .listeners import GoesOn, ask_after
from .reconcile import Applied, apply, reconcile
from .revoking import Ended, allowances, revoke, serving
from .snapshot import Snapshot, look
from .states import Plan

_T = TypeVar("_T")


class Held(NamedTuple):
    """What a hold has done, and what a look at the system found afterwards.

    ``applied`` is None if the qubes could not be read. ``problems`` are errors with what they kept from being
    done, ``notes`` those that kept nothing. ``allowed`` are lines that our own file allows all the same,
    ``allowed_elsewhere`` forwards whose calls another policy file allows.
    """

    is_held: bool
    applied: Applied | None = None
    ended: tuple[Ended, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    allowed_elsewhere: tuple[NamedRule, ...] = ()
    goes_on: tuple[GoesOn, ...] = ()

    @property
    def is_closed(self) -> bool:
        """Whether nothing is open any more, and nothing opens."""
        is_done = self.is_held and not self.problems and all(ended.problem is None for ended in self.ended)
        return is_done and not (self.allowed or self.allowed_elsewhere or self.goes_on)


class Resumed(NamedTuple):
    """What was done to lift a hold, or would be; ``plan`` is that without a hold."""

    was_held: bool
    plan: Plan
    steps: tuple[Step, ...]
    snapshot: Snapshot


def hold(backend: Backend, now: float) -> Held:
    """Close everything and hold it. Never raises a `ForwardError`; waits for the lock for 10 s at most."""
    problems: list[str] = []
    notes: list[str] = []
    text = policy.text(Plan((), is_held=True))
    _tried(problems, "policy: deny every call", lambda: backend.replace_policy(text, ANY))
    # Whoever has the lock may be waiting for a qube, so calls end before the lock is waited for.
    targets = _tried([], "", lambda: serving(backend.inventory(with_config=False))) or ()
    ended = {each.target: each for each in revoke(allowances(targets, (), cuts_drains=True), backend)}
    with ExitStack() as locked:
        _tried(notes, "this went on without the lock", lambda: locked.enter_context(backend.locked()))
        what = "read all qubes, to find listeners and calls"
        applied = _tried(problems, what, lambda: reconcile(backend, now, is_held=True))
    installed = _tried(problems, "policy: it cannot be read", backend.read_policy)
    in_force = None if installed is None else installed.text
    held = Held(
        policy.is_held(in_force), notes=tuple(notes), allowed=tuple(sorted(policy.allowing(in_force)))
    )
    if applied is None:
        return held._replace(ended=tuple(ended.values()), problems=tuple(problems))
    outcome, snapshot = applied.outcome, applied.snapshot
    live = snapshot.plan(now, is_held=False)
    # Our file is the one that is held, and the first file decides. If none can be read, that is said already.
    verdicts = (_tried([], "", lambda: judged(live.live, backend, None)) if held.is_held else None) or {}
    allowed = {key for key, verdict in verdicts.items() if verdict.is_allowed}
    return held._replace(
        applied=applied,
        ended=tuple((ended | {each.target: each for each in outcome.ended}).values()),
        problems=(*problems, *outcome.problems),
        allowed_elsewhere=tuple(f.source for f in live.live if f.source[:2] in allowed),
        goes_on=ask_after(live, Plan(()), (), snapshot.inventory, backend, is_everything=True).goes_on,
    )


def _tried(problems: list[str], what: str, do: Callable[[], _T]) -> _T | None:
    """What a step returns; if it fails None, and one problem more."""
    try:
        return do()
    except (ForwardError, OSError) as error:
        problems.append(f"{what}: {error}")
        return None


def resume(backend: Backend, now: float, *, is_preview: bool = False) -> Resumed:
    """Lift the hold and open what the rules ask for, or say what that would be. Raises `StoreError`."""
    if is_preview:
        snapshot = look(backend, with_config=True)
        planned = snapshot.plan(now, is_held=False)
        steps = differences(planned, snapshot.inventory, snapshot.installed)
        return Resumed(snapshot.is_held, planned, steps, snapshot)
    with backend.locked():
        was_held = policy.is_held(backend.read_policy().text)
        planned, outcome, snapshot = apply(backend, now, is_held=False)
    return Resumed(was_held, planned, outcome.done, snapshot)
