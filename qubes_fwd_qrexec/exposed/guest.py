# SPDX-License-Identifier: GPL-2.0-or-later
"""A connection of no forward, such as a trial's, which a task of trio waits for."""

import socket
import time
from collections.abc import Callable

from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.mux import Origin
from qubes_fwd_qrexec.relay.copy import abort
from qubes_fwd_qrexec.relay.thread import RelayThread

from .call import Ending
from .connection import Carrier, Connection
from .connectionlog import How


class Guest(Connection):
    """It is its own owner. ``origin``: who connects to what, as the target is told."""

    __slots__ = ("_error", "_finish", "_kind")

    def __init__(self, config: ListenerConfig, sock: socket.socket, origin: Origin) -> None:
        peer = origin.client, origin.client_port
        local = origin.exposed, origin.exposed_port
        super().__init__(self, config, sock, peer, origin.client, local, time.monotonic())
        self._error: str | None = None
        self._kind: str | None = None
        self._finish: Callable[[Ending], None]

    async def relay(self, carrier: Carrier, relays: RelayThread) -> Ending:
        """Have it carried to its end; its socket is closed however this ends.

        When this is cancelled, it is cut before Cancelled is raised. Raises `BugError` after a bug.
        """

        def begin(finish: Callable[[Ending], None]) -> None:
            self._finish = finish
            carrier.carry(self)

        def let_go() -> None:
            self._finish = lambda ending: None
            self.cut()

        try:
            return await relays.wait(begin, let_go)
        finally:
            abort(self.sock)  # it is open still if nothing was begun

    # As its owner

    def failed(self, connection: Connection, kind: str | None, error: str) -> None:
        self._kind, self._error = kind, error

    def ended(self, connection: Connection, how: How) -> None:
        self._finish(Ending(self._error, self.sent, self.received, self._kind, how))
