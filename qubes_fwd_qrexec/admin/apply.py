# SPDX-License-Identifier: GPL-2.0-or-later
"""The plan made true: what should be, what differs from what is, and the steps between.

`differences` decides and changes nothing; `carry_out` acts. Closing comes before opening, and policy
before the listener in both: a listener without policy can do no harm, and a qube that keeps on
listening after its rule is gone gets nothing any more. A tunnel outlives the policy that allowed it, so
dom0 itself calls the target to end it. If a step fails, what the later ones would have opened is closed
again in policy; the next `apply` finishes.

What is written stands on what policy said when the differences were computed. If somebody else has changed
it since, nothing is written over that: they may have closed what we would open.
"""

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from enum import StrEnum
from typing import Any, NamedTuple

from qubes_fwd_qrexec.errors import StoreError
from qubes_fwd_qrexec.values import QubeName, parse_printable

from . import policy
from .backend import Backend, ChangedError, PolicyFile
from .inventory import CONFIG_PREFIX, Inventory
from .revocations import Revocation, due, struck_out
from .revoking import Result, SkippedError, revoke
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

    Or a call that ends tunnels, the ``revocation``, which ``is_owed`` if a change before has left it.
    ``lines_gone`` and ``lines_new`` are what a change of policy means; for a feature, ``lines_new`` are the
    lines without which it would be useless.
    """

    kind: Kind
    value: str = ""
    qube: QubeName = QubeName("")
    key: str = ""
    was: str | None = None
    lines_gone: tuple[str, ...] = ()
    lines_new: tuple[str, ...] = ()
    revocation: Revocation | None = None
    is_owed: bool = False

    @property
    def is_policy(self) -> bool:
        return self.kind in (Kind.CLOSE_POLICY, Kind.OPEN_POLICY)

    @property
    def opens(self) -> bool:
        return bool(self.lines_new)

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
    """What became of the steps; ``problems`` and ``owed`` are empty if all were done.

    ``owed`` is what a change before this one has left, and this one could not do either. ``is_overtaken``:
    somebody else has changed policy meanwhile, and the steps are out of date.
    """

    done: tuple[Step, ...]
    undone: tuple[Step, ...]
    problems: tuple[str, ...]
    owed: tuple[str, ...] = ()
    is_overtaken: bool = False

    @property
    def troubles(self) -> tuple[str, ...]:
        """All that is not as it should be, whoever has left it so."""
        return (*self.problems, *self.owed)


class _OurPolicy:
    """The policy file as long as nobody else writes it; what others wrote is never written over."""

    def __init__(self, backend: Backend, installed: PolicyFile) -> None:
        self._backend = backend
        self.text = installed.text or ""
        self._token: str | None = installed.token
        self.is_overtaken = False

    def replace(self, text: str) -> None:
        """Raises `StoreError`, and `ChangedError` if the file is not what we read or wrote last."""
        try:
            token = self._token_of_ours() if self._token is None else self._token
            self._backend.replace_policy(text, token)
        except ChangedError:
            self.is_overtaken = True
            raise
        self.text, self._token = text, None

    def _token_of_ours(self) -> str:
        """Of what we wrote: nobody tells it when a file is replaced."""
        found = self._backend.read_policy()
        if found.text != self.text:
            raise ChangedError("dom0's policy file")
        return found.token


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
    notes = [*policy.panic_notes(installed.text), *(revocation.note() for revocation in revocations)]
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
    over = policy.tunnels(old_lines)
    closing += [Step(Kind.REVOKE, revocation=r, is_owed=r.tunnel not in over) for r in revocations]
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


def carry_out(steps: Iterable[Step], backend: Backend, installed: PolicyFile) -> Outcome:
    """Take the steps; the caller holds the backend's lock. Never raises `StoreError`: see the outcome.

    ``installed`` is the policy from which the steps were computed. A failed change of policy ends it all. A
    failed feature stops nothing that closes; what would be opened for it is withdrawn from policy. Tunnels
    that could not be ended stop nothing, and stay noted.
    """
    waiting = list(steps)
    done: list[Step] = []
    failed: list[Step] = []
    problems: list[str] = []
    owed: list[str] = []
    our_policy = _OurPolicy(backend, installed)
    ended: dict[Revocation, Result] | None = None
    while waiting:
        step = waiting[0]
        if step.kind is Kind.OPEN_POLICY and any(lost.kind is not Kind.REVOKE for lost in failed):
            problems.append("nothing new was opened because of that")
            break
        if step.revocation is not None and ended is None:
            ended = revoke((due.revocation for due in waiting if due.revocation is not None), backend)
        try:
            _take(step, backend, our_policy, ended or {})
        except SkippedError:
            # What is said of the call that was made holds for this one.
            failed.append(step)
        except StoreError as error:
            (owed if step.is_owed else problems).append(f"{error}{_what_goes_on(step)}")
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
            our_policy.replace(_without(needless, our_policy.text))
        except StoreError as error:
            problems.append(f"dom0's policy could not be closed again either: {error}")
        else:
            problems.append("what was to be opened for it is closed in dom0's policy again")
    if not our_policy.is_overtaken:
        _strike_out([step.revocation for step in done if step.revocation is not None], our_policy, problems)
    return Outcome(
        tuple(done), (*failed, *waiting), tuple(problems), tuple(owed), is_overtaken=our_policy.is_overtaken
    )


def _take(step: Step, backend: Backend, our_policy: _OurPolicy, ended: Mapping[Revocation, Result]) -> None:
    if step.is_policy:
        our_policy.replace(step.value)
    elif step.revocation is not None:
        if (error := ended[step.revocation]) is not None:
            raise error
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


def _strike_out(ended: Collection[Revocation], our_policy: _OurPolicy, problems: list[str]) -> None:
    """Take the notes of what is done out of the policy file. One that stays costs a needless call."""
    if not ended:
        return
    try:
        our_policy.replace(struck_out(our_policy.text, ended))
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


def _without(needless: frozenset[str], text: str) -> str:
    """A policy file without some lines."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if "  ".join(line.split()) not in needless)
