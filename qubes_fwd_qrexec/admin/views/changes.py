# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands that change rules, as users write them; and the words for what any change did."""

from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any, NamedTuple

from qubes_fwd_qrexec.admin import changing
from qubes_fwd_qrexec.admin.apply import Kind
from qubes_fwd_qrexec.admin.changing import Changed, System
from qubes_fwd_qrexec.admin.confirming import Lack, Place, Unconfirmed, unconfirmed
from qubes_fwd_qrexec.admin.revoking import DRAIN_S
from qubes_fwd_qrexec.admin.seen import Seen
from qubes_fwd_qrexec.admin.snapshot import ByName, parse_new_name
from qubes_fwd_qrexec.admin.states import Cause, Forward, Key, State
from qubes_fwd_qrexec.common.config import Service, parse_key
from qubes_fwd_qrexec.common.errors import (
    ConfigError,
    Interrupted,
    RuleError,
    StoredError,
    TextError,
    UsageError,
)
from qubes_fwd_qrexec.common.nftconfig import is_nft_key, parse_nft_key
from qubes_fwd_qrexec.common.rules import BrokenRule, ForwardRule, Mode, NamedRule, OnExpire

from . import carried, confirmed, given, reasons, steps, travel
from .judged import denials
from .listeners import GoesOn, Heard, Uptake, ask_after
from .render import forward_as_json
from .session import Session
from .tables import escaped
from .times import print_expire

_NONE = "No forwards."
# What each does, and the word for that.
_SWITCHES = {
    "enable": (changing.enable, "enabled"),
    "disable": (changing.disable, "disabled"),
    "confirm": (changing.confirm, "confirmed"),
}


class After(NamedTuple):
    """A change, and what is known of it afterwards.

    ``told`` is what qubes are to have of forwards by nft, ``doubts`` are qubes that do not confirm that, and
    ``still_open`` those about what was to be closed and what nobody has closed. ``goes_on`` is what listeners
    still have of what is closed. ``news`` are warnings about each forward that come from the change.
    ``watch_start`` starts `watch`, where that is not running.
    """

    changed: Changed
    told: Mapping[Place, str | None]
    doubts: tuple[Unconfirmed, ...]
    still_open: tuple[Unconfirmed, ...]
    goes_on: tuple[GoesOn, ...]
    news: Mapping[Key, list[str]]
    watch_start: str | None


def followed(changed: Changed, session: Session) -> After:
    """Ask what became of a change. Raises `StoredError` if not all of it could be applied."""
    try:
        return _followed(changed, session)
    except KeyboardInterrupt:
        done = "stored"
        if changed.is_applied:
            done += ", and everything is held" if changed.plan.is_held else ", and in force"
        raise Interrupted(f"the change is {done}; 'qvm-forward status' shows what came of it") from None


def _followed(changed: Changed, session: Session) -> After:
    heard, denied, outcome = Heard({}), dict[Key, str](), changed.outcome
    told: dict[Place, str | None] = {}
    doubts: tuple[Unconfirmed, ...] = ()
    if changed.is_applied:
        told = _perhaps_draining(changed, session.now) | outcome.told
        doubts = unconfirmed(told, session.backend)
        if steps.troubles(outcome):
            # Another rule may be what is in trouble, and this one closed as far as dom0 can tell.
            confirmed.warn(doubts, told, outcome.before, session)
        steps.check(outcome, StoredError)
        was, planned, inventory = changed.plan_before, changed.plan, changed.after.inventory
        heard = ask_after(was, planned, changed.keys, inventory, session.backend)
        denied = denials(changed.forwards, session.backend)
    still_open = confirmed.still_open(doubts, told, outcome.before)
    news = _news(changed, heard.uptakes, denied)
    return After(changed, told, doubts, still_open, heard.goes_on, news, session.backend.unwatched())


