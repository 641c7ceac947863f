# SPDX-License-Identifier: GPL-2.0-or-later
"""Service switches of a lab's qubes: what a qube starts by itself."""

import logging

import trio

from qubes_fwd_qrexec.admin.inventory import LISTENER_FEATURE, NFT_FEATURE
from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.common.values import QubeName

from . import units
from .broker import Broker
from .units import Unit

_log = logging.getLogger("qubes_fwd_qrexec.lab")
# How soon a qube that has started gets what its switch asks for.
_WATCH_S = 0.25


class Switches:
    """Made for a broker; `follow` and `watch` start what the switches of qubes that have started ask for."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._following = trio.Lock()

    async def follow(self) -> None:
        """Return when all of it is ready. Raises `StoreError`."""
        broker = self._broker
        async with self._following:
            begun = sorted(broker.take_begun())
            wanted = [(name, unit) for name in begun for unit in self._asked_for(name)]
            for name, unit in wanted:
                _log.info("%s: starts %s", name, unit.what)
            if wanted:
                await trio.to_thread.run_sync(units.start, broker.view.lab, wanted)

    async def watch(self) -> None:
        """Until cancelled."""
        while True:
            await self.follow_or_log()
            await trio.sleep(_WATCH_S)

    async def follow_or_log(self) -> None:
        """As `follow`, where nobody can be told what does not start."""
        try:
            await self.follow()
        except StoreError as error:
            _log.error("%s", error)

    def _asked_for(self, name: QubeName) -> list[Unit]:
        """Raises `StoreError`."""
        lab = self._broker.view.lab
        is_on = {
            key: bool(lab.feature(name, key, with_template=True)) for key in (LISTENER_FEATURE, NFT_FEATURE)
        }
        has_firewall = any(is_on.values()) and self._broker.places.why_no_ip is None
        return [*is_on[LISTENER_FEATURE] * [Unit.LISTENER], *has_firewall * [Unit.FIREWALL]]
