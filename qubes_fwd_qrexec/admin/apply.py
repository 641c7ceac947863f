# SPDX-License-Identifier: GPL-2.0-or-later
"""The plan made true: what should be, what differs from what is, and the steps between.

`differences` decides and changes nothing; `carry_out` acts. Closing comes before opening, and policy
before the listener in both: a listener without policy can do no harm, and a qube that keeps on
listening after its rule is gone gets nothing any more. A tunnel outlives the policy that allowed it, so
dom0 itself calls the target to end it. If a step fails, what the later ones would have opened is closed
again in policy; the next `apply` finishes.
"""

from collections.abc import Collection, Iterable
from contextlib import suppress
from enum import StrEnum
from typing import Any, NamedTuple

from qubes_fwd_qrexec.config import REVOKE_SERVICE
from qubes_fwd_qrexec.errors import StoreError
from qubes_fwd_qrexec.values import QubeName, parse_printable

from . import policy
from .backend import Backend, PolicyFile
from .inventory import CONFIG_PREFIX, Inventory
from .revocations import Revocation, due, struck_out
from .states import Forward, Plan

# How long a tunnel takes new connections without dom0 being asked: `tunnelservice.LEASE_S` of the target.
LEASE_S = 300


class Kind(StrEnum):
    CLOSE_POLICY = "close-policy"
    REVOKE = "revoke"
    REMOVE_CONFIG = "remove-config"
    SET_CONFIG = "set-config"
    OPEN_POLICY = "open-policy"


class Step(NamedTuple):
    """One change: of policy (``value`` is the whole new text) or of a feature (``qube`` and ``key``).

    Or a call that ends tunnels, the ``revocation``. ``lines_gone`` and ``lines_new`` are what a change of
    policy means; for a feature, ``lines_new`` are the lines without which it would be useless.
    """

    kind: Kind
    value: str = ""
    qube: QubeName = QubeName("")
    key: str = ""
    was: str | None = None
    lines_gone: tuple[str, ...] = ()
    lines_new: tuple[str, ...] = ()
    revocation: Revocation | None = None

    @property
    def is_policy(self) -> bool:
        return self.kind in (Kind.CLOSE_POLICY, Kind.OPEN_POLICY)

    def words(self) -> list[str]:
        """For people, one change a line."""
        if self.is_policy:
            gone = [f"policy: no longer {' '.join(line.split())}" for line in self.lines_gone]
            new = [f"policy: from now on {' '.join(line.split())}" for line in self.lines_new]
            return gone + new or ["policy: write the file, which allows the same as before"]
        if self.revocation is not None:
            return [self.revocation.words()]
        if self.kind is Kind.REMOVE_CONFIG:
            return [f"{self.qube}: stop listening for {self.key.removeprefix(CONFIG_PREFIX)}"]
        verb = "listen" if self.was is None else "change how it listens"
        return [f"{self.qube}: {verb} for {self.key.removeprefix(CONFIG_PREFIX)}: {self.value}"]

    def as_json(self) -> dict[str, Any]:
        if self.is_policy:
            return {"step": self.kind, "remove": list(self.lines_gone), "add": list(self.lines_new)}
        if self.revocation is not None:
            target, argument = self.revocation.target, self.revocation.argument
            return {"step": self.kind, "qube": target, "tunnels": argument}
        step: dict[str, Any] = {"step": self.kind, "qube": self.qube, "feature": self.key, "was": self.was}
        if self.kind is Kind.SET_CONFIG:
            step["value"] = self.value
        return step


class Outcome(NamedTuple):
    """What became of the steps; ``problems`` is empty if all were done."""

    done: tuple[Step, ...]
    undone: tuple[Step, ...]
    problems: tuple[str, ...]


def wanted_config(forwards: Iterable[Forward]) -> dict[tuple[QubeName, str], Forward]:
    """For each live forward the qube and feature that tell its listener."""
    return {
        (forward.exposed, f"{CONFIG_PREFIX}{forward.config.key}"): forward
        for forward in forwards
        if forward.exposed is not None and forward.config is not None
    }


