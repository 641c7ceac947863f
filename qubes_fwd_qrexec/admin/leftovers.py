# SPDX-License-Identifier: GPL-2.0-or-later
"""What is in force although no live rule asks for it, and what drains: the first thing to see of a system."""

from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

from qubes_fwd_qrexec.common.config import parse_key
from qubes_fwd_qrexec.common.errors import ConfigError
from qubes_fwd_qrexec.common.report import QubeReport
from qubes_fwd_qrexec.common.values import QubeName, RuleName

from .apply import Kind, Step
from .inventory import CONFIG_PREFIX, LISTENER_FEATURE, Inventory
from .revoking import serving
from .states import Plan

# What ends each of them.
WAY_OUT = "qvm-forward apply"


class Leftover(NamedTuple):
    """A line of dom0's policy (``qube`` is then None), or what the listener of a qube is told."""

    qube: QubeName | None
    text: str

    def words(self) -> str:
        """For people."""
        if self.qube is None:
            return f"dom0's policy allows '{self.text}'"
        return f"{self.qube} is told to listen for {self.text}"

    def as_json(self) -> dict[str, Any]:
        return {"qube": self.qube, "what": self.text, "way_out": WAY_OUT}


def leftovers(due: Iterable[Step]) -> Iterator[Leftover]:
    """Out of what `differences` found: what is open and is to be closed."""
    for step in due:
        if step.kind is Kind.CLOSE_POLICY:
            for line in step.lines_gone:
                yield Leftover(None, " ".join(line.split()))
        elif step.kind is Kind.REMOVE_CONFIG:
            yield Leftover(step.qube, _forward(step.key.removeprefix(CONFIG_PREFIX)))


def _forward(key: str) -> str:
    try:
        return " ".join(parse_key(key))
    except ConfigError:
        return key


class Drain(NamedTuple):
    """Connections of a forward that is closed. They may finish within ``left_s`` seconds; if that is None,
    its listener should have ended them.
    """

    exposed: QubeName
    target: QubeName
    name: RuleName
    connections: int
    left_s: int | None

    def words(self) -> str:
        """For people."""
        count = "1 connection" if self.connections == 1 else f"{self.connections} connections"
        if self.left_s is None:
            return f"{self.target} {self.name} is to be closed, and {self.exposed} still has {count} of it"
        left = f"{self.left_s // 60} min" if self.left_s >= 60 else f"{self.left_s} s"
        return (
            f"{self.target} {self.name} is closed and draining: {count} at {self.exposed}, "
            f"cut in {left} at the latest"
        )

    def as_json(self) -> dict[str, Any]:
        return self._asdict()


def drains(exposed: QubeName, answer: QubeReport, live: Collection[tuple[str, str]]) -> Iterator[Drain]:
    """What a qube says it has of forwards that are closed; ``live`` are those that it is to have."""
    told = () if answer.listener is None else answer.listener.draining
    for report in told:
        if report.connections:
            yield Drain(exposed, report.target, report.name, report.connections, report.left_s)
    for forward in () if answer.listener is None else answer.listener.forwards:
        if forward.connections and (forward.target, forward.name) not in live:
            yield Drain(exposed, forward.target, forward.name, forward.connections, None)


def listening(planned: Plan, inventory: Inventory, qubes: Collection[str] = ()) -> list[QubeName]:
    """Every running qube that listens, or may have and drains; of some ``qubes``, those that serve them.

    A listener goes on when its qube's flag is taken away, so all that have our package count.
    """
    exposed = {forward.exposed for forward in planned}
    able = serving(inventory)
    return sorted(
        qube.name
        for qube in inventory.qubes.values()
        if qube.is_running
        and (qube.told or qube.features.get(LISTENER_FEATURE) or qube.name in able)
        and (not qubes or qube.name in qubes or qube.name in exposed)
    )
