# SPDX-License-Identifier: GPL-2.0-or-later
"""How forwards by nft are: whether each qube of the path has them in force, and what it has counted.

All of it is what the qubes say; nothing is decided by it.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from qubes_fwd_qrexec.admin import confirming
from qubes_fwd_qrexec.admin.answers import NotRunningError, at_once
from qubes_fwd_qrexec.admin.backend import Backend
from qubes_fwd_qrexec.admin.confirming import Answer, Unconfirmed
from qubes_fwd_qrexec.admin.inventory import Inventory
from qubes_fwd_qrexec.admin.states import Forward, Plan, State
from qubes_fwd_qrexec.common.nftreport import NftReport, PathReport
from qubes_fwd_qrexec.common.rules import Mode
from qubes_fwd_qrexec.common.values import QubeName

from . import confirmed
from .render import exposed_at, forward_as_json
from .tables import Style, Table, size

_TITLES = (
    *("QUBE", "NAME", "STATE", "EXPOSED AT", "THEN", "CONNECTIONS", "PACKETS"),
    *("FROM CLIENTS", "TO CLIENTS"),
)


class NftRow(NamedTuple):
    """One live forward by nft. ``hops`` say of each qube, the exposed qube first, whether it has it in force:
    None if so, and else what it does not confirm. ``counted`` is what the exposed qube has counted.
    """

    forward: Forward
    hops: Mapping[QubeName, Unconfirmed | None]
    counted: PathReport | None

    @property
    def doubts(self) -> list[Unconfirmed]:
        return [doubt for doubt in self.hops.values() if doubt is not None]

    @property
    def state(self) -> State:
        return State.WAITING if self.doubts else self.forward.state

    def as_json(self) -> dict[str, Any]:
        return {
            **forward_as_json(self.forward),
            "state": self.state,
            "path": [
                {"qube": qube, "is_in_force": doubt is None, "reason": doubt and confirmed.words(doubt)}
                for qube, doubt in self.hops.items()
            ],
            "figures": None if self.counted is None else self.counted.as_json(),
        }


class NftStatus(NamedTuple):
    """All live forwards by nft, and what is in force that should not be."""

    rows: tuple[NftRow, ...] = ()
    leftovers: tuple[Unconfirmed, ...] = ()

    @property
    def is_well(self) -> bool:
        return not self.leftovers and not any(row.doubts for row in self.rows)

    def lines(self) -> Iterator[str]:
        """What is not as it should be, in a sentence each."""
        yield from (f"Still open: {confirmed.words(doubt)}." for doubt in self.leftovers)
        for row in self.rows:
            yield from (f"{confirmed.words(doubt)}." for doubt in row.doubts)

    def table(self, style: Style) -> str:
        """The forwards as a table; empty if there are none."""
        if not self.rows:
            return ""
        return Table(_TITLES, [*map(_cells, self.rows)], [row.state for row in self.rows]).text(style)


def nft_status(
    planned: Plan, everything: Plan, inventory: Inventory, backend: Backend, qubes: Collection[str] = ()
) -> NftStatus:
    """Ask the qubes of all paths, all at once. ``planned`` is the part of the plan that is shown; where it is
    about some ``qubes``, only they are asked for what should not be.
    """
    shown = [forward for forward in planned.live if forward.mode is Mode.NFT]
    asked = {qube for qube in confirming.forwarding(inventory) if not qubes or qube in qubes}
    wanted = {(qube, config.key) for forward in everything.live for qube, config in forward.nft_configs}
    path = {qube for forward in shown for qube, _ in forward.nft_configs if inventory.qubes[qube].is_running}
    answers = at_once(lambda qube: confirming.ask(qube, backend), sorted(asked | path))
    leftovers = (
        confirming.judged(qube, forward.key, None, answer)
        for qube, answer in answers.items()
        if qube in asked and isinstance(answer, NftReport)
        for forward in answer.forwards
        if (qube, forward.key) not in wanted
    )
    rows = tuple(nft_row(forward, answers) for forward in shown)
    return NftStatus(rows, tuple(doubt for doubt in leftovers if doubt is not None))


def nft_row(forward: Forward, answers: Mapping[QubeName, Answer]) -> NftRow:
    """What the qubes of a forward's path say; one that was not asked is halted."""
    halted = NotRunningError("halted")
    hops = {
        qube: confirming.judged(qube, config.key, config, answers.get(qube, halted))
        for qube, config in reversed(forward.nft_configs)
    }
    exposed, config = forward.nft_configs[-1]
    answer = answers.get(exposed)
    return NftRow(forward, hops, answer.find(config.key) if isinstance(answer, NftReport) else None)


def _cells(row: NftRow) -> tuple[str, ...]:
    named, counted = row.forward.named, row.counted
    then = " - ".join((*row.forward.hops[1:], named.target))
    cells = (named.target, named.name, row.state, exposed_at(row.forward), then)
    if counted is None:
        return (*cells, *("unknown",) * 4)
    numbers = (str(counted.connections), str(counted.packets))
    return (*cells, *numbers, size(counted.sent), size(counted.received))
