# SPDX-License-Identifier: GPL-2.0-or-later
"""Transport `call`: one accepted connection over one qrexec call of its own.

The stock service ``qubes.ConnectTCP`` is enough in the target. What raw qrexec cannot carry is lost: the
server sees an abort of the client as an end of file (libqrexec/remote.c). In the other direction the exit
status helps: the client sees RST if the call failed, or our service says that the server aborted. A FIN that
was sent cannot be taken back, so an end of file waits for the exit status where that must follow: behind the
stock service, which ends with its server, and once the client has ended too. Our own service goes on when
only its server has ended. It reports a clean end with a line on stderr instead (`callsigns`), so there is
nothing to wait for. In a target of the release before it may be started by a socket, and so have no stderr;
then the wait for a status is short, and an abort ends in FIN.

A call that found no room (`callbudget`) is made again without losing a byte of the client: what no
qrexec-client-vm has read is still in the socket that the next one reads.
"""

import socket
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import trio

from qubes_fwd_qrexec.common.errors import RefusedError
from qubes_fwd_qrexec.common.exitstatus import ExitStatus, meaning, refusal
from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.relay.callsigns import Signs
from qubes_fwd_qrexec.relay.copy import Copy, CopyEnd, half_close
from qubes_fwd_qrexec.relay.socketbuffers import MAX_BYTES, set_size
from qubes_fwd_qrexec.relay.thread import RelayThread
from qubes_fwd_qrexec.system.bugs import A_BUG

from .callbudget import CallBudget
from .callplace import Place
from .callqueue import Key, Kind
from .connectionlog import How
from .counters import Carried
from .qrexec import SINGLE_BUFFER_BYTES, Call, CallInput, open_call

# docs/facts.md, T4: the end of stdout, stderr and the exit status race. The others come at most this much
# later, unless the target is slow.
STATUS_WAIT_S = 0.2
# How many times to look, within the time that a connection may be quiet for, whether anything moved.
_LOOKS = 20
# For a status or a sign that must follow the end of file.
_SURE_STATUS_WAIT_S = 10.0
# Exit statuses of a call that never got through, which the next call may have too. 125 is not among them: it
# also means a server that does not listen yet.
_NOT_HAD = (ExitStatus.REFUSED, ExitStatus.NO_ROOM)


@dataclass(frozen=True, slots=True)
class CallTimeouts:
    """Deadlines of one connection, in seconds.

    ``call_s``: for dom0 and the target to take the call. qrexec itself has no timeout for policy and
    autostart, and 120 s for the connection between the qubes.
    ``half_close_s``: without a byte once one direction has ended.
    ``idle_s``: without a byte in either direction (docs/behaviours.md, 38).
    """

    call_s: float = 120.0
    half_close_s: float = 600.0
    idle_s: float = 3600.0


@dataclass(frozen=True, slots=True)
class Ending:
    """How a connection ended.

    ``error`` is None after a clean end of both directions, and otherwise says what went wrong. ``refusal``
    says why nothing was carried at all; ``how`` is one word for the connection log.
    """

    error: str | None
    sent_bytes: int
    received_bytes: int
    refusal: str | None = None
    how: How = How.CLOSED


@dataclass(frozen=True, slots=True)
class Caller:
    """Which calls to make for a connection, and how.

    ``key``: for whom, in the queue for calls. ``ends_with_server``: the service ends as soon as its server
    has sent its last byte, as the stock one does.
    """

    qrexec_client: Sequence[str]
    target: str
    service: str
    budget: CallBudget
    key: Key = ()
    ends_with_server: bool = False

    def place(self, deadline: float) -> AbstractAsyncContextManager[Place]:
        return self.budget.place(Kind.SINGLE, self.target, self.service, self.key, deadline)


async def relay_over_call(
    accepted: socket.socket,
    caller: Caller,
    relays: RelayThread,
    timeouts: CallTimeouts,
    carried: Carried | None = None,
) -> Ending:
    """Carry one accepted, non-blocking connection over a call; the caller closes or aborts it afterwards.

    After an `Ending` with an error abort it: the client must see RST. Raises `RefusedError` if no call can be
    made, and OSError if the client left while it waited for one.
    """
    connection = _Connection(accepted, caller, relays, timeouts, carried)
    try:
        async with trio.open_nursery() as nursery:
            await connection.run(nursery)
    finally:
        connection.close()
    if connection.trouble is not None:
        raise connection.trouble
    return Ending(
        connection.error,
        connection.sent,
        connection.received,
        connection.refusal,
        connection.how if connection.error is not None else How.CLOSED,
    )