def differences(plan: Plan, inventory: Inventory, installed: PolicyFile, now: float) -> tuple[Step, ...]:
    """The steps from what is to what the plan asks for, in the order in which they are to be taken."""
    old_lines, new_lines = policy.allowing(installed.text), policy.allowing(policy.text(plan, now))
    gone, new = old_lines - new_lines, new_lines - old_lines
    revocations = due(installed.text, policy.text(plan, now), inventory)
    notes = [revocation.note() for revocation in revocations]
    final = policy.text(plan, now, notes=notes)
    closing: list[Step] = []
    opening: list[Step] = []
    if new:
        # Two writes if there is something to close too, so that closing never waits for opening.
        if gone:
            closed = policy.text(plan, now, withheld=new, notes=notes)
            closing.append(Step(Kind.CLOSE_POLICY, closed, lines_gone=tuple(sorted(gone))))
        opening.append(Step(Kind.OPEN_POLICY, final, lines_new=tuple(sorted(new))))
    elif not policy.is_same(installed.text, final):
        closing.append(Step(Kind.CLOSE_POLICY, final, lines_gone=tuple(sorted(gone))))
    wanted = wanted_config(plan)
    present = {(qube, key): value for qube, key, value in inventory.told()}
    closing += [Step(Kind.REVOKE, revocation=revocation) for revocation in revocations]
    for qube, key in sorted(present.keys() - wanted.keys()):
        closing.append(Step(Kind.REMOVE_CONFIG, qube=qube, key=key, was=present[qube, key]))
    for (qube, key), forward in sorted(wanted.items(), key=lambda item: item[0]):
        value = parse_printable(str(forward.config))
        was = present.get((qube, key))
        if was != value:
            needed = tuple(line for line in policy.lines(forward) if line in new)
            step = Step(Kind.SET_CONFIG, value, qube=qube, key=key, was=was, lines_new=needed)
            # What needs no new line may narrow what is open: it belongs to closing.
            (opening if needed else closing).append(step)
    return (*closing, *opening)


def carry_out(steps: Iterable[Step], backend: Backend) -> Outcome:
    """Take the steps; the caller holds the backend's lock. Never raises `StoreError`: see the outcome.

    A failed change of policy ends it all. A failed feature stops nothing that closes; what would be
    opened for it is withdrawn from policy. Tunnels that could not be ended stop nothing, and stay noted.
    """
    waiting = list(steps)
    done: list[Step] = []
    failed: list[Step] = []
    problems: list[str] = []
    while waiting:
        step = waiting[0]
        if step.kind is Kind.OPEN_POLICY and any(lost.kind is not Kind.REVOKE for lost in failed):
            problems.append("nothing new was opened because of that")
            break
        try:
            _take(step, backend)
        except StoreError as error:
            problems.append(f"{error}{_what_goes_on(step)}")
            if step.is_policy:
                break
            failed.append(step)
            _undo(step, backend)
        else:
            done.append(step)
        waiting.pop(0)
    needless = _needless_lines(done, failed)
    if needless:
        try:
            _withdraw(needless, backend)
        except StoreError as error:
            problems.append(f"dom0's policy could not be closed again either: {error}")
        else:
            problems.append("what was to be opened for it is closed in dom0's policy again")
    _strike_out([step.revocation for step in done if step.revocation is not None], backend, problems)
    return Outcome(tuple(done), (*failed, *waiting), tuple(problems))


def _take(step: Step, backend: Backend) -> None:
    if step.is_policy:
        backend.replace_policy(step.value, backend.read_policy().token)
    elif step.revocation is not None:
        backend.call(step.revocation.target, f"{REVOKE_SERVICE}+{step.revocation.argument}")
    elif step.kind is Kind.REMOVE_CONFIG:
        backend.remove_feature(step.qube, step.key)
    else:
        backend.set_feature(step.qube, step.key, step.value)


def _what_goes_on(step: Step) -> str:
    """What stays open where tunnels could not be ended."""
    if step.revocation is None:
        return ""
    tunnel = step.revocation.tunnel
    return (
        f". dom0's policy is closed, but tunnels that {tunnel.source} has to {tunnel.target} may take "
        f"connections for {LEASE_S} s more, and those that are open go on, until 'qvm-forward apply' can end "
        f"them or {tunnel.target} is shut down"
    )


def _strike_out(ended: Collection[Revocation], backend: Backend, problems: list[str]) -> None:
    """Take the notes of what is done out of the policy file. One that stays costs a needless call."""
    if not ended:
        return
    try:
        installed = backend.read_policy()
        backend.replace_policy(struck_out(installed.text or "", ended), installed.token)
    except StoreError as error:
        problems.append(f"tunnels were ended, and are still noted to be in dom0's policy file: {error}")


def _undo(step: Step, backend: Backend) -> None:
    """Put a feature back that may have been set and not delivered, so that the next time sets it again."""
    if step.kind is Kind.SET_CONFIG:
        with suppress(StoreError):
            if step.was is None:
                backend.remove_feature(step.qube, step.key)
            else:
                backend.set_feature(step.qube, step.key, step.was)


def _needless_lines(done: Iterable[Step], failed: Iterable[Step]) -> frozenset[str]:
    """The new lines of forwards that were not delivered, but for those that a delivered one shares."""
    lost = {line for step in failed for line in step.lines_new}
    used = {line for step in done if step.kind is Kind.SET_CONFIG for line in step.lines_new}
    return frozenset(lost - used)


def _withdraw(needless: frozenset[str], backend: Backend) -> None:
    installed = backend.read_policy()
    kept = [
        line
        for line in (installed.text or "").splitlines(keepends=True)
        if "  ".join(line.split()) not in needless
    ]
    backend.replace_policy("".join(kept), installed.token)
