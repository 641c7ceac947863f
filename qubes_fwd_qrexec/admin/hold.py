# SPDX-License-Identifier: GPL-2.0-or-later
"""Everything closed at once and held, whatever is wrong; and the hold lifted again.

The hold is one word in dom0's policy file, which allows nothing while it is there. Whoever plans reads that
file first and finds nothing live. Whoever read it before the hold cannot open anything after it, as what they
write names the text that they read. So the file is written at once, without the lock, and the rest is what
`apply` does. Wherever this is killed after its first write, nothing opens, and the next `apply` closes.
"""

from contextlib import ExitStack
from typing import NamedTuple

from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.rules import NamedRule

from . import policy
from .apply import Step, differences
from .backend import ANY, Backend
from .judged import judged
from .listeners import GoesOn, ask_after
from .reconcile import apply, reconcile
from .revoking import Ended, allowances, revoke, serving
from .snapshot import Snapshot, look
from .states import Plan


class Held(NamedTuple):
    """What a hold has done, and what a look at the system found afterwards.

    ``problems`` are errors, ``busy`` is that of the lock, if others had it too long. ``snapshot`` is the
    system before, if it could be read. ``allowed`` are lines that our own file allows all the same,
    ``allowed_elsewhere`` forwards whose calls another policy file allows.
    """

    is_held: bool
    steps: tuple[Step, ...] = ()
    ended: tuple[Ended, ...] = ()
    problems: tuple[str, ...] = ()
    busy: str | None = None
    snapshot: Snapshot | None = None
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
    unwritten = _write(backend)
    # Whoever has the lock may be waiting for a qube, so calls end before the lock is waited for.
    ended = {each.target: each for each in _end_all_calls(backend)}
    applied, busy = None, None
    with ExitStack() as locked:
        try:
            locked.enter_context(backend.locked())
        except (ForwardError, OSError) as error:
            busy = str(error)
        try:
            applied = reconcile(backend, now, is_held=True)
        except (ForwardError, OSError) as error:
            problems.append(f"read all qubes, to find listeners and calls: {error}")
    text = None
    try:
        text = backend.read_policy().text
    except (ForwardError, OSError) as error:
        problems.append(f"policy: it cannot be read ({error})")
    is_held = policy.is_held(text)
    if unwritten is not None and not is_held:
        problems.insert(0, f"policy: deny every call: {unwritten}")
    allowed = tuple(sorted(policy.allowing(text)))
    if applied is None:
        return Held(is_held, (), tuple(ended.values()), tuple(problems), busy, None, allowed)
    outcome, snapshot = applied.outcome, applied.snapshot
    ended |= {each.target: each for each in outcome.ended}
    live = snapshot.plan(now, is_held=False)
    heard = ask_after(live, Plan(()), (), snapshot.inventory, backend, is_everything=True)
    return Held(
        is_held,
        outcome.done,
        tuple(ended.values()),
        (*problems, *outcome.problems),
        busy,
        snapshot,
        allowed,
        _allowed_elsewhere(live, backend) if is_held else (),
        heard.goes_on,
    )


def _write(backend: Backend) -> str | None:
    """Write the hold over whatever the file says; why not, if that cannot be done."""
    try:
        backend.replace_policy(policy.text(Plan((), is_held=True)), ANY)
    except (ForwardError, OSError) as error:
        return str(error)
    return None


def _end_all_calls(backend: Backend) -> tuple[Ended, ...]:
    try:
        told = allowances(serving(backend.inventory(with_config=False)), (), cuts_drains=True)
    except (ForwardError, OSError):
        return ()  # reading the qubes again says why
    return revoke(told, backend)


def _allowed_elsewhere(live: Plan, backend: Backend) -> tuple[NamedRule, ...]:
    """Forwards whose calls another policy file allows: the hold is in ours, and the first file decides."""
    try:
        verdicts = judged(live.live, backend, None)
    except (ForwardError, OSError):
        return ()  # that dom0's policy cannot be read is said already
    return tuple(f.source for f in live.live if verdicts[f.source[:2]].is_allowed)


def resume(backend: Backend, now: float, *, is_preview: bool = False) -> Resumed:
    """Lift the hold and open what the rules ask for, or say what that would be. Raises `StoreError`."""
    if is_preview:
        snapshot = look(backend, with_config=True)
        planned = snapshot.plan(now, is_held=False)
        steps = differences(planned, snapshot.inventory, snapshot.installed)
        return Resumed(snapshot.is_held, planned, steps, snapshot)
    with backend.locked():
        planned, outcome, snapshot = apply(backend, now, is_held=False)
    return Resumed(snapshot.is_held, planned, outcome.done, snapshot)