def _perhaps_draining(changed: Changed, now: float) -> dict[Place, str | None]:
    """Where connections by nft may still finish of rules that had already expired: nobody is told about them
    now.
    """
    found: dict[Place, str | None] = {}
    for old in (changed.plan_before.find(*key) for key in changed.keys):
        if old is None or old.mode is not Mode.NFT or old.finding(Cause.EXPIRED) is None:
            continue
        (target, name, rule), new = old.named, changed.plan.find(*old.named.key)
        is_live_again = new is not None and bool(new.nft_configs)
        if rule.on_expire is OnExpire.DRAIN and (rule.expire or now) + DRAIN_S > now and not is_live_again:
            found |= {(qube, f"nft.{target}.{name}"): None for qube in (*old.hops, target)}
    return found


def add(args: Namespace, session: Session) -> int:
    rule, name = given.new_rule(args, session.now), None
    try:
        name = None if args.name is None else parse_new_name(args.name)
    except TextError as error:
        raise UsageError(f"--name: {error}") from None
    return report(changing.add(_system(args, session), args.qube, rule, name), session, "stored")


def set_options(args: Namespace, session: Session) -> int:
    name, options = given.changes(args, session.now)
    if not options:
        raise UsageError("nothing to change: say what to change, such as expire=8h or --expire 8h")
    if args.was is not None:
        try:
            ForwardRule.parse(args.was)
        except RuleError as error:
            raise UsageError(f"--was: {error}") from None
    which, saw = ByName(args.qube, [] if name is None else [name]), args.was and Seen(args.was)
    changed = changing.set_options(_system(args, session), which, options, saw)
    _warn_broken(changed.after.chosen(which), session)
    return report(changed, session, "changed", "as it was")


def switch(args: Namespace, session: Session) -> int:
    """Open what was disabled, close it and keep its rule, or record owner and path as they are now."""
    change, done = _SWITCHES[args.command]
    which = ByName(args.qube, _names(args))
    changed = change(_system(args, session), which)
    _warn_broken(changed.after.chosen(which), session)
    return report(changed, session, done, f"{done} already")


def _warn_broken(chosen: Iterable[NamedRule | BrokenRule], session: Session) -> None:
    """Warn of rules that a pattern stands for and that were not changed."""
    for entry in chosen:
        if isinstance(entry, BrokenRule):
            session.warn(f"{entry.target} {entry.name!a} stays as it is, since it cannot be read")


def remove(args: Namespace, session: Session) -> int:
    """Close and forget, broken rules too."""
    names = _names(args)
    if not names:
        raise UsageError("name the rules to remove, or use --all")
    return removed(changing.remove(_system(args, session), ByName(args.qube, names)), session)


def removed(changed: Changed, session: Session) -> int:
    """Print what was closed and forgotten. Returns the exit status."""
    after = followed(changed, session)
    keys = after.changed.keys
    lines = [f"Forward {qube} {name!s} is removed{closed(after, (qube, name))}." for qube, name in keys]
    return tell(
        after, session, lines or [_NONE], data={"removed": [{"qube": q, "name": name} for q, name in keys]}
    )


def _names(args: Namespace) -> list[str]:
    """The names and patterns of rules. Raises `UsageError`."""
    if args.all and args.names:
        raise UsageError("--all already stands for all names; leave out one or the other")
    if args.qube is None and not args.all:
        raise UsageError("name the qube, or use --all for all forwards of all qubes")
    return ["*"] if args.all else args.names


def _system(args: Namespace, session: Session) -> System:
    return System(session.backend, session.now, is_applied=not args.no_apply)


def report(changed: Changed, session: Session, done: str, was_so: str = "") -> int:
    """Print what is open now, for whom, until when, and the warnings. Returns the exit status.

    ``done`` says what was done with a rule, and ``was_so`` that it needed no change.
    """
    after = followed(changed, session)
    return tell(after, session, _about(after, session.now, done, was_so))


