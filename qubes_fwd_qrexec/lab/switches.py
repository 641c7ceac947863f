# SPDX-License-Identifier: GPL-2.0-or-later
"""Service switches of a lab's qubes: what a qube starts by itself."""

import logging

import trio

from qubes_fwd_qrexec.admin.inventory import NFT_FEATURE
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.values import QubeName

from . import units
from .broker import Broker
from .units import Unit

_log = logging.getLogger("qubes_fwd_qrexec.lab")
# How soon a qube that has started gets what its switch asks for.
_WATCH_S = 0.25


async def follow_switches(broker: Broker) -> None:
    """Until cancelled, give each qube that starts the firewall helper if its switch is on then."""
    lab = broker.view.lab
    before: set[QubeName] = set()
    while True:
        running = {name for name, qube in broker.view.qubes.items() if qube.is_running}
        wanted = []
        try:
            for name in sorted(running - before):
                if lab.feature(name, NFT_FEATURE, with_template=True):
                    _log.info("%s: starts %s", name, Unit.FIREWALL.what)
                    wanted.append((name, Unit.FIREWALL))
            if wanted:
                await trio.to_thread.run_sync(units.start, lab, wanted)
        except StoreError as error:
            _log.error("%s", error)
        before = running
        await trio.sleep(_WATCH_S)
