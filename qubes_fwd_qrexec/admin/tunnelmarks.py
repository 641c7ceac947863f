# SPDX-License-Identifier: GPL-2.0-or-later
"""The command tunnel: which qubes are tunnels, by our own mark or by others, and what that does to forwards.

Our mark is the feature ``forward.tunnel`` of the qube, or of its template. A mark closes what would go
round the tunnel, at once; the marks of others (Whonix, VPN handlers) are read and never changed.
"""

from argparse import Namespace
from collections.abc import Iterable
from typing import Any, NamedTuple

from qubes_fwd_qrexec.common.errors import RefusedError, UsageError
from qubes_fwd_qrexec.common.rules import OnExpire
from qubes_fwd_qrexec.common.values import QubeName

from .apply import Outcome, others
from .inventory import ADMIN, TEMPLATE, TUNNEL_FEATURE, Inventory, TunnelMark
from .reconcile import apply
from .snapshot import Snapshot
from .states import Cause, Finding, Forward, Plan, State
from .stock import Stock, ended, left_over
from .views import reasons
from .views.session import Session


class Change(NamedTuple):
    """What a mark that comes or goes does to one forward."""

    forward: Forward
    was: State
    text: str

    def as_json(self) -> dict[str, Any]:
        return {
            "qube": self.forward.source.target,
            "name": self.forward.source.name,
            "was": self.was,
            "state": self.forward.state,
            "reason": reasons.sentence(self.forward),
        }


def tunnel(args: Namespace, session: Session) -> int:
    """Mark, unmark, or list."""
    if args.action == "list":
        if args.qube is not None:
            raise UsageError(f"list shows all tunnel qubes; leave {args.qube} out")
        return _list(session)
    if args.qube is None:
        raise UsageError(f"{args.action} is about one qube; name it")
    with session.backend.locked():
        snapshot = session.look()
        qube = snapshot.check_qube(args.qube)
        return _mark(qube, snapshot, session) if args.action == "mark" else _unmark(qube, snapshot, session)


def _mark(qube: QubeName, snapshot: Snapshot, session: Session) -> int:
    inventory = snapshot.inventory
    known = inventory.qubes[qube]
    if known.klass == ADMIN:
        raise RefusedError(f"{qube} is the administrative qube, and no traffic goes through it")
    is_marked = bool(known.features.get(TUNNEL_FEATURE))
    after = _with_feature(snapshot, qube, "1")
    if not is_marked:
        session.backend.set_feature(qube, TUNNEL_FEATURE, "1")
    planned, outcome, _ = apply(session.backend, session.now, changed=f"{qube} is marked")
    left = left_over(ended(snapshot.plan(session.now), planned), session.backend)
    changes = [*_changes(snapshot, after, session.now, left)]
    status = 1 if any(stock.left_s is None for stock in left) else 0
    if session.is_json:
        session.say_json(_as_json(qube, after, changes) | {"stock": [stock.as_json() for stock in left]})
        return status
    said = "was marked as a tunnel already" if is_marked else "is marked as a tunnel"
    session.say(f"{qube} {said}. {_what_it_means(qube, after.inventory)}\n")
    _say(changes, session)
    for forward, found in _going_round(after, qube, session.now):
        note = reasons.sentence(forward, found)
        session.say(f"Forward {forward.source} stays open: it {note}, as it says itself.\n")
    _say_others(outcome, planned, changes, session)
    for stock in left:
        session.warn(f"still open: {stock.words()}")
    return status


def _say_others(outcome: Outcome, planned: Plan, changes: Iterable[Change], session: Session) -> None:
    asked = [change.forward.source for change in changes]
    session.say("".join(f"{line}\n" for line in others(outcome, planned, asked)))


def _what_it_means(qube: QubeName, inventory: Inventory) -> str:
    if inventory.qubes[qube].klass == TEMPLATE:
        made = [q.name for q in inventory.qubes.values() if q.template == qube]
        return f"That marks every qube made from it: {', '.join(made) or 'none yet'}."
    behind = ", ".join(inventory.behind(qube)) or "no qube yet"
    return f"Neither it nor what is behind it may be exposed outside of it; behind it is {behind}."


def _unmark(qube: QubeName, snapshot: Snapshot, session: Session) -> int:
    if not snapshot.inventory.qubes[qube].features.get(TUNNEL_FEATURE):
        raise RefusedError(_not_ours(qube, snapshot.inventory))
    after = _with_feature(snapshot, qube, None)
    changes = [*_changes(snapshot, after, session.now)]
    session.backend.remove_feature(qube, TUNNEL_FEATURE)
    planned, outcome, _ = apply(session.backend, session.now, changed=f"{qube} is no longer marked")
    if session.is_json:
        session.say_json(_as_json(qube, after, changes))
        return 0
    left = [*after.inventory.tunnel_marks(qube)]
    if left:
        session.say(
            f"The mark is taken off {qube}, which is a tunnel still: {_ways_out(left, after.inventory)}.\n"
        )
    else:
        session.say(f"{qube} is no longer marked as a tunnel.\n")
    _say(changes, session)
    for forward in after.plan(session.now):
        if forward.cause in (Cause.TUNNEL, Cause.CONFLICT) and qube in (
            forward.source.target,
            *forward.chain,
        ):
            session.say(f"Forward {forward.source} stays refused. {reasons.sentence(forward)}\n")
    _say_others(outcome, planned, changes, session)
    return 0


