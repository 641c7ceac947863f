# SPDX-License-Identifier: GPL-2.0-or-later
"""Transport `call`: one accepted connection over one qrexec call of its own.

The stock service ``qubes.ConnectTCP`` suffices in the target. What raw qrexec cannot carry is lost:
it turns a client's abort into an end of file for the server (libqrexec/remote.c). The other way round
the exit status tells, so a client sees RST where the call failed or our service says that the server
aborted. Status and end of file race, so every end of file waits a moment for the status: a FIN that
was sent cannot be taken back.
"""

import socket
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from .counters import Carried, Refusal
from .exitstatus import ExitStatus, meaning, refusal
from .qrexec import Call, open_call
from .relay import Copy, CopyEnd, half_close
from .relaythread import RelayThread
from .socketbuffers import MAX_BYTES, set_size

# relay-behaviours, "trio": stdout's end and the exit status race; the status is at most this much later.
_STATUS_WAIT_S = 0.2
# So often is it looked whether anything moved in the time that a connection may be quiet for.
_LOOKS = 20
# Statuses that the next call would end with too.
_REFUSALS = (ExitStatus.REFUSED, ExitStatus.NO_SERVICE)


@dataclass(frozen=True, slots=True)
class CallTimeouts:
    """Deadlines of one connection, in seconds.

    ``call_s``: no byte was taken by the call and none came from it since it began. qrexec has no
    timeout of its own for policy and autostart, and 120 s for the connection between the qubes.
    ``half_close_s``: one direction has ended and nothing has moved in the other since.
    ``idle_s``: nothing has moved in either direction (relay-behaviours 38).
    """

    call_s: float = 60.0
    half_close_s: float = 600.0
    idle_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class Ending:
    """How a connection ended.

    ``error`` is None for a clean end of both directions, else says why not. ``is_refused``: dom0 would
    not have the call, or the target has as many as it can, or lacks the service: the next would fare alike.
    ``refusal`` says why nothing was carried at all; ``how`` is one word for the log of connections.
    """

    error: str | None
    is_refused: bool
    sent_bytes: int
    received_bytes: int
    refusal: Refusal | None = None
    how: str = "closed"


async def relay_over_call(
    accepted: socket.socket,
    client: Sequence[str],
    target: str,
    service: str,
    relays: RelayThread,
    timeouts: CallTimeouts,
    carried: Carried | None = None,
) -> Ending:
    """Carry one accepted, non-blocking connection over a call; whoever calls closes or aborts it.

    An `Ending` with an error asks for an abort: the client must see RST. Raises OSError when the
    qrexec client cannot be started.
    """
    async with open_call(client, target, service) as call:
        set_size(accepted, MAX_BYTES)  # calls are few: what they hold needs no bound but that
        connection = _Connection(accepted, call, relays, timeouts)
        if carried is not None:
            carried.by = connection
        async with trio.open_nursery() as nursery:
            connection.scope = nursery.cancel_scope
            nursery.start_soon(connection.watch_for_life)
            nursery.start_soon(connection.watch_for_idleness)
            nursery.start_soon(connection.download)
            await connection.upload()
        return Ending(
            connection.error,
            connection.is_refused,
            connection.sent,
            connection.received,
            connection.refusal,
            "closed" if connection.error is None else "aborted",
        )


class _Connection:
    """One connection while it lives: two copies, and what is known of how they ended."""

    def __init__(
        self, accepted: socket.socket, call: Call, relays: RelayThread, timeouts: CallTimeouts
    ) -> None:
        self.call = call
        self.up = Copy(accepted, call.stdin)
        self.down = Copy(call.stdout, accepted)
        self.error: str | None = None
        self.is_refused = False
        self.refusal: Refusal | None = None
        self.scope: trio.CancelScope
        self._relays = relays
        self._timeouts = timeouts
        self._ended = 0

    @property
    def sent(self) -> int:
        return self.up.moved

    @property
    def received(self) -> int:
        return self.down.moved

    @property
    def moved_at(self) -> float:
        return max(self.up.moved_at, self.down.moved_at)

    @property
    def is_joined(self) -> bool:
        """Nothing but a byte from the target tells that the server has taken the connection."""
        return self.down.moved > 0

    async def upload(self) -> None:
        """Client to server. A client's abort ends all; why a call takes no more, `download` learns."""
        end = await self._copy(self.up)
        if end is CopyEnd.SOURCE_RESET:
            self._fail("the client aborted the connection")
            return
        if end is CopyEnd.EOF:
            half_close(self.call.stdin)
        await self._after_end(self.down)

    async def download(self) -> None:
        """Server to client, and the verdict of the exit status on what an end of file meant."""
        end = await self._copy(self.down)
        if end is not CopyEnd.EOF:
            is_client = end is CopyEnd.SINK_BROKEN
            self._fail("the client aborted the connection" if is_client else "the call was lost")
            return
        status = await self.call.status(_STATUS_WAIT_S)
        if status:
            # Once there were bytes from the target, its 126 would be a forgery. 125 is no refusal: it is
            # also a server that does not listen yet.
            self.is_refused = status in _REFUSALS and self.down.moved == 0
            if self.error is None and self.down.moved == 0 and status != ExitStatus.SERVER_RESET:
                self.refusal = refusal(status)
            self._fail(meaning(status))
            return
        half_close(self.up.source)
        if status is None:
            await self._after_end(self.up)
        else:
            self.scope.cancel()

    async def watch_for_life(self) -> None:
        """End a call that hangs. Nothing tells when a call is through to the target, so any byte will do."""
        await trio.sleep(self._timeouts.call_s)
        if self.down.moved == 0 and not self.call.has_taken(self.up.moved):
            self._fail(f"the call gave no sign of life for {self._timeouts.call_s:g} s")

    async def watch_for_idleness(self) -> None:
        """End a connection in which nothing moves."""
        await _quiet(self._timeouts.idle_s, self.up, self.down)
        self._fail(f"idle for {self._timeouts.idle_s:g} s")

    async def _after_end(self, other: Copy) -> None:
        """One direction has ended, ``other`` may go on; after both, the call delivers what it holds."""
        self._ended += 1
        if self._ended == 2:
            status = await self.call.status(self._timeouts.half_close_s)
            if status != 0:
                self._fail("the call did not end" if status is None else meaning(status))
            self.scope.cancel()
            return
        await _quiet(self._timeouts.half_close_s, other)
        self._fail(f"half-closed, and the other direction was idle for {self._timeouts.half_close_s:g} s")

    async def _copy(self, copy: Copy) -> CopyEnd:
        try:
            return await self._relays.run(copy)
        except OSError as error:
            self._fail(f"cannot watch the connection: {error.strerror}")
            return CopyEnd.SINK_BROKEN  # nobody hears of it: the scope is cancelled

    def _fail(self, error: str) -> None:
        self.error = self.error or error
        self.scope.cancel()


async def _quiet(timeout_s: float, *copies: Copy) -> None:
    """Return once nothing has moved in them for so long, or up to a twentieth longer.

    It counts its own looks and not the time between: one in which this process was stopped is nobody's
    silence.
    """
    looks, moved = 0, sum(copy.moved for copy in copies)
    while looks < _LOOKS:
        await trio.sleep(timeout_s / _LOOKS)
        before, moved = moved, sum(copy.moved for copy in copies)
        looks = looks + 1 if moved == before else 0
