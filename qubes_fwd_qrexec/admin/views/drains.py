# SPDX-License-Identifier: GPL-2.0-or-later
"""What drains: connections of forwards that are closed, which may go on until they are cut.

It is what the qubes say; nothing is decided by it.
"""

from collections.abc import Collection, Iterable
from functools import partial
from typing import Any, NamedTuple

from qubes_fwd_qrexec.admin import confirming
from qubes_fwd_qrexec.admin.answers import NotRunningError, both
from qubes_fwd_qrexec.admin.inventory import LISTENER_FEATURE, NFT_FEATURE
from qubes_fwd_qrexec.admin.snapshot import Snapshot
from qubes_fwd_qrexec.admin.states import Plan
from qubes_fwd_qrexec.common.rules import Mode
from qubes_fwd_qrexec.common.values import QubeName

from . import listeners, nftstatus
from .listeners import GoesOn
from .session import Session
from .tables import Style, Table
from .times import distance

STATE = "draining"
_TITLES = ("QUBE", "NAME", "STATE", "AT", "OPEN NOW", "CUT")
# A qube may name as many as it likes; JSON has all.
_SHOWN_MAX = 50
# `list` is about the rules, and nobody waits longer for what it says besides.
_TIMEOUT_S = 2.0


class Drains(NamedTuple):
    """What drains, and the qubes that did not say whether anything does there."""

    left: tuple[GoesOn, ...]
    silent: tuple[QubeName, ...]

    def as_json(self) -> dict[str, Any]:
        return {"draining": [left._asdict() for left in self.left], "silent": list(self.silent)}


def ask(session: Session, snapshot: Snapshot, planned: Plan, qubes: Collection[str]) -> Drains:
    """Ask the running qubes that are to listen, by their service or by a rule, or to forward by nft, as far
    as ``planned``, the part of the plan that concerns ``qubes``, is about them. All are asked at once.
    """
    inventory, everything = snapshot.inventory, snapshot.plan(session.now, known=planned)
    backend = session.backend
    exposed = {forward.exposed for forward in everything if forward.mode is Mode.QREXEC}
    running = [qube for qube in inventory.qubes.values() if qube.is_running]
    to_listen = (q.name for q in running if q.features.get(LISTENER_FEATURE) or q.name in exposed)
    listen = concerned(to_listen, planned, qubes)
    forward = concerned((q.name for q in running if q.features.get(NFT_FEATURE)), planned, qubes)
    if not listen and not forward:
        return Drains((), ())
    answers, told = both(
        partial(listeners.ask_all, backend, listen, _TIMEOUT_S),
        partial(confirming.ask_all, backend, forward, _TIMEOUT_S),
    )
    found = {qube: listeners.flows(qube, answers[qube], everything) for qube in listen}
    by_nft = nftstatus.nft_status(Plan(()), everything, inventory, told, session.now)
    left = [each for some in found.values() for each in some or () if each.left_s is not None]
    silent = {qube for qube in by_nft.silent if not isinstance(told[qube], NotRunningError)}
    silent |= {qube for qube, some in found.items() if some is None}
    return Drains((*left, *by_nft.draining), tuple(sorted(silent)))


def concerned(some: Iterable[QubeName], planned: Plan, qubes: Collection[str]) -> list[QubeName]:
    """Those of some qubes that are among ``qubes`` (none: all are), or are exposed in a part of the plan."""
    exposed = {forward.exposed for forward in planned}
    return sorted(qube for qube in some if not qubes or qube in qubes or qube in exposed)


def table(left: Iterable[GoesOn], style: Style) -> str:
    """A row for each forward that drains; empty if none does."""
    rows = [
        (str(one.target), str(one.name), STATE, one.exposed, one.counted, distance(one.left_s))
        for one in left
        if one.left_s is not None
    ]
    shown, more = rows[:_SHOWN_MAX], len(rows) - _SHOWN_MAX
    text = Table(_TITLES, shown, leaving=("AT",)).text(style)
    return text if more <= 0 else f"{text}And {more} more; --json shows them.\n"


def unknown(silent: Collection[QubeName]) -> str:
    """The sentence for qubes that did not answer."""
    return f"What is draining at {', '.join(silent)} is unknown: no answer."