class _Connection:
    """One connection while it lives: its two directions, and what is known about how they ended."""

    def __init__(
        self,
        accepted: socket.socket,
        caller: Caller,
        relays: RelayThread,
        timeouts: CallTimeouts,
        carried: Carried | None,
    ) -> None:
        self.error: str | None = None
        self.refusal: Refusal | None = None
        self.how = How.ABORTED
        self.trouble: RefusedError | OSError | None = None
        """Why it did not even begin."""
        self._accepted = accepted
        self._caller = caller
        self._relays = relays
        self._timeouts = timeouts
        self._carried = carried
        self._ended = 0
        self._input: CallInput | None = None
        self._scope: trio.CancelScope
        self._call: Call
        self._up: Copy
        self._down: Copy

    @property
    def sent(self) -> int:
        return self._up.moved

    @property
    def received(self) -> int:
        return self._down.moved

    @property
    def moved_at(self) -> float:
        return max(self._up.moved_at, self._down.moved_at)

    @property
    def is_joined(self) -> bool:
        """Only a byte from the target shows that the server has taken the connection."""
        return self._down.moved > 0

    # As the holder of a place among all calls

    @property
    def quiet_s(self) -> float:
        return time.monotonic() - self.moved_at

    @property
    def sole_user(self) -> None:
        """None, as it is no mux call."""
        return None

    def make_room(self) -> None:
        self.how = How.MADE_ROOM
        self._fail("ended as the idlest connection of its client, to make room for one that waited")

    async def run(self, nursery: trio.Nursery) -> None:
        """Make calls until one does not fail for lack of room, and carry the connection over that one."""
        self._scope = nursery.cancel_scope
        deadline = self._caller.budget.deadline()
        try:
            while True:
                async with self._caller.place(deadline) as place:
                    if self._input is None:
                        self._accepted.getpeername()  # it may have left while it waited
                        self._input = self._begin(CallInput(), nursery)
                    if not await self._make_call(place, self._input):
                        return
        except (RefusedError, OSError) as error:
            self.trouble = error
        finally:
            nursery.cancel_scope.cancel()

    def close(self) -> None:
        """Close what is ours, once nothing is copied any more."""
        if self._input is not None:
            self._input.close()

    def _begin(self, given: CallInput, nursery: trio.Nursery) -> CallInput:
        set_size(self._accepted, MAX_BYTES)  # calls are few, which is bound enough for what they hold
        self._up = Copy(self._accepted, given.ours)
        self._down = Copy(given.ours, self._accepted)  # until there is a call
        if self._carried is not None:
            self._carried.by = self
        nursery.start_soon(self._upload, given)
        nursery.start_soon(self._watch_for_idleness)
        return given

    async def _make_call(self, place: Place, given: CallInput) -> bool:
        """Make one call, to its end. Returns True if there was no room for it, to make it again."""
        caller = self._caller
        try:
            async with open_call(
                caller.qrexec_client,
                caller.target,
                caller.service,
                given,
                SINGLE_BUFFER_BYTES,
                has_stderr=not caller.ends_with_server,
            ) as self._call:
                self._down = Copy(self._call.stdout, self._accepted)
                place.holder = self
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch_for_life, place)
                    must_again = await self._download(place)
                    nursery.cancel_scope.cancel()
                return must_again
        except OSError as error:
            raise RefusedError(f"cannot start {caller.qrexec_client[0]}: {error.strerror}") from error

    async def _upload(self, given: CallInput) -> None:
        """Client to server. An abort of the client ends everything; `_download` handles a broken call."""
        end = await self._copy(self._up)
        if end is CopyEnd.SOURCE_RESET:
            self._fail("the client aborted the connection")
            return
        if end is CopyEnd.EOF:
            half_close(given.ours)
        await self._after_end(lambda: self.received)

    async def _download(self, place: Place) -> bool:
        """Server to client, and then the exit status, which says what an end of file meant."""
        end = await self._copy(self._down)
        if end is not CopyEnd.EOF:
            is_client = end is CopyEnd.SINK_BROKEN
            self._fail("the client aborted the connection" if is_client else "the call was lost")
            return False
        signs = Signs(self.received)
        status = await self._status_or_sign(signs)
        if status is None and self._ended and not signs.is_clean:
            # The client has ended too, so the service will end.
            status = await self._call.status(self._timeouts.half_close_s)
        if status:
            return self._ended_with(status, place)
        if status is None and not signs.is_clean and (self._ended or signs.will_tell):
            self._fail("the call did not end")
            return False
        half_close(self._accepted)
        if status is None:
            await self._after_end(lambda: self.sent)
        return False

    async def _status_or_sign(self, signs: Signs) -> int | None:
        """The exit status; None if it does not come in time, or ``signs`` say that the end is clean."""
        if self._call.stderr is None:
            return await self._call.status(_SURE_STATUS_WAIT_S)
        will_tell = trio.Event()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def wait_for_status() -> None:
                await self._call.status()
                nursery.cancel_scope.cancel()

            @nursery.start_soon
            async def read_signs() -> None:
                while signs.left_bytes and (untrusted_data := await self._call.said(signs.left_bytes)):
                    signs.take(untrusted_data)
                    if signs.is_clean:
                        nursery.cancel_scope.cancel()
                    if signs.will_tell:
                        will_tell.set()

            with trio.move_on_at(trio.current_time() + STATUS_WAIT_S):
                await will_tell.wait()
            if will_tell.is_set():
                with trio.move_on_at(trio.current_time() + _SURE_STATUS_WAIT_S):
                    await trio.sleep_forever()
            nursery.cancel_scope.cancel()
        return await self._call.status(0)

    def _ended_with(self, status: int, place: Place) -> bool:
        """Returns what `_make_call` does. After bytes from the target, its exit status 126 is a forgery."""
        is_through = place.is_through or self._has_sign()
        why = meaning(status, is_through=is_through)
        # Only a call that is through can show that the service is missing.
        was_not_had = status in _NOT_HAD and not is_through
        was_not_had = was_not_had or (status == ExitStatus.NO_SERVICE and self._down.moved == 0)
        if was_not_had and place.failed(why, status):
            return True
        if self._down.moved == 0 and status != ExitStatus.SERVER_RESET:
            self.refusal = refusal(status)
        self._fail(why)
        return False

    async def _watch_for_life(self, place: Place) -> None:
        """Note when the call is through, and end one that hangs before; silence afterwards is no fault."""
        with trio.move_on_after(self._timeouts.call_s):
            await self._call.wait_through(self._has_sign)
        if self._has_sign():  # at the deadline, too: a process that was stopped has not looked before
            place.through()
            return
        why = f"the call was not through to {self._caller.target} within {self._timeouts.call_s:g} s"
        place.failed(why)
        self.refusal = Refusal.NO_CALL
        self._fail(why)

    def _has_sign(self) -> bool:
        return self._call.is_through or self._down.moved > 0 or self._call.has_taken(self._up.moved)

    async def _watch_for_idleness(self) -> None:
        """End a connection in which nothing moves."""
        await _quiet(self._timeouts.idle_s, lambda: self.sent + self.received)
        self._fail(f"idle for {self._timeouts.idle_s:g} s")

    async def _after_end(self, other_moved: Callable[[], int]) -> None:
        """One direction has ended, and the other may go on; after both, the call delivers what it holds."""
        self._ended += 1
        if self._ended == 2:
            status = await self._call.status(self._timeouts.half_close_s)
            if status != 0:
                self._fail("the call did not end" if status is None else meaning(status, is_through=True))
            self._scope.cancel()
            return
        await _quiet(self._timeouts.half_close_s, other_moved)
        self._fail(f"half-closed, and the other direction was idle for {self._timeouts.half_close_s:g} s")

    async def _copy(self, copy: Copy) -> CopyEnd:
        try:
            end = await self._relays.run(copy)
        except OSError as error:
            self._fail(f"cannot watch the connection: {error.strerror}")
            return CopyEnd.SINK_BROKEN  # the scope is cancelled: nobody looks at it
        if end is CopyEnd.BUG:
            self._fail(A_BUG)
        return end

    def _fail(self, error: str) -> None:
        self.error = self.error or error
        self._scope.cancel()


async def _quiet(timeout_s: float, moved: Callable[[], int]) -> None:
    """Return once nothing has moved for ``timeout_s``, or up to a twentieth longer.

    It counts its own looks and not the clock: time in which this process was stopped does not count.
    """
    looks, now = 0, moved()
    while looks < _LOOKS:
        await trio.sleep(timeout_s / _LOOKS)
        before, now = now, moved()
        looks = looks + 1 if now == before else 0
