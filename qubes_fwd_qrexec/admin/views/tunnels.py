# SPDX-License-Identifier: GPL-2.0-or-later
"""The command tunnel: mark, unmark and list, and the words for them."""

from argparse import Namespace
from collections.abc import Iterable
from typing import Any

from qubes_fwd_qrexec.admin import changing
from qubes_fwd_qrexec.admin.changing import System
from qubes_fwd_qrexec.admin.inventory import TEMPLATE, TUNNEL_FEATURE, Inventory, TunnelMark
from qubes_fwd_qrexec.admin.states import Cause
from qubes_fwd_qrexec.common.errors import RefusedError, UsageError
from qubes_fwd_qrexec.common.values import QubeName

from . import changes, reasons
from .session import Session


def tunnel(args: Namespace, session: Session) -> int:
    if args.action == "list":
        if args.qube is not None:
            raise UsageError(f"list shows all tunnel qubes; leave {args.qube} out")
        return _list(session)
    if args.qube is None:
        raise UsageError(f"{args.action} needs a qube")
    return _mark(args.qube, session, is_marked=args.action == "mark")


def _mark(qube: QubeName, session: Session, *, is_marked: bool) -> int:
    try:
        changed = changing.mark(System(session.backend, session.now), qube, is_marked=is_marked)
    except changing.NotMarkedError:
        raise RefusedError(_not_ours(qube, session.look().inventory)) from None
    after, inventory = changes.followed(changed, session), changed.after.inventory
    left = [*inventory.tunnel_marks(qube)]
    if is_marked:
        already = "already " if changed.before.inventory == inventory else ""
        line = f"{qube} is {already}marked as a tunnel. {_what_it_means(qube, inventory)}"
    elif left:
        line = f"{qube} has lost the mark of qvm-forward and is still a tunnel: {_ways_out(left, inventory)}."
    else:
        line = f"{qube} is no longer marked as a tunnel."
    last = []
    for forward in changed.plan:
        bypass = forward.finding(Cause.BYPASSES_TUNNEL)
        if is_marked and forward.is_live and bypass and bypass.mark and bypass.mark.qube == qube:
            note = reasons.sentence(forward, bypass)
            last.append(f"Forward {forward.named} stays open: it {note}, as its rule accepts.")
        is_refused = forward.cause in (Cause.TUNNEL, Cause.CONFLICT)
        if not is_marked and is_refused and qube in (forward.named.target, *forward.chain):
            last.append(f"Forward {forward.named} stays refused. {reasons.sentence(forward)}")
    data = {"qube": qube, "marks": [mark.mark for mark in left]}
    return changes.tell(after, session, [line], last=last, data=data)


def _what_it_means(qube: QubeName, inventory: Inventory) -> str:
    if inventory.qubes[qube].klass == TEMPLATE:
        made = [q.name for q in inventory.qubes.values() if q.template == qube]
        return f"That marks every qube made from it: {', '.join(made) or 'none yet'}."
    behind = ", ".join(_behind(qube, inventory)) or "none yet"
    return f"Neither it nor the qubes behind it ({behind}) may be exposed outside of it."


def _not_ours(qube: QubeName, inventory: Inventory) -> str:
    """Why there is no mark of ours to remove, and whose mark it is."""
    if marks := [*inventory.tunnel_marks(qube)]:
        ways_out = _ways_out(marks, inventory)
        return f"{qube} is marked as a tunnel by other means, which qvm-forward does not change: {ways_out}"
    marked = _tunnels(inventory)
    there = f"marked are {', '.join(marked)}" if marked else "no qube is"
    return f"{qube} is not marked as a tunnel; {there}"


def _ways_out(marks: Iterable[TunnelMark], inventory: Inventory) -> str:
    return "; ".join(f"{mark.mark}, which '{' '.join(_way_out(mark, inventory))}' removes" for mark in marks)


def _list(session: Session) -> int:
    snapshot = session.look()
    inventory, targets = snapshot.inventory, {target for target, _ in snapshot.stored}
    tunnels: list[dict[str, Any]] = [
        {
            "qube": name,
            "marks": [mark.mark for mark in marks],
            "behind": (behind := _behind(name, inventory)),
            "targets": [qube for qube in (name, *behind) if qube in targets],
        }
        for name, marks in _tunnels(inventory).items()
    ]
    # Qubes that must not be exposed outside of a tunnel, whether they are behind one or not.
    anonymous = [mark for name in sorted(inventory.qubes) if (mark := inventory.behind_tunnel_mark(name))]
    if session.is_json:
        marked = [{"qube": mark.qube, "mark": mark.mark} for mark in anonymous]
        session.say_json({"tunnels": tunnels, "anonymous": marked})
        return 0
    for each in tunnels:
        both = (each["qube"], *each["behind"])
        itself, *names = (f"{qube} (has forwards)" if qube in targets else qube for qube in both)
        session.say(f"{itself}: {', '.join(each['marks'])}\n  behind it: {', '.join(names) or 'nothing'}\n")
    for mark in anonymous:
        session.say(f"{mark.qube}: {mark.mark}, may be reached through its tunnel only\n")
    if not (tunnels or anonymous):
        session.say("No tunnel qubes. 'qvm-forward tunnel mark QUBE' marks one, such as a VPN qube.\n")
    return 0


def _behind(tunnel: QubeName, inventory: Inventory) -> list[QubeName]:
    """The qubes whose way out leads through this one."""
    return [name for name in sorted(inventory.qubes) if tunnel in inventory.chain(name).qubes]


def _tunnels(inventory: Inventory) -> dict[QubeName, list[TunnelMark]]:
    """All tunnel qubes by name, with what marks them."""
    marks = {name: [*inventory.tunnel_marks(name)] for name in sorted(inventory.qubes)}
    return {name: found for name, found in marks.items() if found}


def _way_out(mark: TunnelMark, inventory: Inventory) -> tuple[str, ...]:
    """The command that removes a mark."""
    kind, _, key = mark.mark.partition(" ")
    if kind == "tag":
        return ("qvm-tags", mark.qube, "del", key)
    holder = inventory.holder(mark.qube, key)
    owner = mark.qube if holder is None else holder.name
    if key == TUNNEL_FEATURE:
        return ("qvm-forward", "tunnel", "unmark", owner)
    return ("qvm-features", "--unset", owner, key)
