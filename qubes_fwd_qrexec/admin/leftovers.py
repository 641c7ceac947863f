# SPDX-License-Identifier: GPL-2.0-or-later
"""Which qubes may have connections of forwards, open or closed."""

from collections.abc import Collection

from qubes_fwd_qrexec.common.values import QubeName

from .inventory import LISTENER_FEATURE, Inventory
from .revoking import serving
from .states import Plan


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
