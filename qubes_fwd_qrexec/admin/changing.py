# SPDX-License-Identifier: GPL-2.0-or-later
"""Changes of rules: add, set, remove, enable, disable, confirm; and `change`, which import and marks use.

A change is decided on one reading of the system. It is refused if it would leave a rule closed for a cause
that the rule did not have before; else all of it is stored, or nothing, and then applied. The lock is held
until then; what the listeners make of it is asked without it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from qubes_fwd_qrexec.common.errors import RefusedError, RuleError, TextError, UsageError
from qubes_fwd_qrexec.common.options import Option
from qubes_fwd_qrexec.common.rules import BrokenRule, ForwardRule, NamedRule
from qubes_fwd_qrexec.common.values import QubeName, RuleName

from .apply import Outcome
from .backend import Backend
from .expiry import parse_expire, print_expire
from .inventory import Inventory
from .judged import denials
from .listeners import Heard, ask_after
from .reconcile import apply
from .snapshot import Snapshot, look
from .states import Cause, Finding, Forward, NotOpenError, Plan, State
from .store import TUNNEL_NAME, Changes, made_up_name, store

Key = tuple[QubeName, str]
"""Target and name of a rule."""


@dataclass(frozen=True, slots=True)
class Changed:
    """What a change did; ``keys`` are the rules that it was about.

    ``before`` and ``after`` are the system as it was read, and with the change. ``outcome`` is None if
    nothing was applied. ``denials`` are the reasons for which dom0's policy denies calls of these rules all
    the same. ``watch_start`` starts `watch`, where that is not running.
    """

    keys: tuple[Key, ...]
    before: Snapshot
    after: Snapshot
    plan_before: Plan
    plan: Plan
    outcome: Outcome | None
    denials: Mapping[tuple[QubeName, RuleName], str]
    heard: Heard
    watch_start: str | None

    @property
    def forwards(self) -> list[Forward]:
        """What the change was about, as it is now."""
        return [forward for key in self.keys if (forward := self.plan.find(*key)) is not None]

    @property
    def moved(self) -> list[tuple[Forward, State]]:
        """The other forwards whose state it has changed, and what that was before."""
        return [
            (forward, old.state)
            for forward in self.plan
            if (old := self.plan_before.find(*forward.source[:2])) is not None
            and old.state is not forward.state
            and forward.source[:2] not in self.keys
        ]


def change(
    backend: Backend,
    now: float,
    decide: Callable[[Snapshot], Changes],
    done: str,
    *,
    is_applied: bool = True,
    refuses_ports_alone: bool = False,
) -> Changed:
    """Store what ``decide`` makes of the system, all or none, and apply it.

    ``done`` is the word that follows "was not" where it is refused. ``refuses_ports_alone``: a rule may be
    closed for any other cause than that another one has its ports. Raises `NotOpenError`, `StoreError`, and
    what ``decide`` does.
    """
    with backend.locked():
        before = look(backend)
        changes = decide(before)
        after = before.changed(changes)
        keys = tuple(key for key in changes if key[1] != TUNNEL_NAME)
        _check(before, after, keys, now, done, refuses_ports_alone=refuses_ports_alone)
        store(backend, before.inventory, changes)
        plan_before, planned, outcome = before.plan(now), after.plan(now), None
        if is_applied:
            planned, outcome, read = apply(backend, now, changed="the change is stored")
            after = after._replace(inventory=read.inventory, policy_problem=read.policy_problem)
    forwards = [forward for key in keys if (forward := planned.find(*key)) is not None]
    heard = Heard({})
    if is_applied:
        heard = ask_after(plan_before, planned, keys, after.inventory, backend)
    denied = denials(forwards, backend) if is_applied else {}
    return Changed(keys, before, after, plan_before, planned, outcome, denied, heard, backend.unwatched())


def _check(
    before: Snapshot,
    after: Snapshot,
    keys: Iterable[Key],
    now: float,
    done: str,
    *,
    refuses_ports_alone: bool,
) -> None:
    """Refuse what could not be opened for a cause that is new. Raises `NotOpenError`."""
    # Judged as the last of those that claim ports, before and after.
    newcomers = [named[:2] for named in after.stored.rules if named[:2] in keys]
    was, planned = (each.plan(now, newcomers, is_held=False) for each in (before, after))
    for key in newcomers:
        old, new = was.find(*key), planned.find(*key)
        if new is None:
            continue
        if old is not None and old.source.rule.enabled is not new.source.rule.enabled:
            if old.source.rule.enabled:
                continue  # what closes is never refused
            old = None
        problem = _new_problem(old, new, ports_alone=refuses_ports_alone)
        if problem is not None:
            raise NotOpenError(f"{new.source} was not {done}", new, problem)


def _new_problem(old: Forward | None, new: Forward, *, ports_alone: bool) -> Finding | None:
    """What keeps a rule closed that did not before; of a disabled one, what would."""
    stop = _stop(new)
    if not ports_alone and stop is not None and stop.cause.state is State.REFUSED:
        before = None if old is None else _stop(old)
        if before is None or (before.cause, old and old.exposed) != (stop.cause, new.exposed):
            return stop
    rival = None if old is None or old.conflict is None else old.conflict.rival
    return None if new.conflict is None or new.conflict.rival == rival else new.conflict


def _stop(forward: Forward) -> Finding | None:
    """What keeps it closed, or would if it was enabled."""
    stops = (stop for stop in forward.stops if stop.cause not in (Cause.DISABLED, Cause.CONFLICT))
    return next(stops, None)


def new_rule(
    snapshot: Snapshot, now: float, target: QubeName, rule: ForwardRule, name: RuleName | None = None
) -> NamedRule:
    """A rule as `add` stores it: with owner and path as they are now, and a name.

    Raises `RefusedError` if there is no such qube or the name is taken, and `UsageError` if its time is over.
    """
    snapshot.check_qube(target)
    if rule.expire is not None and rule.expire <= now:
        over = f"expire: {print_expire(rule.expire, now)} is over already"
        raise UsageError(f"{over}; name a time to come, such as +8h", "expire")
    rule = replace(rule, owner=target, path=snapshot.inventory.chain(target).qubes)
    named = NamedRule(target, name or made_up_name(rule, snapshot.stored.names(target)), rule)
    taken = snapshot.stored.find(*named[:2])
    if isinstance(taken, BrokenRule):
        raise RefusedError(
            f"{named} exists already and cannot be read; take another --name, or remove it first with "
            f"'qvm-forward remove {named}'"
        )
    if taken is not None:
        raise RefusedError(
            f"{named} exists already; take another --name, or change it with 'qvm-forward set {named}'"
        )
    return named


def preview(snapshot: Snapshot, now: float, named: NamedRule) -> Forward:
    """What would become of a rule if it was stored; nothing is. Its target must exist."""
    after = snapshot.changed({named[:2]: str(named.rule)})
    return next(forward for forward in after.plan(now, [named[:2]]) if forward.source == named)


def add(
    backend: Backend,
    now: float,
    target: QubeName,
    rule: ForwardRule,
    name: RuleName | None = None,
    *,
    is_applied: bool = True,
) -> Changed:
    """Make a forward and open it. Raises what `new_rule` and `change` do."""

    def decide(snapshot: Snapshot) -> Changes:
        named = new_rule(snapshot, now, target, rule, name)
        return {named[:2]: str(named.rule)}

    return change(backend, now, decide, "added", is_applied=is_applied)


def set_options(
    backend: Backend,
    now: float,
    target: str,
    name: str,
    options: Mapping[str, str],
    *,
    seen: str | None = None,
    is_applied: bool = True,
) -> Changed:
    """Change options of a rule by their names; an empty value is the default.

    ``seen`` is the rule's line that this is based on. Raises `RefusedError` if it is not what is stored, and
    `UsageError`, which names the options, for values that are wrong; else what `change` does.
    """

    def decide(snapshot: Snapshot) -> Changes:
        old = _readable(snapshot, target, name)
        try:
            if seen is not None and ForwardRule.parse(seen) != old.rule:
                raise RefusedError(f"{old} was not changed: it is no longer what you saw, but '{old.rule}'")
            rule = with_options(old.rule, options, now)
            _check_recorded(old, rule, snapshot.inventory)
        except RuleError as error:
            raise UsageError(f"{old} was not changed: {error}", *error.options) from None
        return {old[:2]: str(rule)}

    return change(backend, now, decide, "changed", is_applied=is_applied)


def with_options(rule: ForwardRule, options: Mapping[str, str], now: float) -> ForwardRule:
    """A rule with options changed, ``expire`` as users write it. Raises `RuleError`."""
    texts = rule.options()
    known = ForwardRule.option_names()
    for name, value in options.items():
        if name not in known and not value:
            raise RuleError(f"option {name!a}", f"unknown option; known are {', '.join(known)}", name)
        texts.pop(name, None)
        if name == "expire":
            texts.pop("ended", None)
            value = _expire(value or "never", now)
        if value:
            texts[name] = value
    return ForwardRule.from_options(Option(n, v, f"option {n!a}") for n, v in texts.items())


def _expire(text: str, now: float) -> str:
    try:
        expire = parse_expire(text, now)
    except TextError as error:
        raise RuleError("option 'expire'", str(error), "expire") from None
    return "" if expire is None else str(expire)


def _check_recorded(old: NamedRule, rule: ForwardRule, inventory: Inventory) -> None:
    """Owner and path are what somebody agreed to, and `confirm` records them. Raises `RuleError`."""
    if rule.owner not in (old.rule.owner, old.target, None):
        raise RuleError("option 'owner'", f"it can only be {old.target}, which has the rule", "owner")
    gone = [name for name in rule.path or () if inventory.get(name) is None]
    if gone and rule.path != old.rule.path:
        problem = f"there is no qube {gone[0]}; 'qvm-forward confirm {old}' records the path"
        raise RuleError("option 'path'", problem, "path")


def enable(
    backend: Backend, now: float, target: str, names: Iterable[str], *, is_applied: bool = True
) -> Changed:
    """Open what was disabled; a rule that has ended gets what is left of its time."""

    def decide(snapshot: Snapshot) -> Changes:
        olds = [_readable(snapshot, target, name) for name in names]
        return {old[:2]: str(replace(old.rule, enabled=True, has_ended=False)) for old in olds}

    return change(backend, now, decide, "enabled", is_applied=is_applied)


def disable(
    backend: Backend, now: float, target: str, names: Iterable[str], *, is_applied: bool = True
) -> Changed:
    """Close and keep."""

    def decide(snapshot: Snapshot) -> Changes:
        olds = [_readable(snapshot, target, name) for name in names]
        return {old[:2]: str(replace(old.rule, enabled=False)) for old in olds}

    return change(backend, now, decide, "disabled", is_applied=is_applied)


def confirm(
    backend: Backend, now: float, target: str, names: Iterable[str], *, is_applied: bool = True
) -> Changed:
    """Record owner and path as they are now. Raises `RefusedError` where the netvms lead nowhere."""

    def decide(snapshot: Snapshot) -> Changes:
        changes: dict[Key, str | None] = {}
        for name in names:
            old = _readable(snapshot, target, name)
            chain = snapshot.inventory.chain(old.target)
            if chain.problem is not None:
                raise RefusedError(f"{old} was not confirmed. {chain.problem}")
            changes[old[:2]] = str(replace(old.rule, owner=old.target, path=chain.qubes))
        return changes

    return change(backend, now, decide, "confirmed", is_applied=is_applied)


def remove(
    backend: Backend, now: float, target: str, names: Iterable[str], *, is_applied: bool = True
) -> Changed:
    """Close and forget, rules that cannot be read too."""

    def decide(snapshot: Snapshot) -> Changes:
        found = [snapshot.find(target, name) for name in names]
        return {(entry.target, entry.name): None for entry in found}

    return change(backend, now, decide, "removed", is_applied=is_applied)


def _readable(snapshot: Snapshot, target: str, name: str) -> NamedRule:
    entry = snapshot.find(target, name)
    if not isinstance(entry, NamedRule):
        raise RefusedError(
            f"{entry.target} {entry.name!a} cannot be read ({entry.problem}); remove it and add it anew"
        )
    return entry
