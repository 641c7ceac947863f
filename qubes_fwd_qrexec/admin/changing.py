# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands that change rules: add, set, remove, enable, disable, confirm.

Each holds the lock, looks at the system once, plans with the change in it, and refuses before anything
is stored. Then it stores, and applies; and without the lock it asks the listeners whether they have it open.
"""

from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

from qubes_fwd_qrexec.common.config import Service
from qubes_fwd_qrexec.common.errors import RefusedError, RuleError, StoreError, TextError, UsageError
from qubes_fwd_qrexec.common.options import Option
from qubes_fwd_qrexec.common.rules import (
    NO_LIMITS,
    BrokenRule,
    ForwardRule,
    ForwardType,
    NamedRule,
    OnExpire,
    Transport,
)
from qubes_fwd_qrexec.common.values import QubeName, Sources

from .apply import Outcome, others
from .expiry import parse_expire, print_expire
from .inventory import Inventory
from .judged import denials
from .leftovers import listening
from .reconcile import apply
from .snapshot import Snapshot
from .states import Cause, Finding, Forward, NotOpenError, Plan, State
from .stock import Stock, draining, ended, left_over
from .store import made_up_name, store
from .views import reasons, steps
from .views.plans import forward_as_json
from .views.render import escaped
from .views.session import Session

_V = TypeVar("_V")
_NO_FROM = (
    "--from is missing: say who may connect, such as --from 192.168.0.0/16 (more with commas or by saying "
    "it again), or --from any to let in everybody who can reach the port"
)


def add(args: Namespace, session: Session) -> int:
    """Make a forward and open it."""
    if not args.sources:
        raise UsageError(_NO_FROM)
    with session.backend.locked():
        snapshot = session.look()
        named = _new_rule(args, session, snapshot)
        if snapshot.stored.find(named.target, named.name) is not None:
            raise RefusedError(_taken(named, snapshot))
        _check_new(named, session, snapshot)
        done = _carried_out(args, session, snapshot, [named])
    return _finish(session, done, "stored")


def _taken(named: NamedRule, snapshot: Snapshot) -> str:
    if isinstance(snapshot.stored.find(named.target, named.name), BrokenRule):
        return (
            f"{named} exists already and cannot be read; take another --name, or remove it first with "
            f"'qvm-forward remove {named}'"
        )
    return f"{named} exists already; take another --name, or change it with 'qvm-forward set {named}'"


def _new_rule(args: Namespace, session: Session, snapshot: Snapshot) -> NamedRule:
    listen_ports, target_ports = args.ports
    target: QubeName = args.qube
    known = snapshot.inventory.get(target)
    expire_at = partial(parse_expire, now=session.now)
    try:
        rule = ForwardRule(
            listen_ports=listen_ports,
            target_ports=target_ports,
            sources=_parsed("--from", Sources.parse, ",".join(args.sources)),
            mode=args.mode,
            forward_type=ForwardType.INTERNAL if args.internal else ForwardType.EXTERNAL,
            via=args.via,
            proto=args.proto,
            listen=args.listen,
            transport=args.transport,
            proxy=args.proxy,
            autostart=args.autostart,
            on_expire=args.on_expire,
            enabled=not args.disabled,
            owner=target,
            path=() if known is None else snapshot.inventory.chain(target).qubes,
            follow_netvm=args.follow_netvm,
            bypass_tunnel=args.bypass_tunnel,
            limits=args.limits or NO_LIMITS,
            expire=None if args.expire is None else _parsed("--expire", expire_at, args.expire),
            comment=args.comment,
        )
    except RuleError as error:
        raise UsageError(str(error)) from None
    if rule.expire is not None and rule.expire <= session.now:
        raise UsageError(f"--expire {args.expire} is over already; name a time to come, such as +8h")
    return NamedRule(target, args.name or made_up_name(rule, snapshot.stored.names(target)), rule)


def _parsed(place: str, parse: Callable[[str], _V], text: str) -> _V:
    """Raises `RuleError` that names the place."""
    try:
        return parse(text)
    except TextError as error:
        raise RuleError(place, str(error)) from error


def _check_new(named: NamedRule, session: Session, snapshot: Snapshot) -> None:
    """A rule that could not be opened is not stored; a disabled one may wait for its port."""
    forward = _planned_with(_enabled(named), session, snapshot)
    if not forward.is_live and forward.cause is not Cause.CONFLICT:
        raise NotOpenError(f"{named} was not added", forward, forward.decisive)
    if forward.conflict is not None and named.rule.enabled:
        raise NotOpenError(f"{named} was not added", forward, forward.conflict)


def _planned_with(named: NamedRule, session: Session, snapshot: Snapshot) -> Forward:
    """What would become of a rule, with those that are stored before it."""
    changed = snapshot._replace(stored=snapshot.stored.with_rules([named]))
    planned = changed.plan(session.now, newcomers=[named[:2]], is_held=False)
    forward = planned.find(named.target, named.name)
    if forward is None:
        raise StoreError(f"{named} is missing from its own plan")
    return forward


def set_options(args: Namespace, session: Session) -> int:
    """Change options by their names."""
    with session.backend.locked():
        snapshot = session.look()
        old = _readable(snapshot, args.qube, args.name)
        try:
            rule = _with_options(old.rule, args.options, session.now)
            _check_recorded(old, rule, snapshot.inventory)
        except RuleError as error:
            raise UsageError(f"{old} was not changed: {error}") from None
        done = _change(args, session, snapshot, [old._replace(rule=rule)], "changed")
    return _finish(session, done, "changed")


def _check_recorded(old: NamedRule, rule: ForwardRule, inventory: Inventory) -> None:
    """Owner and path are what somebody agreed to, and `confirm` records them. Raises `RuleError`."""
    if rule.owner not in (old.rule.owner, old.target, None):
        raise RuleError("option 'owner'", f"it can be {old.target} alone, which has the rule")
    gone = [name for name in rule.path or () if inventory.get(name) is None]
    if gone and rule.path != old.rule.path:
        raise RuleError(
            "option 'path'", f"there is no qube {gone[0]}; 'qvm-forward confirm {old}' records the path"
        )


def _with_options(rule: ForwardRule, texts: Iterable[str], now: float) -> ForwardRule:
    """Raises `RuleError`."""
    options = rule.options()
    known = ForwardRule.option_names()
    given: set[str] = set()
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise RuleError(repr(text), "an option is written name=value")
        if name in given:
            raise RuleError(f"option {name!a}", "stands twice")
        given.add(name)
        if name == "expire":
            expire = _parsed(f"option {name!a}", partial(parse_expire, now=now), value or "never")
            value = "" if expire is None else str(expire)
            options.pop("ended", None)
        if value:
            options[name] = value
        elif name in known:
            options.pop(name, None)
        else:
            raise RuleError(f"option {name!a}", f"unknown option; known are {', '.join(known)}")
    return ForwardRule.from_options(Option(n, v, f"option {n!a}") for n, v in options.items())


def enable(args: Namespace, session: Session) -> int:
    """Open what was disabled."""
    return _replace_all(args, session, "enabled", enabled=True)


def disable(args: Namespace, session: Session) -> int:
    """Close and keep."""
    return _replace_all(args, session, "disabled", enabled=False)


def _replace_all(args: Namespace, session: Session, done: str, *, enabled: bool) -> int:
    with session.backend.locked():
        snapshot = session.look()
        olds = [_readable(snapshot, args.qube, name) for name in dict.fromkeys(args.name)]
        # Whoever says enable gives an ended rule what is left of its time.
        changed = [
            old._replace(
                rule=replace(old.rule, enabled=enabled, has_ended=old.rule.has_ended and not enabled)
            )
            for old in olds
        ]
        carried_out = _change(args, session, snapshot, changed, done)
    return _finish(session, carried_out, done)


def confirm(args: Namespace, session: Session) -> int:
    """Record owner and path as they are now."""
    with session.backend.locked():
        snapshot = session.look()
        changed = []
        for name in dict.fromkeys(args.name):
            old = _readable(snapshot, args.qube, name)
            chain = snapshot.inventory.chain(old.target)
            if chain.problem is not None:
                raise RefusedError(f"{old} was not confirmed, as there is no whole way. {chain.problem}")
            changed.append(old._replace(rule=replace(old.rule, owner=old.target, path=chain.qubes)))
        done = _change(args, session, snapshot, changed, "confirmed")
    return _finish(session, done, "confirmed")


def remove(args: Namespace, session: Session) -> int:
    """Close and forget, broken rules too."""
    with session.backend.locked():
        snapshot = session.look()
        entries = [snapshot.find(args.qube, name) for name in dict.fromkeys(args.name)]
        before = snapshot.plan(session.now)
        store(session.backend, snapshot.inventory, {(entry.target, entry.name): None for entry in entries})
        applied, outcome = (None, Outcome()) if args.no_apply else _apply(session)
    named = [entry for entry in entries if isinstance(entry, NamedRule)]
    left = _left_over(before, applied, entries, snapshot.inventory, session)
    if session.is_json:
        removed = [{"qube": entry.target, "name": entry.name} for entry in entries]
        session.say_json({"removed": removed} | _as_json(session, applied, outcome, left))
    else:
        for entry in entries:
            closed = _and_closed(entry, applied, outcome, left)
            session.say(f"Forward {entry.target} {entry.name!s} is removed{closed}.\n")
        _say_rest(session, applied, outcome, named, left)
    return _status(left)


def _apply(session: Session) -> tuple[Plan, Outcome]:
    applied = apply(session.backend, session.now, changed="the rules are changed")
    session.warn_unread(applied.snapshot)
    return applied.plan, applied.outcome


def _left_over(
    before: Plan,
    applied: Plan | None,
    asked: Iterable[NamedRule | BrokenRule],
    inventory: Inventory,
    session: Session,
) -> tuple[Stock, ...]:
    """What goes on and cannot be ended from here; its listeners are asked without the lock."""
    if applied is None:
        return ()
    live = {forward.source[:2] for forward in (*before.live, *applied.live)}
    # They were closed before, and may drain since.
    old = {(entry.target, str(entry.name)) for entry in asked} - live
    over = left_over(ended(before, applied), session.backend)
    return over + draining(old, listening(applied, inventory) if old else (), session.backend)


def _as_json(
    session: Session, applied: Plan | None, outcome: Outcome, left: tuple[Stock, ...]
) -> dict[str, Any]:
    return {
        "applied": applied is not None,
        "is_watched": session.backend.unwatched() is None,
        "steps": [steps.as_json(step) for step in outcome.done],
        "ended": [steps.ended_as_json(ended) for ended in outcome.ended],
        "stock": [stock.as_json() for stock in left],
    }


def _and_closed(
    entry: NamedRule | BrokenRule, applied: Plan | None, outcome: Outcome, left: Iterable[Stock]
) -> str:
    """Never "closed" where anything still flows."""
    if applied is None:
        return "; 'qvm-forward apply' closes it"
    flows = any(stock.target == entry.target and stock.name == entry.name for stock in left)
    drains = any(target.target == entry.target and target.draining for target in outcome.ended)
    if flows or drains:
        return " and takes no new connection, but what is open may go on"
    return " and closed"


def _say_rest(
    session: Session,
    applied: Plan | None,
    outcome: Outcome,
    asked: Iterable[NamedRule],
    left: Iterable[Stock],
) -> None:
    """What else was opened and closed, and what goes on."""
    for target in outcome.ended:
        if target.draining:
            session.say(f"{steps.ended_words(target)}.\n")
    for stock in left:
        session.warn(f"still open: {stock.words()}")
    if applied is not None:
        session.say("".join(f"{line}\n" for line in others(outcome, applied, asked)))
        session.say_unwatched(applied, asked)


def _status(left: Iterable[Stock]) -> int:
    """What was to be cut and goes on is no success; what may drain was asked for."""
    return 1 if any(stock.left_s is None for stock in left) else 0


def _change(
    args: Namespace, session: Session, snapshot: Snapshot, changed: list[NamedRule], done: str
) -> "_Done":
    """Store changed rules unless one of them could not be opened for a cause that it did not have before.

    One that is disabled is judged as if it was enabled, but it claims no ports.
    """
    before = snapshot.plan(session.now, is_held=False)
    for named in changed:
        # One by one on top of each other: two of them may conflict.
        is_enabled = named.rule.enabled
        # Judged as the last, as it is with the change in it.
        old = snapshot.plan(session.now, [named[:2]], is_held=False).find(*named[:2])
        if old is not None and old.source.rule.enabled and not is_enabled:
            continue  # what closes is never refused
        forward = _planned_with(_enabled(named), session, snapshot)
        if old is not None and not old.source.rule.enabled and not is_enabled:
            old = _planned_with(_enabled(old.source), session, snapshot)
        problem = _new_problem(old, forward, is_enabled=is_enabled)
        if problem is not None:
            raise NotOpenError(f"{named} was not {done}", forward, problem)
        snapshot = snapshot._replace(stored=snapshot.stored.with_rules([named]))
    return _carried_out(args, session, snapshot, changed, before)


def _new_problem(old: Forward | None, new: Forward, *, is_enabled: bool) -> Finding | None:
    """What keeps a rule from being open that did not before."""
    if new.conflict is not None and is_enabled:
        was = None if old is None or old.conflict is None else old.conflict.rival
        return None if new.conflict.rival == was else new.conflict
    if new.state is not State.REFUSED or new.cause is Cause.CONFLICT:
        return None
    is_old = old is not None and (old.cause, old.exposed) == (new.cause, new.exposed)
    return None if is_old else new.decisive


def _enabled(named: NamedRule) -> NamedRule:
    return named._replace(rule=replace(named.rule, enabled=True))


def _readable(snapshot: Snapshot, target: str, name: str) -> NamedRule:
    entry = snapshot.find(target, name)
    if not isinstance(entry, NamedRule):
        raise RefusedError(
            f"{entry.target} {entry.name!a} cannot be read ({entry.problem}); remove it and add it anew"
        )
    return entry


class _Done(NamedTuple):
    """A change that was made: its forwards as they are now; the plans before and, if applied, after it."""

    forwards: list[Forward]
    inventory: Inventory
    before: Plan
    applied: Plan | None
    outcome: Outcome


def _carried_out(
    args: Namespace,
    session: Session,
    snapshot: Snapshot,
    changed: Iterable[NamedRule],
    before: Plan | None = None,
) -> _Done:
    """Store and apply."""
    store(
        session.backend,
        snapshot.inventory,
        {(named.target, named.name): str(named.rule) for named in changed},
    )
    before = before or snapshot.plan(session.now, is_held=False)
    applied, outcome = (None, Outcome()) if args.no_apply else _apply(session)
    shown = applied or session.look().plan(session.now)
    forwards = [f for named in changed if (f := shown.find(named.target, named.name)) is not None]
    return _Done(forwards, snapshot.inventory, before, applied, outcome)


def _troubles(done: _Done, session: Session) -> dict[tuple[str, str], str]:
    """What listeners say, who are asked without the lock; and where there is none to ask."""
    from . import uptake

    if done.applied is None:
        return {}
    found = {f.source[:2]: text for f in done.forwards if (text := uptake.lacking(f, done.inventory))}
    asked = [f for f in done.forwards if uptake.can_be_asked(f, done.inventory)]
    olds = {f.source[:2]: f.config for f in done.before.live}
    renewed = [f for f in asked if olds.get(f.source[:2], f.config) != f.config]
    return found | uptake.troubles(asked, renewed, session.backend)


def _finish(session: Session, carried_out: _Done, done: str) -> int:
    """Say in plain sentences what is open now and for whom, without the warnings told before."""
    forwards, planned = carried_out.forwards, carried_out.applied
    troubles = _troubles(carried_out, session)
    denied = {} if planned is None else denials(forwards, session.backend)
    asked = [forward.source for forward in forwards]
    left = _left_over(carried_out.before, planned, asked, carried_out.inventory, session)

    def notes(forward: Forward) -> list[str]:
        trouble, old = troubles.get(forward.source[:2]), carried_out.before.find(*forward.source[:2])
        first = [text for text in (denied.get(forward.source[:2]), trouble) if text is not None]
        return [*first, *_narrowing(old, forward), *warnings(forward)]

    if session.is_json:
        found = [forward_as_json(f) | {"warnings": notes(f)} for f in forwards]
        session.say_json({"forwards": found} | _as_json(session, planned, carried_out.outcome, left))
        return _status(left)
    for forward in forwards:
        if forward.is_live and planned is None:
            session.say(
                f"Forward {forward.source} is {done}; 'qvm-forward apply' puts it in force. "
                f"Then: {reasons.sentence(forward)}\n"
            )
        elif forward.state is State.DISABLED:
            closed = _and_closed(forward.source, planned, carried_out.outcome, left)
            session.say(f"Forward {forward.source} is {done}{closed}. {reasons.sentence(forward)}\n")
        else:
            session.say(
                f"Forward {forward.source} is {done} and {forward.state}. {reasons.sentence(forward)}\n"
            )
        if forward.is_live and forward.source.rule.expire is not None:
            session.say(f"It ends {print_expire(forward.source.rule.expire, session.now)}.\n")
        old = carried_out.before.find(*forward.source[:2])
        told = [] if old is None else warnings(old)
        for note in notes(forward):
            if note not in told:
                session.say(f"Note: {escaped(note)}.\n")
    _say_rest(session, planned, carried_out.outcome, asked, left)
    return _status(left)


def _narrowing(old: Forward | None, new: Forward) -> list[str]:
    """What becomes of connections that were allowed before the change, and are no more."""
    if old is None or old.config is None or new.config is None or not new.config.narrows(old.config):
        return []
    if new.config.on_expire is OnExpire.DRAIN:
        return ["connections that it no longer allows go on for an hour at most, as it says on-expire=drain"]
    return ["connections that it no longer allows are cut"]


def warnings(forward: Forward) -> list[str]:
    """What the user should know of a live forward beside that it is open."""
    if not forward.is_live:
        return []
    found = [*reasons.notes(forward), *reasons.hints(forward)]
    if forward.service is Service.CONNECT_TCP:
        found.append(reasons.transport_reason(forward))
    elif forward.transport is Transport.CALL:
        found.append(
            f"where {forward.source.target} serves calls by qubes-forward-service.socket, "
            "an answer that breaks off may look complete to the client"
        )
    if forward.source.rule.proxy == "off":
        way_out = "see that it asks everybody for a password"
        if forward.transport is Transport.MUX:
            way_out += ", or tell it the client's address with proxy=v2"
        found.append(
            f"the server in {forward.source.target} sees all of these connections come from 127.0.0.1, "
            f"which some servers trust: {way_out}"
        )
    return found
