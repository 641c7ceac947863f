# SPDX-License-Identifier: GPL-2.0-or-later
"""What the qubes say of the forwards: what they carry, who is connected, what goes on that should not.

It is untrusted, and `common.report` has checked it. Nothing is decided by it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.states import Key
from qubes_fwd_qrexec.admin.views import status as status_view
from qubes_fwd_qrexec.admin.views.connected import Client
from qubes_fwd_qrexec.admin.views.nftstatus import NftRow
from qubes_fwd_qrexec.admin.views.status import Row, Status, asked
from qubes_fwd_qrexec.admin.views.tables import escaped, size
from qubes_fwd_qrexec.common.values import Proto

from .look import Look
from .words import _


@dataclass(frozen=True)
class Figures:
    """What the qubes answered at the time ``at``, in UNIX seconds."""

    at: float
    status: Status

    @cached_property
    def lines(self) -> Mapping[Key, tuple[str, ...]]:
        """What is said of each live forward."""
        found: dict[Key, tuple[str, ...]] = {}
        for row in self.status.rows:
            key = row.forward.named.key
            found[key] = (*found.get(key, ()), *_of_row(row))
        return found | {row.forward.named.key: tuple(_of_nft(row)) for row in self.status.by_nft.rows}

    @cached_property
    def clients(self) -> Mapping[tuple[str, str], tuple[Client, ...]]:
        """Who is connected to each forward, the last that moved first."""
        told = () if self.status.clients is None else self.status.clients.clients
        found: dict[tuple[str, str], list[Client]] = {}
        for client in told:
            found.setdefault((client.report.target, client.report.name), []).append(client)
        return {key: tuple(some) for key, some in found.items()}


def ask(backend: Backend, look: Look, now: float) -> Figures:
    """Ask all qubes, eight at a time, each for up to 8 s. Raises `StoreError`."""
    found = Figures(now, _asked(backend, look, now))
    found.lines, found.clients  # noqa: B018  made here, so that the main thread need not wait for them
    return found


def _asked(backend: Backend, look: Look, now: float) -> Status:
    return asked(look.snapshot, look.plan, now, backend, with_clients=True, verdicts=look.verdicts)


def lines(figures: Figures | None, key: Key) -> tuple[str, ...]:
    """What is said of a forward; nothing of one that is not live."""
    return (_("The qubes have not been asked yet."),) if figures is None else figures.lines.get(key, ())


def clients(figures: Figures | None, key: Key) -> tuple[Client, ...]:
    """Who is connected to a forward, as the qubes tell it."""
    return () if figures is None else figures.clients.get(key, ())


def leftovers(look: Look, figures: Figures | None) -> tuple[str, ...]:
    """What is in force, or goes on, and should not, in a sentence each."""
    return tuple(status_view.left(look.due, None if figures is None else figures.status))


def _of_row(row: Row) -> Iterator[str]:
    """One protocol of a forward over qrexec."""
    report = row.uptake.report
    if report is None:
        reason = escaped(row.problem or "")
        if row.uptake.is_shut:
            yield _("It is not open: {reason}.").format(reason=reason)
        else:
            yield _("Figures are unknown: {reason}.").format(reason=reason)
        return
    counts = {
        "now": report.connections,
        "accepted": report.total,
        "refused": sum(report.refused.values()),
        "proto": row.uptake.proto.upper(),
    }
    if row.forward.named.rule.proto is Proto.BOTH:
        # Translators: {proto} is TCP or UDP; the rest counts connections, or flows of UDP.
        text = _("{proto}: {now} now, {accepted} accepted, {refused} refused")
    else:
        text = _("{now} now, {accepted} accepted, {refused} refused")
    yield text.format(**counts)
    yield _("{sent} from clients, {received} to clients").format(
        sent=size(report.sent), received=size(report.received)
    )
    yield from map(escaped, status_view.about(row))


def _of_nft(row: NftRow) -> Iterator[str]:
    """A forward by nft, by what its exposed qube counts."""
    counted = row.hops[0].counted if row.hops else None
    if row.reason is not None:
        yield _("It is not open all the way: {reason}.").format(reason=escaped(row.reason))
    if counted is None:
        reason = row.hops[0].reason if row.hops else None
        if reason is not None and reason != row.reason:
            yield _("Figures are unknown: {reason}.").format(reason=escaped(reason))
        return
    yield _("{accepted} accepted, {packets} packets").format(
        accepted=counted.connections, packets=counted.packets
    )
    yield _("{sent} from clients, {received} to clients").format(
        sent=size(counted.sent), received=size(counted.received)
    )
    if row.is_least:
        yield _("More may have passed: while a flowtable speeds up a connection, nothing counts its packets.")