def _about(after: After, now: float, done: str, was_so: str) -> Iterator[str]:
    if not after.changed.keys:
        yield _NONE
    for forward in after.changed.forwards:
        is_same = after.changed.before.stored.get(forward.named.key) == forward.named
        yield f"Forward {forward.named} is {was_so if is_same else done}{_state(after, forward)}"
        if forward.is_live and forward.named.rule.expire is not None:
            yield f"It ends {print_expire(forward.named.rule.expire, now)}."
        old = after.changed.plan_before.find(*forward.named.key)
        known = [] if old is None else warnings(old)
        yield from (f"Note: {escaped(note)}." for note in notes(after, forward) if note not in known)


def _state(after: After, forward: Forward) -> str:
    """What became of a forward that the change was about."""
    sentence = reasons.sentence(forward)
    if forward.state is State.DISABLED:
        return f"{closed(after, forward.named.key)}. {sentence}"
    if forward.is_live and not after.changed.is_applied:
        return f"; 'qvm-forward apply' puts it in force. Then: {sentence}"
    if qubes := sorted(
        {doubt.qube for doubt in after.still_open if parse_nft_key(doubt.key) == forward.named.key}
    ):
        return f", but {' and '.join(qubes)} may still let in more, as before. {sentence}"
    return f" and {forward.state}. {sentence}"


def closed(after: After, key: Key) -> str:
    """The sentence for what was closed. It never says "closed" where connections go on."""
    if not after.changed.is_applied:
        return "; 'qvm-forward apply' closes it"
    if any(parse_nft_key(doubt.key) == key for doubt in after.still_open):
        return ", but no qube confirms that it is closed"
    return " and accepts no new connections; open ones may go on" if _flows(after, key) else " and closed"


def _flows(after: After, key: Key | None) -> bool:
    """Whether connections of a closed forward may go on, according to the listeners that were asked."""
    return key is not None and (
        any(doubt.lack == Lack.DRAINS and parse_nft_key(doubt.key) == key for doubt in after.doubts)
        or any((left.target, left.name) == key for left in after.goes_on)
        or any(ended.target == key[0] and ended.draining for ended in after.changed.outcome.ended)
    )


def notes(after: After, forward: Forward) -> list[str]:
    """Warnings about a forward, new ones first."""
    return [*after.news[forward.named.key], *warnings(forward)]


def _news(
    changed: Changed, uptakes: Mapping[Key, tuple[Uptake, ...]], denied: Mapping[Key, str]
) -> dict[Key, list[str]]:
    """Warnings that come from the change: about its forwards, what their listeners made of it, and where
    dom0's policy denies calls all the same.
    """
    needed, needed_before = map(travel.calls_needed, (changed.plan, changed.plan_before))
    hiding = {
        (old.named.target, old.named.rule.target_ports)
        for old in changed.plan_before.live
        if travel.hides_clients(old) is not None
    }
    news: dict[Key, list[str]] = {}
    for forward in changed.forwards:
        (target, _, rule), key = forward.named, forward.named.key
        old = changed.plan_before.find(*key)
        found = news[key] = []
        if (decision := changed.decisions.get(key)) is not None:
            found.append(travel.decision(forward, decision))
        if key in denied:
            found.append(f"dom0 denies its calls: {denied[key]}")
        found += dict.fromkeys(filter(None, (uptake.note(forward) for uptake in uptakes.get(key, ()))))
        for on_expire, narrowed in _narrowed(old, forward).items():
            is_cut = on_expire is OnExpire.CUT
            then = "are cut" if is_cut else "may go on for up to an hour, because of on-expire=drain"
            found.append(f"{' and '.join(narrowed)} that it no longer allows {then}")
        if (room := travel.room(forward, needed, needed_before)) is not None:
            found.append(room)
        # That a server does not see who its clients are is no news where it did not before.
        hides, is_known = travel.hides_clients(forward), (target, rule.target_ports) in hiding
        if forward.is_live and hides is not None and travel.hides_clients(old) is None and not is_known:
            found.append(hides)
    return news


def _narrowed(old: Forward | None, forward: Forward) -> dict[OnExpire, list[str]]:
    """What a forward may have had that it does not allow now, by how it ends; nothing where it has another
    mode. A protocol that it no longer has ends as it was told before.
    """
    configs = {config.proto: config for config in forward.listener_configs}
    told = () if old is None or not configs else old.listener_configs
    found: dict[OnExpire, list[str]] = {}
    for was in told:
        config = configs.get(was.proto)
        if config is None or config.narrows(was):
            found.setdefault((config or was).on_expire, []).append(carried.live(was.proto, None))
    return found


