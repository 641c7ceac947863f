# SPDX-License-Identifier: GPL-2.0-or-later
"""Changes of rules: add, set, remove, enable, disable, confirm; of marks; and `change`, which import uses.

A change is decided on one reading of the system. It is refused if it would leave a rule closed for a cause
that the rule did not have before; else all of it is stored, or nothing, and then applied.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

from qubes_fwd_qrexec.common.errors import (
    Interrupted,
    RefusedError,
    RuleError,
    StoredError,
    StoreError,
    UsageError,
)
from qubes_fwd_qrexec.common.options import Option
from qubes_fwd_qrexec.common.rules import BrokenRule, ForwardRule, NamedRule
from qubes_fwd_qrexec.common.values import QubeName, RuleName, yes_no
from qubes_fwd_qrexec.system.ending import Ending

from .apply import Outcome, due, reconcile
from .backend import Backend, put
from .deciding import Decision, decided
from .editing import edited
from .inventory import ADMIN, RULE_PREFIX, TUNNEL_FEATURE, Inventory
from .seen import Seen, check_seen
from .snapshot import TUNNEL_NAME, ByName, NewLines, Snapshot, Which, look, made_up_name, names_at
from .states import Cause, Finding, Forward, Key, NotOpenError, Plan, State


class NotMarkedError(RefusedError):
    """The qube has no mark of ours to remove."""


class System(NamedTuple):
    """What is changed: a system of qubes at the time ``now``, in UNIX seconds.

    Without ``is_applied`` a change is only stored, and `reconcile` does the rest later; without
    ``is_stored`` it is only judged. ``seen`` are rules as the user saw them when he decided on the change:
    it is refused if any of them is no longer so.
    """

    backend: Backend
    now: float
    is_applied: bool = True
    is_stored: bool = True
    seen: Mapping[Key, Seen] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Changed:
    """What a change did; ``keys`` are the rules that it was about.

    ``before`` and ``after`` are the system as it was read, and with the change. ``outcome`` is empty if the
    change was only stored, and what applying would do if it was only judged. ``decisions`` are those about
    the mode.
    """

    keys: tuple[Key, ...]
    before: Snapshot
    after: Snapshot
    plan_before: Plan
    plan: Plan
    is_applied: bool
    outcome: Outcome
    decisions: Mapping[Key, Decision]

    @property
    def forwards(self) -> list[Forward]:
        """The forwards that the change was about, as they are now."""
        return [forward for key in self.keys if (forward := self.plan.find(*key)) is not None]


def change(
    system: System,
    decide: Callable[[Snapshot], NewLines],
    done: str,
    *,
    ports_alone: bool = False,
    decides_mode: bool = False,
) -> Changed:
    """Store what ``decide`` makes of the system, all or none, and apply it.

    ``done`` is the word after "was not" in the message of a refusal; with ``ports_alone`` it is refused only
    for ports that another rule has. ``decides_mode``: of rules with mode=auto, the mode is decided. Raises
    `NotAsSeenError`, `NotOpenError`, `StoreError`, and what ``decide`` does.
    """
    backend, now, is_applied, is_stored, seen = system
    with backend.locked():
        before = look(backend, with_config=is_applied)
        for key, saw in seen.items():
            check_seen(before, key, saw, done)
        changes = decide(before)
        after = before.changed(changes)
        keys = tuple(key for key in changes if key[1] != TUNNEL_NAME)
        decisions = decided(after, keys, now, backend) if decides_mode else {}
        if decisions:
            changes = {**changes, **{key: str(decision.rule) for key, decision in decisions.items()}}
            after = before.changed(changes)
        changes = {key: value for key, value in changes.items() if _stored(before.inventory, *key) != value}
        # Judged as the last of those that claim ports, before and after.
        was = before.plan(now, changes.keys(), is_held=False)
        planned = after.plan(now, changes.keys(), is_held=False, known=was)
        for forward in (forward for forward in planned if forward.named.key in changes):
            problem = new_problem(was.find(*forward.named.key), forward, ports_alone=ports_alone)
            if problem is not None:
                raise NotOpenError(f"{forward.named} was not {done}", forward, problem)
        plan_before, outcome = before.plan(now, known=was), Outcome()
        planned = after.plan(now, known=planned)
        if is_stored:
            store(backend, before.inventory, changes)
        elif is_applied:
            outcome = due(after, now, known=planned).outcome
        is_applied = is_applied and is_stored
        if is_applied:
            try:
                planned, outcome, read = reconcile(backend, now, read=after, known=planned)
            except StoreError as error:
                raise StoredError(error) from error
            except KeyboardInterrupt:
                way_out = "not all of it may be in force; 'qvm-forward apply' completes it"
                raise Interrupted(f"the change is stored, and {way_out}") from None
            after = after._replace(inventory=read.inventory, installed=read.installed)
    return Changed(keys, before, after, plan_before, planned, is_applied, outcome, decisions)


def new_rule(
    snapshot: Snapshot, now: float, target: QubeName, rule: ForwardRule, name: RuleName | None = None
) -> NamedRule:
    """A rule as `add` stores it: with owner and path as they are now, and a name.

    Raises `RefusedError` if there is no such qube, be it a source, or the name is taken, and `UsageError` if
    its time is over.
    """
    snapshot.check_qube(target)
    if rule.expire is not None and rule.expire <= now:
        raise UsageError("expire: that time is in the past; give one in the future, such as +8h", "expire")
    for source in rule.sources.qubes:
        snapshot.check_qube(source)
    rule = replace(rule, owner=target, path=snapshot.inventory.chain(target).qubes)
    named = NamedRule(target, name or made_up_name(rule, names_at(snapshot.stored, target)), rule)
    taken = snapshot.stored.get(named.key)
    if taken is not None:
        what, command = "exists already", "change it with 'qvm-forward set"
        if isinstance(taken, BrokenRule):
            what, command = "already exists and cannot be read", "remove it first with 'qvm-forward remove"
        raise RefusedError(f"{named} {what}; take another --name, or {command} {named}'")
    return named


def add(system: System, target: QubeName, rule: ForwardRule, name: RuleName | None = None) -> Changed:
    """Make a forward and open it. Raises what `new_rule` and `change` do."""

    def decide(snapshot: Snapshot) -> NewLines:
        named = new_rule(snapshot, system.now, target, rule, name)
        return {named.key: str(named.rule)}

    return change(system, decide, "added", decides_mode=True)


def remove(system: System, which: Which) -> Changed:
    """Close forwards and delete their rules, including those that cannot be read."""

    def decide(snapshot: Snapshot) -> NewLines:
        return {(entry.target, entry.name): None for entry in snapshot.chosen(which)}

    return change(system, decide, "removed")


def enable(system: System, which: Which) -> Changed:
    """Open what was disabled; an expired rule gets the time that was left."""
    return _change_each(
        system, which, lambda old, _: replace(old.rule, enabled=True, has_ended=False), "enabled"
    )


def disable(system: System, which: Which) -> Changed:
    """Close forwards and keep their rules."""
    return _change_each(system, which, lambda old, _: replace(old.rule, enabled=False), "disabled")


def confirm(system: System, which: Which) -> Changed:
    """Record owner and path as they are now. Raises what `confirmed_rule` and `change` do."""
    return _change_each(system, which, confirmed_rule, "confirmed", decides_mode=True)


def confirmed_rule(old: NamedRule, inventory: Inventory) -> ForwardRule:
    """A rule as `confirm` stores it. Raises `RefusedError` if the netvms form a loop or lead to a missing
    qube.
    """
    chain = inventory.chain(old.target)
    if chain.problem is not None:
        raise RefusedError(f"{old} was not confirmed. {chain.problem}")
    return replace(old.rule, owner=old.target, path=chain.qubes)


def set_options(
    system: System, which: Which, options: Collection[Option], saw: Seen | None = None
) -> Changed:
    """Change options of rules, as `edited` does. ``saw`` is what the user saw of each. Raises `UsageError`,
    which names the options, for values that are wrong; else what `change` does.
    """

    def changed(old: NamedRule, inventory: Inventory) -> ForwardRule:
        try:
            return changed_rule(inventory, system.now, old, options)
        except RuleError as error:
            raise UsageError(f"{old} was not changed: {error}", *error.options) from None

    return _change_each(system, which, changed, "changed", decides_mode=True, saw=saw)


def changed_rule(inventory: Inventory, now: float, old: NamedRule, options: Iterable[Option]) -> ForwardRule:
    """A rule as `set_options` stores it. Raises `RuleError`.

    Owner and path are what somebody agreed to, and `confirm` records them. A name that is new in srchosts has
    to be a qube's.
    """
    rule = edited(old.rule, options, now)
    if rule.owner not in (old.rule.owner, old.target, None):
        raise RuleError("option 'owner'", f"it can only be {old.target}, which has the rule", "owner")
    gone = [name for name in rule.path or () if inventory.get(name) is None]
    if gone and rule.path != old.rule.path:
        problem = f"there is no qube {gone[0]}; 'qvm-forward confirm {old}' records the path"
        raise RuleError("option 'path'", problem, "path")
    for name in rule.sources.qubes:
        if name not in old.rule.sources.qubes and inventory.get(name) is None:
            raise RuleError("option 'srchosts'", f"there is no qube {name}", "srchosts")
    return rule


def mark(system: System, qube: str, *, is_marked: bool) -> Changed:
    """Mark a tunnel qube, or a template for all that are made from it; or take our mark away.

    The marks of others (Whonix, VPN handlers) are never changed. Raises `RefusedError` if there is no such
    qube, `NotMarkedError`, and what `change` does.
    """

    def decide(snapshot: Snapshot) -> NewLines:
        name = snapshot.check_qube(qube)
        known = snapshot.inventory.qubes[name]
        if known.klass == ADMIN:
            raise RefusedError(f"{name} is the administrative qube, and no traffic goes through it")
        if bool(known.features.get(TUNNEL_FEATURE)) is not is_marked:
            return {(name, TUNNEL_NAME): "1" if is_marked else None}
        if is_marked:
            return {}
        raise NotMarkedError(f"{name} has no mark of qvm-forward")

    return change(system, decide, "marked")


def _change_each(
    system: System,
    which: Which,
    changed: Callable[[NamedRule, Inventory], ForwardRule],
    done: str,
    *,
    decides_mode: bool = False,
    saw: Seen | None = None,
) -> Changed:
    """Change the chosen rules. One that cannot be read is an error, unless only a pattern matches it."""
    patterns = which.names if isinstance(which, ByName) else ()

    def decide(snapshot: Snapshot) -> NewLines:
        changes: dict[Key, str | None] = {}
        for old in snapshot.chosen(which):
            if saw is not None:
                check_seen(snapshot, (old.target, old.name), saw, done)
            if isinstance(old, NamedRule):
                changes[old.target, old.name] = str(changed(old, snapshot.inventory))
            elif not patterns or old.name in patterns:
                known = f"{old.target} {old.name!a} cannot be read ({old.problem})"
                raise RefusedError(f"{known}; remove it and add it again")
        return changes

    return change(system, decide, done, decides_mode=decides_mode)


def store(backend: Backend, inventory: Inventory, changes: NewLines) -> None:
    """Make all of the changes, or on an error none.

    On an error, and on Ctrl-C, each is put back to what it was in ``inventory``. The caller holds the lock.
    Raises `StoreError`, which lists what could not be put back.
    """
    tried: list[Key] = []
    try:
        for (qube, name), value in changes.items():
            tried.append((qube, name))
            put(backend, qube, RULE_PREFIX + name, value)
    except (StoreError, KeyboardInterrupt) as error:
        left = _put_all_back(backend, inventory, tried)
        if not left:
            raise
        why = str(error) or "interrupted"
        raise StoreError(
            f"{why}.\nNot undone, and in force with the next 'qvm-forward apply':\n{''.join(left)}"
            "'qvm-forward remove' removes what is new, 'qvm-forward import --replace' restores the rest"
        ) from error


def _stored(inventory: Inventory, qube: QubeName, name: str) -> str | None:
    """The line of a rule, or a mark."""
    return inventory.qubes[qube].features.get(RULE_PREFIX + name)


def _put_all_back(backend: Backend, inventory: Inventory, tried: Collection[Key]) -> list[str]:
    """What could not be put back, as lines. Ctrl-C again would leave a half, so nothing interrupts it."""
    try:
        with Ending():
            return [line for key in tried if (line := _put_back(backend, inventory, *key)) is not None]
    except KeyboardInterrupt:  # before the signal was held off, or after all was put back
        return _put_all_back(backend, inventory, tried)


def _put_back(backend: Backend, inventory: Inventory, qube: QubeName, name: str) -> str | None:
    """Restore a feature; if that fails, and it does differ, its old value as a line of a document."""
    old = _stored(inventory, qube, name)
    try:
        put(backend, qube, RULE_PREFIX + name, old)
    except StoreError:
        with suppress(StoreError, KeyError):
            # A write that was refused has changed nothing.
            now = backend.inventory(with_config=False).qubes[qube]
            if now.problem is None and now.features.get(RULE_PREFIX + name) == old:
                return None
        was = yes_no(bool(old)) if name == TUNNEL_NAME else "(new)" if old is None else old
        return f"  {qube} {ascii(name)[1:-1]} {ascii(was)[1:-1]}\n"
    return None


def new_problem(old: Forward | None, new: Forward, *, ports_alone: bool = False) -> Finding | None:
    """What would newly keep a rule closed; if it was and stays disabled, what would once it is enabled."""
    if old is not None and old.named.rule.enabled is not new.named.rule.enabled:
        if old.named.rule.enabled:
            return None  # what closes is never refused
        old = None
    stop = _stop(new)
    if not ports_alone and stop is not None and stop.cause.state is State.REFUSED:
        before = None if old is None else _stop(old)
        if before is None or (before.cause, old and old.exposed) != (stop.cause, new.exposed):
            return stop
    conflict = new.finding(Cause.CONFLICT)
    return None if old is not None and conflict == old.finding(Cause.CONFLICT) else conflict


def _stop(forward: Forward) -> Finding | None:
    """What keeps it closed, or would if it were enabled."""
    stops = (stop for stop in forward.stops if stop.cause not in (Cause.DISABLED, Cause.CONFLICT))
    return next(stops, None)
