# SPDX-License-Identifier: GPL-2.0-or-later
"""Connections over calls of their own: each has a task of trio, to which the loop's thread hands it over."""

import socket
from collections import deque
from functools import partial

import trio

from qubes_fwd_qrexec.common.config import Service
from qubes_fwd_qrexec.common.errors import RefusedError
from qubes_fwd_qrexec.relay.copy import abort, close_well, read_out, undelivered_bytes
from qubes_fwd_qrexec.relay.socketbuffers import WAITING_BYTES, set_size
from qubes_fwd_qrexec.relay.thread import RelayThread

from .call import Caller, CallTimeouts, Ending, relay_over_call
from .callbudget import CallBudget
from .connection import Connection
from .connectionlog import How
from .crowd import client_key

# docs/behaviours.md, 12: what arrived before an abort is delivered before the RST, within this time.
DELIVERY_S = 1.0
_DELIVERY_LOOK_S = 0.02


class SingleCalls:
    """The carrier of all connections of a listener that have transport=call."""

    def __init__(
        self,
        qrexec_client: tuple[str, ...],
        calls: CallBudget,
        relays: RelayThread,
        tasks: trio.Nursery,
        timeouts: CallTimeouts,
    ) -> None:
        self._qrexec_client = qrexec_client
        self._calls = calls
        self._relays = relays
        self._tasks = tasks
        self._timeouts = timeouts
        self._handed: deque[Connection] = deque()
        self._scopes: dict[Connection, trio.CancelScope] = {}

    # As a carrier, in the loop's thread

    def carry(self, connection: Connection) -> None:
        set_size(connection.sock, WAITING_BYTES)
        connection.carrier = self
        self._handed.append(connection)
        self._relays.tell(self.begin)

    def forget(self, connection: Connection) -> bool:
        """A task has it, which waits by itself."""
        return False

    def end(self, connection: Connection) -> None:
        self._relays.tell(partial(self._cancel, connection))

    # In trio's thread

    def begin(self) -> None:
        """Begin a task for each connection that was handed over."""
        while self._handed:
            connection = self._handed.popleft()
            self._scopes[connection] = trio.CancelScope()
            self._tasks.start_soon(self._serve, connection)

    def _cancel(self, connection: Connection) -> None:
        scope = self._scopes.get(connection)
        if scope is not None:
            scope.cancel()

    async def _serve(self, connection: Connection) -> None:
        """Carry one connection. It ends with an abort unless both directions ended well."""
        how = How.CUT
        try:
            with self._scopes[connection]:
                how = await self._carry(connection)
        except Exception as bug:
            if self._relays.has_failed:
                raise
            how = How.BUG
            self._relays.loop.bugs.note(bug)
        finally:
            del self._scopes[connection]
            abort(connection.sock)
            self._relays.order(partial(connection.over, how), connection.fail)

    async def _carry(self, connection: Connection) -> How:
        """Carry it, and close it well if it ended well. Returns how it ended."""
        kind: str | None = None
        try:
            ending = await self.relay(connection)
            kind, error, how = ending.refusal, ending.error, ending.how
        except RefusedError as refused:
            kind, error, how = refused.kind, str(refused), How.REFUSED
        except OSError as lost:
            error, how = str(lost), How.ABORTED
        if error is None:
            close_well(connection.sock)
        else:
            failed = partial(connection.owner.failed, connection, kind, error)
            self._relays.order(failed, connection.fail)
            await delivered(connection.sock)
        return how

    async def relay(self, connection: Connection) -> Ending:
        """Carry it over a call; see `relay_over_call`."""
        config = connection.config
        caller = Caller(
            self._qrexec_client,
            config.target,
            f"{config.service}+{connection.target_port}",
            self._calls,
            ((config.target, config.name), *client_key(connection.client)),
            ends_with_server=config.service is Service.CONNECT_TCP,
        )
        return await relay_over_call(connection.sock, caller, self._relays, self._timeouts, connection)


async def delivered(accepted: socket.socket, bound_s: float | None = None) -> None:
    """Wait a moment until the client has what it was sent, as an abort drops the rest.

    The kernel has no event for it, so this polls; one look is nearly always enough.
    """
    with trio.move_on_after(DELIVERY_S if bound_s is None else bound_s):
        while undelivered_bytes(accepted):
            read_out(accepted)
            await trio.sleep(_DELIVERY_LOOK_S)