def warnings(forward: Forward) -> list[str]:
    """Warnings about a forward that is open, whatever was changed."""
    if not forward.is_live:
        return []
    target = forward.named.target
    found = [*reasons.notes(forward), *reasons.hints(forward)]
    if forward.service is Service.CONNECT_TCP:
        found.append(travel.transport_reason(forward))
    if forward.mode is Mode.NFT:
        found.append(travel.safety(forward))
        found.append(f"the server in {target} must listen on more than 127.0.0.1")
    return found


def tell(
    after: After,
    session: Session,
    lines: Iterable[str],
    *,
    last: Iterable[str] = (),
    data: Mapping[str, object] = MappingProxyType({}),
) -> int:
    """Print a change: ``lines``, what else opened and closed, what goes on, ``last``; or JSON with ``data``.

    Returns the exit status: what was to be cut and goes on is no success; what may drain was asked for.
    """
    changed, goes_on = after.changed, after.goes_on
    if session.is_json:
        session.say_json({**data, **as_json(after)})
    else:
        session.say_done("".join(f"{line}\n" for line in (*lines, *_others(after))))
        for left in goes_on:
            session.warn(f"still open: {left}")
        is_live = changed.is_applied and any(forward.is_live for forward in changed.forwards)
        if is_live and after.watch_start is not None:
            session.say(
                "Note: 'qvm-forward watch' is not running, so dom0 does nothing when a rule expires or a "
                f"netvm changes; to start it: {after.watch_start}.\n"
            )
        session.say_done("".join(f"{line}\n" for line in last))
    session.warn_unread(changed.after)
    if not session.is_json:
        confirmed.warn(after.doubts, after.told, changed.outcome.before, session)
    return 1 if after.still_open or any(left.left_s is None for left in goes_on) else 0


def _others(after: After) -> Iterator[str]:
    """A sentence for each forward that was opened or closed besides, and for each target where calls go on.

    A mark closes some; and rules that were restored, or changed by Qubes' own tools, come into force with
    whatever command is next.
    """
    told: set[Key] = set(after.changed.keys)
    for step in after.changed.outcome.done:
        if not step.tells:
            continue
        text, key, forward = step.key, None, None
        with suppress(ConfigError):
            key = parse_nft_key(text) if is_nft_key(text) else parse_key(text)[:2]
            forward = after.changed.plan.find(*key)
        # By nft a qube is told for each other one of its path, and one sentence is enough.
        if key in told:
            continue
        if key is not None:
            text = " ".join(key)
            told.add(key)
        what = "Opened" if step.was is None else "Changed"
        # Where one protocol is closed, the other may go on there.
        is_left = forward is not None and forward.listener_configs and step.qube == forward.exposed
        if step.kind is Kind.REMOVE_CONFIG and not is_left:
            what = "Closed to new connections" if _flows(after, key) else "Closed"
        why = "." if forward is None else f". {reasons.sentence(forward)}"
        yield f"{what} at {step.qube}: {text}{why}"
    yield from (f"{steps.ended_words(ended)}." for ended in after.changed.outcome.ended if ended.draining)


def as_json(after: After) -> dict[str, Any]:
    """What a change did, for programs."""
    outcome = after.changed.outcome
    return {
        "forwards": [forward_as_json(f) | {"warnings": notes(after, f)} for f in after.changed.forwards],
        "applied": after.changed.is_applied,
        "is_watched": after.watch_start is None,
        "steps": [steps.as_json(step) for step in outcome.done],
        "ended": [ended._asdict() for ended in outcome.ended],
        "goes_on": [left._asdict() for left in after.goes_on],
        "unconfirmed": [doubt._asdict() for doubt in after.doubts],
        "still_open": [doubt._asdict() for doubt in after.still_open],
    }
