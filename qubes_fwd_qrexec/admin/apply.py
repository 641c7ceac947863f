# SPDX-License-Identifier: GPL-2.0-or-later
"""The plan made true: what should be, what differs from what is, and the steps between.

`differences` decides and changes nothing; `carry_out` acts. Closing comes before opening, and policy
before the listener in both: a listener without policy can do no harm, and a qube that keeps on listening
after its rule is gone gets nothing any more. Calls outlive the policy that allowed them, so their targets
are told what is allowed from now on. A step that fails keeps no later one from being tried that closes.

What is written stands on what policy said when the differences were computed. If somebody else has changed
it since, nothing is written over that: they may have closed what we would open.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from enum import StrEnum
from typing import Any, NamedTuple

from qubes_fwd_qrexec.common.allowance import Allowance, Calls
from qubes_fwd_qrexec.common.config import parse_key
from qubes_fwd_qrexec.common.errors import ConfigError, StoreError
from qubes_fwd_qrexec.common.rules import NamedRule
from qubes_fwd_qrexec.common.values import QubeName, TargetPorts, parse_printable

from . import policy
from .backend import Backend, ChangedError, PolicyFile
from .inventory import CONFIG_PREFIX, RULE_PREFIX, Inventory
from .revoking import Ended, allowances, drains, revoke, serving, targets_of
from .states import Cause, Forward, Plan
from .views import reasons


class Kind(StrEnum):
    CLOSE_POLICY = "close-policy"
    REVOKE = "revoke"
    REMOVE_CONFIG = "remove-config"
    SET_CONFIG = "set-config"
    END_RULE = "end-rule"
    OPEN_POLICY = "open-policy"


class Step(NamedTuple):
    """One change: of policy (``value`` is the whole new text), of a feature (``qube`` and ``key``), or what
    a target is told of the calls to it (``qube`` and ``allowance``).

    ``lines_gone`` and ``lines_new`` are what a change of policy means. For a feature, ``lines`` are those
    without which it would be useless, and ``lines_new`` the new ones of them.
    """

    kind: Kind
    value: str = ""
    qube: QubeName = QubeName("")
    key: str = ""
    was: str | None = None
    lines_gone: tuple[str, ...] = ()
    lines_new: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    allowance: Allowance | None = None

    @property
    def is_policy(self) -> bool:
        return self.kind in (Kind.CLOSE_POLICY, Kind.OPEN_POLICY)

    @property
    def opens(self) -> bool:
        return bool(self.lines_new)

    @property
    def narrows(self) -> bool:
        """Whether it closes something by itself, or changes what is open, whatever policy says."""
        return self.kind is Kind.REMOVE_CONFIG or (self.kind is Kind.SET_CONFIG and self.was is not None)

    def words(self) -> list[str]:
        """For people, one change a line."""
        if self.is_policy:
            gone = [f"policy: no longer {' '.join(line.split())}" for line in self.lines_gone]
            new = [f"policy: from now on {' '.join(line.split())}" for line in self.lines_new]
            return gone + new or ["policy: write the file, which allows the same as before"]
        if self.allowance is not None:
            return list(_endings(self.qube, self.allowance, self.lines_gone))
        if self.kind is Kind.END_RULE:
            return [f"{self.qube} {self.key.removeprefix(RULE_PREFIX)}: its time is over, and it stays ended"]
        if self.kind is Kind.REMOVE_CONFIG:
            return [f"{self.qube}: stop listening for {self.key.removeprefix(CONFIG_PREFIX)}"]
        verb = "listen" if self.was is None else "change how it listens"
        return [f"{self.qube}: {verb} for {self.key.removeprefix(CONFIG_PREFIX)}: {self.value}"]

    def as_json(self) -> dict[str, Any]:
        if self.is_policy:
            return {"step": self.kind, "remove": list(self.lines_gone), "add": list(self.lines_new)}
        if self.allowance is not None:
            return {"step": self.kind, "qube": self.qube, "allowance": str(self.allowance)}
        step: dict[str, Any] = {"step": self.kind, "qube": self.qube, "feature": self.key, "was": self.was}
        if self.kind in (Kind.SET_CONFIG, Kind.END_RULE):
            step["value"] = self.value
        return step


def _endings(target: QubeName, allowance: Allowance, lines_gone: Iterable[str]) -> Iterable[str]:
    """What a target ends, in words."""
    over: dict[QubeName, list[Calls]] = {}
    for line in lines_gone:
        found = policy.calls_of(line)
        if found is not None and found[1] not in allowance.keeps:
            over.setdefault(found[1].caller, []).append(found[1])
    for source, calls in sorted(over.items()):
        for is_draining in (False, True):
            ports = [call.ports for call in calls if (call in allowance.drains) is is_draining]
            if ports:
                verb = "let connections of {} end by themselves," if is_draining else "end connections of {}"
                yield f"{target}: {verb.format(source)} to {_worded(ports)}"
    if not over:
        yield f"{target}: end all that is not allowed"


def _worded(ports: list[TargetPorts]) -> str:
    return ", ".join(each.worded() for each in ports)


class Outcome(NamedTuple):
    """What became of the steps; ``problems`` is empty if all were done.

    ``ended`` is what the targets made of what they were told. ``is_overtaken``: somebody else has changed
    policy meanwhile, and the steps are out of date.
    """

    done: tuple[Step, ...] = ()
    undone: tuple[Step, ...] = ()
    problems: tuple[str, ...] = ()
    ended: tuple[Ended, ...] = ()
    is_overtaken: bool = False

    @property
    def troubles(self) -> tuple[str, ...]:
        """All that is not as it should be."""
        return (*self.problems, *(ended.words() for ended in self.ended if ended.problem is not None))

    def after(self, earlier: "Outcome") -> "Outcome":
        """Of two that follow each other; what the earlier one left undone, this one has seen too."""
        return self._replace(done=(*earlier.done, *self.done), ended=(*earlier.ended, *self.ended))


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

    def check(self) -> None:
        """Find out whether somebody has changed it since we wrote it."""
        if self._token is None and not self.is_overtaken:
            try:
                self._token = self._token_of_ours()
            except ChangedError:
                self.is_overtaken = True


def others(outcome: Outcome, after: Plan, asked: Iterable[NamedRule]) -> Iterator[str]:
    """A sentence for each forward that was opened or closed beside those that were asked for: rules that were
    restored, or changed by Qubes' own tools, come into force with whatever command is next.
    """
    names = {(named.target, named.name) for named in asked}
    for step in outcome.done:
        if step.kind not in (Kind.SET_CONFIG, Kind.REMOVE_CONFIG):
            continue
        key = step.key.removeprefix(CONFIG_PREFIX)
        try:
            found = parse_key(key)
        except ConfigError:
            yield f"Also closed at {step.qube}: {key}."
            continue
        if found in names:
            continue
        forward = after.find(*found)
        what = "closed" if step.kind is Kind.REMOVE_CONFIG else "opened" if step.was is None else "changed"
        why = f". {reasons.sentence(forward)}" if forward is not None else "."
        yield f"Also {what} at {step.qube}: {' '.join(found)}{why}"


def wanted_config(forwards: Iterable[Forward]) -> dict[tuple[QubeName, str], Forward]:
    """For each live forward the qube and feature that tell its listener."""
    return {
        (forward.exposed, f"{CONFIG_PREFIX}{forward.config.key}"): forward
        for forward in forwards
        if forward.exposed is not None and forward.config is not None
    }


def differences(
    plan: Plan, inventory: Inventory, installed: PolicyFile, now: float, *, ends_all: bool = False
) -> tuple[Step, ...]:
    """The steps from what is to what the plan asks for, in the order in which they are to be taken.

    ``ends_all``: every qube that offers our service is told what is allowed, and what drains is cut.
    """
    final = policy.text(plan, now, is_held=plan.is_held)
    old_lines, new_lines = policy.allowing(installed.text), policy.allowing(final)
    gone, new = old_lines - new_lines, new_lines - old_lines
    closing: list[Step] = []
    opening: list[Step] = []
    if new:
        # Two writes if there is something to close too, so that closing never waits for opening.
        if gone:
            closed = policy.text(plan, now, withheld=new, is_held=plan.is_held)
            closing.append(Step(Kind.CLOSE_POLICY, closed, lines_gone=tuple(sorted(gone))))
        opening.append(Step(Kind.OPEN_POLICY, final, lines_new=tuple(sorted(new))))
    elif not policy.is_same(installed.text, final):
        closing.append(Step(Kind.CLOSE_POLICY, final, lines_gone=tuple(sorted(gone))))
    closing += _revocations(gone, new_lines, inventory, ends_all=ends_all)
    wanted = wanted_config(plan)
    present = {(qube, key): value for qube, key, value in inventory.told()}
    for qube, key in sorted(present.keys() - wanted.keys()):
        closing.append(Step(Kind.REMOVE_CONFIG, qube=qube, key=key, was=present[qube, key]))
    for (qube, key), forward in sorted(wanted.items(), key=lambda item: item[0]):
        value = parse_printable(str(forward.config))
        was = present.get((qube, key))
        if was != value:
            needed = policy.lines(forward)
            # Whoever listens already may be narrowed by it: that belongs to closing, and comes before the
            # line of policy that it has perhaps lost, as it could not be told the last time.
            opens = tuple(line for line in needed if line in new and was is None)
            step = Step(Kind.SET_CONFIG, value, qube, key, was, lines_new=opens, lines=needed)
            (opening if opens else closing).append(step)
    return (*closing, *_endings_of_rules(plan), *opening)


def _endings_of_rules(plan: Plan) -> Iterator[Step]:
    """A rule whose time is over is stored so: no clock that is set back opens it again."""
    for forward in plan:
        named = forward.source
        if forward.cause is Cause.EXPIRED and not named.rule.has_ended:
            line = str(replace(named.rule, has_ended=True))
            key = f"{RULE_PREFIX}{named.name}"
            yield Step(Kind.END_RULE, line, named.target, key, str(named.rule))


def _revocations(
    gone: frozenset[str], wanted: frozenset[str], inventory: Inventory, *, ends_all: bool
) -> Iterable[Step]:
    """A step for each target whose calls are not all allowed any more."""
    spelled = {call for line in wanted if (call := policy.calls_of(line)) is not None}
    # A line that only changes, in its autostart, ends nothing.
    over = [line for line in sorted(gone) if policy.calls_of(line) not in spelled]
    targets = targets_of(over, inventory) | (serving(inventory) if ends_all else set())
    drained = {} if ends_all else drains(inventory)
    for target, allowance in allowances(targets, wanted, drains=drained, cuts_drains=ends_all).items():
        ours = tuple(line for line in over if (call := policy.calls_of(line)) is None or call[0] == target)
        yield Step(Kind.REVOKE, qube=target, lines_gone=ours, allowance=allowance)


def carry_out(steps: Iterable[Step], backend: Backend, installed: PolicyFile) -> Outcome:
    """Take the steps; the caller holds the backend's lock. Never raises `StoreError`: see the outcome.

    ``installed`` is the policy from which the steps were computed. Where policy could not be written, nothing
    is opened, and all the same the targets are told, and the listeners. A listener that could not be told,
    of a new forward or of a narrower one, loses its lines of policy; everything else goes on.
    """
    steps = tuple(steps)
    done: list[Step] = []
    undone: list[Step] = []
    problems: list[str] = []
    ended: tuple[Ended, ...] = ()
    our_policy = _OurPolicy(backend, installed)
    is_policy_written = True
    for step in steps:
        if step.opens and not is_policy_written:
            undone.append(step)
            continue
        try:
            if step.is_policy:
                our_policy.replace(policy.without(step.value, _lost_lines(done, undone)))
            elif step.allowance is not None:
                # All at once with the first of them.
                ended = ended or revoke(
                    {each.qube: each.allowance for each in steps if each.allowance}, backend
                )
                if any(each.target == step.qube and each.problem is not None for each in ended):
                    undone.append(step)
                    continue
            elif step.kind is Kind.REMOVE_CONFIG:
                backend.remove_feature(step.qube, step.key)
            else:
                backend.set_feature(step.qube, step.key, step.value)
        except (StoreError, OSError) as error:
            problems.append(str(error))
            undone.append(step)
            is_policy_written = is_policy_written and not step.is_policy
            _undo(step, backend)
        else:
            done.append(step)
    if lost := _lost_lines(done, undone) & (
        policy.allowing(installed.text) | policy.allowing(our_policy.text)
    ):
        ended += _withdraw(lost, our_policy, backend, problems)
    if any(step.opens for step in done):
        our_policy.check()
    return Outcome(tuple(done), tuple(undone), tuple(problems), ended, is_overtaken=our_policy.is_overtaken)


def _lost_lines(done: Iterable[Step], undone: Iterable[Step]) -> frozenset[str]:
    """The lines of forwards whose listener could not be told. Of a new one, which does not listen, a line
    that another one shares stays; of one that listens as it should not any more, none.
    """
    used = {line for step in done if step.kind is Kind.SET_CONFIG for line in step.lines}
    lost: set[str] = set()
    for step in undone:
        if step.kind is Kind.SET_CONFIG:
            lost |= set(step.lines_new) - used if step.was is None else set(step.lines)
    return frozenset(lost)


def _withdraw(
    lost: frozenset[str], our_policy: _OurPolicy, backend: Backend, problems: list[str]
) -> tuple[Ended, ...]:
    """Take lines out of policy again, and end the calls that they may have allowed meanwhile."""
    try:
        if lost & policy.allowing(our_policy.text):
            our_policy.replace(policy.without(our_policy.text, lost))
    except (StoreError, OSError) as error:
        problems.append(f"dom0's policy could not be closed for it either: {error}")
    else:
        problems.append("what its listener was not told is closed in dom0's policy")
    targets = {call[0] for line in lost if (call := policy.calls_of(line)) is not None}
    return revoke(allowances(targets, policy.allowing(our_policy.text) - lost), backend)


def _undo(step: Step, backend: Backend) -> None:
    """Put a feature back that may have been set and not delivered, so that the next time sets it again."""
    if step.kind is not Kind.SET_CONFIG:
        return
    with suppress(StoreError, OSError):
        if step.was is None:
            backend.remove_feature(step.qube, step.key)
        else:
            backend.set_feature(step.qube, step.key, step.was)