def _not_ours(qube: QubeName, inventory: Inventory) -> str:
    """Why there is nothing of ours to take away, and whose mark it is."""
    marks = [*inventory.tunnel_marks(qube)]
    if marks:
        ways_out = _ways_out(marks, inventory)
        return f"{qube} is marked as a tunnel by other means, which are not changed here: {ways_out}"
    all_marked = [entry.qube for entry in _marked(inventory)]
    there = f"marked are {', '.join(all_marked)}" if all_marked else "no qube is"
    return f"{qube} is not marked as a tunnel; {there}"


def _ways_out(marks: Iterable[TunnelMark], inventory: Inventory) -> str:
    return "; ".join(f"{mark.mark}, which {_way_out(mark, inventory)} takes away" for mark in marks)


def _way_out(mark: TunnelMark, inventory: Inventory) -> str:
    kind, _, key = mark.mark.partition(" ")
    if kind == "tag":
        return f"'qvm-tags {mark.qube} del {key}'"
    holder = inventory.holder(mark.qube, key)
    owner = mark.qube if holder is None else holder.name
    if key == TUNNEL_FEATURE:
        return f"'qvm-forward tunnel unmark {owner}'"
    return f"'qvm-features --unset {owner} {key}'"


def _with_feature(snapshot: Snapshot, qube: QubeName, value: str | None) -> Snapshot:
    """The system as it would be with our mark or without it."""
    qubes = dict(snapshot.inventory.qubes)
    features = {key: text for key, text in qubes[qube].features.items() if key != TUNNEL_FEATURE}
    if value is not None:
        features[TUNNEL_FEATURE] = value
    qubes[qube] = qubes[qube]._replace(features=features)
    return snapshot._replace(inventory=Inventory(qubes))


def _changes(before: Snapshot, after: Snapshot, now: float, left: Iterable[Stock] = ()) -> Iterable[Change]:
    """The forwards whose state differs, and how; ``left`` is what goes on of some that are closed."""
    old = before.plan(now)
    flows = {(stock.target, stock.name) for stock in left}
    for forward in after.plan(now):
        was = old.find(forward.source.target, forward.source.name)
        if was is None or was.state is forward.state:
            continue
        if forward.is_live:
            text = "is open again" if forward.state is State.ACTIVE else f"is {forward.state} now"
        else:
            drains = forward.source.rule.on_expire is OnExpire.DRAIN or forward.source[:2] in flows
            closed = " and takes no new connection, but what is open may go on" if drains else " and closed"
            text = f"is {forward.state} now{closed if was.is_live else ''}"
        yield Change(forward, was.state, f"Forward {forward.source} {text}. {reasons.sentence(forward)}")


def _going_round(after: Snapshot, qube: QubeName, now: float) -> Iterable[tuple[Forward, Finding]]:
    for forward in after.plan(now).live:
        found = forward.finding(Cause.BYPASSES_TUNNEL)
        if found is not None and found.mark is not None and found.mark.qube == qube:
            yield forward, found


def _say(changes: Iterable[Change], session: Session) -> None:
    session.say("".join(f"{change.text}\n" for change in changes))


def _as_json(qube: QubeName, after: Snapshot, changes: Iterable[Change]) -> dict[str, Any]:
    marks = [mark.mark for mark in after.inventory.tunnel_marks(qube)]
    return {"qube": qube, "marks": marks, "changed": [change.as_json() for change in changes]}


class Marked(NamedTuple):
    """A tunnel qube: what marks it, and which qubes are behind it; these and it itself may have rules."""

    qube: QubeName
    marks: tuple[TunnelMark, ...]
    behind: tuple[QubeName, ...]

    def as_json(self, targets: Iterable[QubeName]) -> dict[str, Any]:
        marks = [mark.mark for mark in self.marks]
        having = [qube for qube in (self.qube, *self.behind) if qube in set(targets)]
        return {"qube": self.qube, "marks": marks, "behind": list(self.behind), "targets": having}


def _marked(inventory: Inventory) -> list[Marked]:
    return [
        Marked(name, marks, inventory.behind(name))
        for name in sorted(inventory.qubes)
        if (marks := tuple(inventory.tunnel_marks(name)))
    ]


def _anonymous(inventory: Inventory) -> list[TunnelMark]:
    """Qubes that must not be exposed outside of a tunnel, whether they are behind one or not."""
    return [
        mark for name in sorted(inventory.qubes) if (mark := inventory.behind_tunnel_mark(name)) is not None
    ]


def _list(session: Session) -> int:
    snapshot = session.look()
    targets = snapshot.stored.targets()
    found, anonymous = _marked(snapshot.inventory), _anonymous(snapshot.inventory)
    if session.is_json:
        session.say_json(
            {
                "tunnels": [entry.as_json(targets) for entry in found],
                "anonymous": [{"qube": mark.qube, "mark": mark.mark} for mark in anonymous],
            }
        )
        return 0
    for entry in found:
        itself, *behind = (
            f"{qube} (has forwards)" if qube in targets else qube for qube in (entry.qube, *entry.behind)
        )
        session.say(f"{itself}: {', '.join(mark.mark for mark in entry.marks)}\n")
        session.say(f"  behind it: {', '.join(behind) or 'nothing'}\n")
    for mark in anonymous:
        session.say(f"{mark.qube}: {mark.mark}, to be reached through its tunnel only\n")
    if not found and not anonymous:
        session.say("No tunnel qubes. 'qvm-forward tunnel mark QUBE' marks one, such as a VPN qube.\n")
    return 0
