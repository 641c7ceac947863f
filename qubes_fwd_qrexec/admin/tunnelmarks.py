# SPDX-License-Identifier: GPL-2.0-or-later
"""How our own mark of a tunnel qube comes and goes.

Our mark is the feature ``forward.tunnel`` of the qube, or of its template. The marks of others (Whonix, VPN
handlers) are read and never changed.
"""

from qubes_fwd_qrexec.common.errors import RefusedError
from qubes_fwd_qrexec.common.values import QubeName

from .changing import Changed, System, change
from .inventory import ADMIN, TUNNEL_FEATURE, Inventory
from .snapshot import Snapshot
from .store import TUNNEL_NAME, Changes


class NotMarkedError(RefusedError):
    """There is no mark of ours to take away from a qube; ``inventory`` has those of others."""

    def __init__(self, qube: QubeName, inventory: Inventory) -> None:
        super().__init__(f"{qube} has no mark of qvm-forward")
        self.qube = qube
        self.inventory = inventory


def mark(system: System, qube: str) -> Changed:
    """Mark a qube, or all that are made from a template: what would go round it closes.

    Raises `RefusedError` if there is no such qube, and what `change` does.
    """

    def decide(snapshot: Snapshot) -> Changes:
        name = snapshot.check_qube(qube)
        known = snapshot.inventory.qubes[name]
        if known.klass == ADMIN:
            raise RefusedError(f"{name} is the administrative qube, and no traffic goes through it")
        return {} if known.features.get(TUNNEL_FEATURE) else {(name, TUNNEL_NAME): "1"}

    return change(system, decide, "marked")


def unmark(system: System, qube: str) -> Changed:
    """Take our mark away. Raises `NotMarkedError` if there is none, and what `change` does."""

    def decide(snapshot: Snapshot) -> Changes:
        name = snapshot.check_qube(qube)
        if not snapshot.inventory.qubes[name].features.get(TUNNEL_FEATURE):
            raise NotMarkedError(name, snapshot.inventory)
        return {(name, TUNNEL_NAME): None}

    return change(system, decide, "unmarked")
