# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is connected, as listeners tell it, for `status --clients`.

It is what the qubes say; nothing is decided by it.
"""

from collections.abc import Collection, Iterator, Mapping
from itertools import groupby
from typing import Any, NamedTuple

from qubes_fwd_qrexec.admin.answers import AnswerError
from qubes_fwd_qrexec.admin.states import Plan
from qubes_fwd_qrexec.common.clientreport import ClientReport
from qubes_fwd_qrexec.common.values import Proto, QubeName, address_text

from . import drains
from .cut import TOO_OLD
from .listeners import Answer, has_no_listener
from .tables import Style, Table, counted, size
from .times import amount, local

_TITLES = ("QUBE", "NAME", "STATE", "AT", "CLIENT", "SINCE", "IDLE", "FROM CLIENT", "TO CLIENT")
# In a narrow terminal.
_LEAVING = ("AT", "SINCE", "FROM CLIENT", "TO CLIENT")
# Of one forward at one qube, which may have thousands: JSON has all that the qube tells.
_SHOWN_MAX = 20


class Client(NamedTuple):
    """One connection or flow, as the qube says where it is accepted."""

    exposed: QubeName
    report: ClientReport

    @property
    def where(self) -> tuple[str, str, str, str]:
        return self.report.target, self.report.name, self.exposed, self.report.proto


class Connected(NamedTuple):
    """Who is connected over qrexec, by forwards. ``left_out`` are the qubes with more clients than they tell,
    and how many more. ``unknown`` are qubes that do not tell, and why.
    """

    clients: tuple[Client, ...]
    left_out: Mapping[QubeName, int]
    unknown: Mapping[QubeName, str]

    def as_json(self) -> dict[str, Any]:
        return {
            "clients": [{"exposed": one.exposed, **one.report.as_json()} for one in self.clients],
            "clients_left_out": dict(self.left_out),
            "clients_unknown": list(self.unknown),
        }

    def table(self, style: Style) -> str:
        """A row for each client, the last that moved first in each forward; empty if there are none."""
        shown = [client for _, some in self._of_each() for client in some[:_SHOWN_MAX]]
        return Table(_TITLES, [*map(_cells, shown)], leaving=_LEAVING).text(style)

    def remarks(self) -> Iterator[str]:
        """What the table does not have."""
        if not (self.clients or self.unknown):
            yield "No listener reports a client."
        for (target, name, exposed, proto), some in self._of_each():
            if (more := len(some) - _SHOWN_MAX) > 0:
                udp = f" ({proto})" if proto == Proto.UDP else ""
                yield f"{target} {name}{udp}: {counted(more, 'more client')} at {exposed}; --json shows them."
        for qube, more in self.left_out.items():
            yield f"{qube} has {counted(more, 'more client')} than it lists: the idlest are left out."
        for qube, why in self.unknown.items():
            yield f"Who is connected at {qube} is unknown: {why}."

    def _of_each(self) -> Iterator[tuple[tuple[str, str, str, str], list[Client]]]:
        for where, some in groupby(self.clients, lambda client: client.where):
            yield where, list(some)


def connected(planned: Plan, qubes: Collection[str], answers: Mapping[QubeName, Answer]) -> Connected:
    """What listeners say, as far as it is about ``qubes``, or any; ``planned`` is their part of the plan."""
    clients: list[Client] = []
    left_out: dict[QubeName, int] = {}
    unknown: dict[QubeName, str] = {}
    for exposed, answer in sorted(answers.items()):
        if has_no_listener(answer):
            continue
        if isinstance(answer, AnswerError) or answer.listener is None:
            unknown[exposed] = "no answer"
            continue
        if answer.listener.clients is None:
            unknown[exposed] = f"it {TOO_OLD}"
        if answer.listener.clients_left_out:
            left_out[exposed] = answer.listener.clients_left_out
        clients += (
            Client(exposed, one)
            for one in answer.listener.clients or ()
            if not qubes or {exposed, one.target} & {*qubes} or planned.find(one.target, one.name)
        )
    # Sorting keeps the order in which a listener tells those of one forward.
    return Connected(tuple(sorted(clients, key=lambda client: client.where)), left_out, unknown)


def _cells(client: Client) -> tuple[str, ...]:
    report = client.report
    state = drains.STATE if report.is_draining else "open"
    at = f"{client.exposed}{' udp' if report.proto is Proto.UDP else ''}"
    who = address_text(report.address, report.port)
    times = local(report.since), amount(report.idle_s)
    return (report.target, report.name, state, at, who, *times, size(report.sent), size(report.received))
