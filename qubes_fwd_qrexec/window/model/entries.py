# SPDX-License-Identifier: GPL-2.0-or-later
"""What the window shows of each rule, except what depends on the time or a filter. It is made once for each
look, in the worker that looks, so the main thread only selects.
"""

from collections.abc import Mapping
from typing import NamedTuple

from qubes_fwd_qrexec.admin.apply import Step
from qubes_fwd_qrexec.admin.states import Cause, Forward, Key, Plan, State
from qubes_fwd_qrexec.admin.views import entrance
from qubes_fwd_qrexec.admin.views.render import Role, exposed_at, roles_of
from qubes_fwd_qrexec.admin.views.tables import escaped
from qubes_fwd_qrexec.common.rules import BrokenRule, Mode
from qubes_fwd_qrexec.common.values import Proto

from .inforce import Force, InForce, differing
from .words import _

AS_ASKED = InForce(Force.AS_ASKED)


class Entry(NamedTuple):
    """One rule.

    ``mark`` is the word for what it is. ``state`` is the one that is shown: what waits for anything is
    waiting, and what is still in force is active. ``cause`` is why the rule itself is as it is. A search
    looks in ``searched``, in small letters. ``roles`` are those of all qubes that it passes. ``ports`` are
    how many are open now, and ``waiting`` how many more open by themselves when qubes start. ``expire`` is
    in UNIX seconds.
    """

    key: Key
    mark: str
    state: State
    cause: Cause
    force: Force
    who: str
    at: str
    mode: str
    to: str
    comment: str
    note: str
    searched: str
    roles: Mapping[str, Role]
    is_anybody: bool
    is_live: bool
    is_denied: bool = False
    ports: int = 0
    waiting: int = 0
    expire: int | None = None
    has_ended: bool = False


class Entries(NamedTuple):
    """All rules in the order of target and name; and what is still in force of rules that are gone."""

    rules: tuple[Entry, ...]
    orphans: tuple[InForce, ...]


def entries(plan: Plan, due: tuple[Step, ...], denials: Mapping[Key, str]) -> Entries:
    """What is shown of a plan; ``due`` and ``denials`` are as in `Look`."""
    differs = differing(plan, due)
    found = [
        _of_forward(forward, differs.get(key, AS_ASKED), denials.get(key))
        for key, forward in ((forward.named.key, forward) for forward in plan)
    ]
    found += [_of_broken(rule, differs.get(rule.key, AS_ASKED)) for rule in plan.broken]
    found.sort(key=lambda entry: entry.key)
    known = {entry.key for entry in found}
    return Entries(tuple(found), tuple(differs[key] for key in differs.keys() - known))


def _of_forward(forward: Forward, now: InForce, denial: str | None) -> Entry:
    (target, name, rule), decisive = forward.named, forward.decisive
    state, is_live = decisive.cause.state, forward.is_live
    protos = rule.proto.each
    if now.force is Force.NOT_YET:
        denial = None  # as it is not asked for yet
    if is_live and (now.force is Force.NOT_YET or denial is not None):
        state = State.WAITING
    elif now.force is Force.STILL:
        state = State.ACTIVE
    is_denied = is_live and denial is not None
    is_anybody = rule.sources.anyone or now.is_anybody
    who = _("anybody") if rule.sources.anyone else ", ".join(entrance.asked(rule))
    ports, waiting = _counts(forward, now, len(rule.listen_ports) * len(protos))
    at, comment = exposed_at(forward), escaped(rule.comment)
    to = f"{target}:{rule.target_ports.brief()}"
    if rule.proto is not Proto.TCP:
        to = f"{to} {'+'.join(protos)}"
    return Entry(
        key=forward.named.key,
        mark=_mark(state, now, is_live=is_live, is_denied=is_denied),
        state=state,
        cause=decisive.cause,
        force=now.force,
        who=who,
        at=at,
        mode=_("by nft") if forward.mode is Mode.NFT else _("over qrexec"),
        to=to,
        comment=comment,
        note=_note(now, denial),
        searched=f"{target} {name} {who} {at} {to} {comment}".casefold(),
        roles=roles_of(forward, (target, *forward.chain, *forward.hops)),
        is_anybody=is_anybody,
        is_live=is_live or now.force is Force.STILL,
        is_denied=is_denied,
        ports=ports,
        waiting=waiting,
        expire=rule.expire,
        has_ended=rule.has_ended,
    )


def mark(state: State) -> str:
    """The word for a state."""
    return {
        # Translators: the states of a forward, each in a word.
        State.ACTIVE: _("OPEN"),
        State.WAITING: _("WAITING"),
        State.SUSPENDED: _("SUSPENDED"),
        State.EXPIRED: _("ENDED"),
        State.DISABLED: _("CLOSED"),
        State.REFUSED: _("REFUSED"),
        State.BROKEN: _("BROKEN"),
        State.HELD: _("HELD"),
    }[state]


def _mark(state: State, now: InForce, *, is_live: bool = False, is_denied: bool = False) -> str:
    """The word for what a rule is, and what is in force of it."""
    if now.force is Force.STILL:
        return _("STILL OPEN")
    if now.force is Force.NOT_YET and is_live:
        return _("NOT IN FORCE")
    return _("DENIED") if is_denied else mark(state)


def _counts(forward: Forward, now: InForce, asked: int) -> tuple[int, int]:
    """How many ports are open, and how many more open when qubes start."""
    if now.force in (Force.STILL, Force.OTHERWISE):
        return max(sum(now.ports.values()), asked if forward.is_live else 0), 0
    if not forward.is_live or now.force is Force.NOT_YET:
        return 0, 0
    is_waiting = forward.cause in (Cause.EXPOSED_HALTED, Cause.HOP_HALTED)
    return (0, asked) if is_waiting else (asked, 0)


def _note(now: InForce, denial: str | None) -> str:
    """What its state alone does not say."""
    if denial is not None:
        return _("dom0 denies its calls: {reason}").format(reason=escaped(denial))
    return {
        Force.AS_ASKED: "",
        Force.NOT_YET: _("It is not in force yet."),
        Force.OTHERWISE: _("Something else is still in force, and may let in more than this."),
        Force.STILL: _("It should be closed but is still in force."),
    }[now.force]


def _of_broken(rule: BrokenRule, now: InForce) -> Entry:
    name, problem = escaped(rule.name), escaped(rule.problem)
    is_still = now.force is Force.STILL
    state = State.ACTIVE if is_still else State.BROKEN
    return Entry(
        key=rule.key,
        mark=_mark(state, now),
        state=state,
        cause=Cause.UNREADABLE,
        force=now.force,
        who="",
        at="",
        mode="",
        to="",
        comment=problem,
        note=_note(now, None),
        searched=f"{rule.target} {name} {problem}".casefold(),
        roles={rule.target: Role.TARGET},
        is_anybody=now.is_anybody,
        is_live=is_still,
        ports=sum(now.ports.values()),
    )
