# SPDX-License-Identifier: GPL-2.0-or-later
"""What a mux is, whatever it carries: it reads its call, writes at the end of a turn, and ends exactly.

`mux` carries streams, `flowmux` datagrams.
"""

import mmap
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

from qubes_fwd_qrexec.common.errors import RemoteProtocolError
from qubes_fwd_qrexec.mux import Goaway, GoawayCode, Hello, Role

from .callwriter import CallWriter, Queued
from .loop import READ, Loop
from .muxowner import CallOwner
from .patience import TICK_S, Patience

# How much one turn reads from the call: the default size of its socket buffer.
_READ_BYTES = 256 << 10
# How many frames a turn takes of that, where each datagram counts as one. A peer that sends tiny ones would
# else hold up all other connections of the loop: 256 KiB are 26,000 empty datagrams, each a system call.
TURN_FRAMES = 256
# A call that takes nothing more has ended: its last bytes for us arrive within this time or never. It is also
# how long the final GOAWAY waits for a peer that does not read.
_LAST_READ_S = 1.0


def new_buffer(size: int) -> memoryview:
    """A buffer that takes memory only as far as it has been used."""
    return memoryview(mmap.mmap(-1, size))


class _Endpoint(Queued, Protocol):
    """The protocol's state of either kind of call."""

    role: Role

    @property
    def peer(self) -> Hello | None: ...

    @property
    def is_over(self) -> bool: ...

    @property
    def is_draining(self) -> bool: ...

    @property
    def is_drained(self) -> bool: ...

    @property
    def has_partial_frame(self) -> bool: ...

    def tick(self) -> None: ...

    def drain(self, code: GoawayCode) -> None: ...

    def close(self, code: GoawayCode = ...) -> None: ...

    def receive_eof(self) -> None: ...


