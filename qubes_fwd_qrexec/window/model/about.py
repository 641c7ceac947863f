# SPDX-License-Identifier: GPL-2.0-or-later
"""All that the details pane shows of one rule, computed from a look and the figures in a few milliseconds."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from qubes_fwd_qrexec.admin import policy
from qubes_fwd_qrexec.admin.backend import PolicyVerdict
from qubes_fwd_qrexec.admin.inventory import CONFIG_PREFIX, Inventory
from qubes_fwd_qrexec.admin.seen import Seen
from qubes_fwd_qrexec.admin.states import Forward, Key, State, Verdict
from qubes_fwd_qrexec.admin.views import nftstatus, reasons, render, showing
from qubes_fwd_qrexec.admin.views.connected import Client
from qubes_fwd_qrexec.admin.views.judged import together
from qubes_fwd_qrexec.admin.views.nftstatus import Hop
from qubes_fwd_qrexec.admin.views.picture import picture
from qubes_fwd_qrexec.admin.views.tables import Check, Style, escaped
from qubes_fwd_qrexec.common.rules import BrokenRule

from . import figures as figures_
from .figures import Figures
from .look import Look
from .words import _, ngettext


class Told(NamedTuple):
    """What a qube is told of a forward: the feature and its value."""

    qube: str
    feature: str
    value: str


class About(NamedTuple):
    """What is known of a rule.

    ``seen`` is what a change is based on. ``state``, ``mark`` and ``note`` are those of the list, where what
    is in force counts as open. ``forward`` is None for what cannot be read as a rule; then there is only the
    ``sentence`` and the ``line``. ``figures`` and ``clients`` are what its listeners say, and
    ``goes_on`` which connections it has though it is closed. ``why`` explains its way. Without ``is_allowed``
    dom0's policy lets nothing through. ``hops`` are the qubes of a path by nft, if they were asked.
    """

    key: Key
    seen: Seen
    label: str
    icon: str
    state: State
    mark: str
    note: str
    sentence: str
    line: str
    forward: Forward | None = None
    inventory: Inventory | None = None
    is_allowed: bool = False
    checks: tuple[Check, ...] = ()
    hops: tuple[Hop, ...] = ()
    figures: tuple[str, ...] = ()
    clients: tuple[Client, ...] = ()
    goes_on: tuple[str, ...] = ()
    why: tuple[str, ...] = ()
    policy: tuple[str, ...] = ()
    told: tuple[Told, ...] = ()

    @property
    def title(self) -> str:
        """Target and name."""
        return escaped(" ".join(self.key))

    @property
    def text(self) -> str:
        """Why its way is what it is, its rule, its policy lines, and what each qube is told."""
        if self.forward is None:
            return self.line
        told = (f"{told.qube}: {told.feature} = {told.value}" for told in self.told)
        return "\n".join((*self.why, "", self.line, "", *self.policy, "", *told)).strip()

    def picture(self, width: int) -> str:
        """The way of the forward, drawn for so many characters; empty where there is none."""
        if self.forward is None or self.inventory is None:
            return ""
        said = nftstatus.said(self.hops)
        return picture(self.forward, self.inventory, is_allowed=self.is_allowed, said=said, width=width)


def about(look: Look, figures: Figures | None, key: Key, now: float) -> About | None:
    """What is known of a rule at the time ``now``, in UNIX seconds; None if it is not there."""
    stored = look.snapshot.stored.get(key)
    if stored is None:
        return None
    seen, qube = Seen.of(look.snapshot, key), look.snapshot.inventory.qubes[key[0]]
    entry = next(entry for entry in look.entries.rules if entry.key == key)
    head = (key, seen, qube.label, qube.icon, entry.state, entry.mark, entry.note)
    if isinstance(stored, BrokenRule):
        problem = render.broken_line(stored, Style()).rstrip("\n")
        return About(*head, problem, escaped(stored.text))
    forward = look.plan.find(*key)
    if forward is None:
        return None
    hops = _hops(figures, key)
    found = showing.all_findings(forward, look.plan, look.snapshot.installed, now, _verdict(look, key))
    return About(
        *head,
        reasons.sentence(forward),
        str(stored.rule),
        forward,
        look.snapshot.inventory,
        is_allowed=found[-1].verdict != Verdict.STOPS,
        checks=(*found, *nftstatus.checks(hops)),
        hops=hops,
        figures=(*figures_.lines(figures, key), *_untold(figures, forward)),
        clients=figures_.clients(figures, key),
        goes_on=tuple(_goes_on(figures, key)),
        why=tuple(line.strip() for line in render.explained(forward, Style()).splitlines()[2:]),
        policy=policy.lines(forward),
        told=tuple(Told(qube, f"{CONFIG_PREFIX}{each.key}", str(each)) for qube, each in forward.configs),
    )


def _verdict(look: Look, key: Key) -> PolicyVerdict | None:
    """What dom0's whole policy says of a forward's calls; None for one that makes none."""
    if look.verdicts is None:
        return PolicyVerdict(None, "dom0's policy could not be asked")
    return together(look.verdicts).get(key)


def _hops(figures: Figures | None, key: Key) -> tuple[Hop, ...]:
    by_nft: Sequence[nftstatus.NftRow] = () if figures is None else figures.status.by_nft.rows
    return next((row.hops for row in by_nft if row.forward.named.key == key), ())


def _goes_on(figures: Figures | None, key: Key) -> Iterator[str]:
    if figures is not None:
        for left in (*figures.status.goes_on, *figures.status.by_nft.draining):
            if (left.target, left.name) == key:
                yield str(left)


def _untold(figures: Figures | None, forward: Forward) -> Iterator[str]:
    """Who may be connected besides those that the qubes tell."""
    if forward.nft_configs:
        yield _("No qube reports who is connected by nft.")
    if figures is None or figures.status.clients is None or forward.exposed is None or not forward.is_live:
        return
    unknown, left_out = figures.status.clients.unknown, figures.status.clients.left_out
    if (why := unknown.get(forward.exposed)) is not None:
        yield _("Who is connected at {qube} is unknown: {why}.").format(
            qube=forward.exposed, why=escaped(why)
        )
    if count := left_out.get(forward.exposed, 0):
        more = ngettext(
            "{qube} has {count} more client than it lists.",
            "{qube} has {count} more clients than it lists.",
            count,
        )
        yield more.format(qube=forward.exposed, count=count)