class MuxBase(ABC):
    """One end of a mux call. It uses ``source`` and the sink of ``writer``, the call's non-blocking sockets,
    and does not close them; it is done with them when the owner hears that it is `over`, or after `abandon`.

    ``hello_s``: how many seconds the peer may take to say HELLO.

    Raises OSError when the kernel can watch no more sockets.
    """

    def __init__(
        self,
        loop: Loop,
        connection: _Endpoint,
        source: socket.socket,
        writer: CallWriter,
        owner: CallOwner,
        hello_s: float,
    ) -> None:
        self.loop = loop
        self.is_over = False
        self.is_peer_wrong = False
        """Whether it is over because the peer broke the protocol."""
        self.is_revoked = False
        """Whether it is over because dom0 ended it, which is no fault."""
        self._endpoint = connection
        self._call_owner = owner
        self._source = source
        self._writer = writer
        self._read_buffer = new_buffer(_READ_BYTES)
        self._taking: Iterator[None] | None = None
        self._is_flush_due = False
        try:
            loop.watch(source.fileno(), READ, self._on_source, self.fail)
        except OSError:
            writer.let_go()
            raise
        self._patience = Patience(connection, writer, hello_s)
        self._after(TICK_S, self._tick)
        self._flush_soon()

    # What each kind of mux does

    @property
    @abstractmethod
    def _is_empty(self) -> bool:
        """Whether it carries nothing."""

    def _take_lone(self, chunk: memoryview) -> bool:
        """The fast path: take what the peer sent, if that is one frame of the most frequent kind."""
        return False

    @abstractmethod
    def _take(self, chunk: memoryview) -> Iterator[None]:
        """Take what the peer sent, and pause after each `TURN_FRAMES` frames. Nothing of the chunk may be
        kept beyond that. Raises RemoteProtocolError.
        """

    @abstractmethod
    def _write(self) -> None:
        """Write what there is, as far as the call takes it."""

    @abstractmethod
    def _second(self) -> None:
        """A second has passed."""

    @abstractmethod
    def _abort_all(self, code: GoawayCode) -> None:
        """End all that it carries, as the call is over; ``code`` is why."""

    # For the owner

    @property
    def peer(self) -> Hello | None:
        """What the other end has said of itself; None before that."""
        return self._endpoint.peer

    def drain(self, code: GoawayCode) -> None:
        """Take or open nothing more; the mux call ends with the last stream or flow."""
        self._endpoint.drain(code)
        self._flush_soon()

    def close(self, code: GoawayCode = GoawayCode.DONE) -> None:
        """End the mux call now, and abort every stream, or end every flow, that is left."""
        self._endpoint.close(code)
        self._abort_all(code)
        self._flush_soon()
        self._after(_LAST_READ_S, partial(self._end, None))

    def abandon(self) -> None:
        """Stop using the call's sockets at once and end all that it carries, without telling the owner."""
        if not self.is_over:
            self.is_over = True
            self._unwatch()
            self._abort_all(GoawayCode.SHUTDOWN)

    def fail(self) -> None:
        """A bug in the call as a whole ends it, and nothing else of the process."""
        self._end("a bug of this end; its log says more", GoawayCode.INTERNAL)

    # From the call

    def _on_source(self, events: int) -> None:
        if self._taking is not None:
            return  # `_go_on` is called in each turn
        try:
            count = self._source.recv_into(self._read_buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(f"the call was lost: {error.strerror}")
            return
        self._patience.heard()
        if count:
            chunk = self._read_buffer[:count]
            if not self._take_lone(chunk):
                self._taking = self._take(chunk)
                self._go_on()
            return
        try:
            self._endpoint.receive_eof()
            self._end(None)
        except RemoteProtocolError as error:
            self._end_wrong(error)

    def _go_on(self) -> None:
        """Take a turn's worth of what was read; the rest follows in the next turns."""
        if self._taking is None:
            return
        try:
            for _ in self._taking:
                self._after(0.0, self._go_on)
                break
            else:
                self._taking = None
        except RemoteProtocolError as error:
            self.is_peer_wrong = True
            self._end_wrong(error)
        if self._endpoint.bytes_queued or self._endpoint.is_draining:
            self._flush_soon()

    def _end_wrong(self, error: RemoteProtocolError) -> None:
        self._writer.send()
        self._end(str(error), GoawayCode.PROTOCOL_ERROR)

    def _on_goaway(self, goaway: Goaway) -> None:
        if not goaway.is_final:
            self._call_owner.draining(goaway.code)
        elif goaway.code is GoawayCode.DONE:
            self._end(None, goaway.code)
        elif goaway.code is GoawayCode.REVOKED:
            self.is_revoked = True
            self._end("dom0 has ended it", goaway.code)
        else:
            self._end(f"the other end closed the mux call: {goaway.code.name}", goaway.code)

    # To the call

    def _flush_soon(self) -> None:
        """Write at the end of this turn, so that everything its events cause goes out together."""
        if not self._is_flush_due:
            self._is_flush_due = True
            self.loop.soon(self._flush, self.fail)

    def _flush(self) -> None:
        self._is_flush_due = False
        if self.is_over:
            return
        self._write()
        if not self._writer.is_empty:
            return
        if self._endpoint.is_over:
            self._end(None)
        elif self._is_empty and self._may_close:
            self.close()

    @property
    def _may_close(self) -> bool:
        """Whether it drains, and the other end needs nothing more. A target that answers no RESET would hold
        the call of a listener for ever."""
        endpoint = self._endpoint
        return endpoint.is_drained or (endpoint.is_draining and endpoint.role is Role.LISTENER)

    def _call_broken(self) -> None:
        """The call takes nothing more. What it still has for us comes first: above all, why."""
        self._after(_LAST_READ_S, partial(self._end, "the call takes nothing more"))

    # Time and endings

    def _tick(self) -> None:
        if self.is_over:
            return
        self._writer.tick()
        self._endpoint.tick()
        self._flush_soon()  # for what was held back
        if problem := self._patience.tick():
            self._end(problem)
        else:
            self._second()
            self._after(TICK_S, self._tick)

    def _after(self, delay_s: float, callback: Callable[[], None]) -> None:
        self.loop.after(delay_s, callback, self.fail)

    def _end(self, problem: str | None, code: GoawayCode = GoawayCode.SHUTDOWN) -> None:
        """End all that is left, and tell the owner; ``problem`` is None if it ended as agreed."""
        if self.is_over:
            return
        self.is_over = True
        try:
            self._unwatch()
            self._abort_all(code)
        finally:
            self._call_owner.over(problem)

    def _unwatch(self) -> None:
        self._taking = None
        self.loop.unwatch(self._source.fileno())
        self._writer.let_go()
