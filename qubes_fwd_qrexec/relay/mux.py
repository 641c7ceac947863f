# SPDX-License-Identifier: GPL-2.0-or-later
"""A mux call at work: the protocol's state, the qrexec call's two sockets, and a leg for each stream.

In each turn of the loop it reads the call, passes the data of each frame to its socket, and reads the sockets
into frames; everything that a turn produces goes out in one write. The owner (`MuxOwner`) hears what happens
to the mux call as a whole, and decides what to do about it.
"""

import math
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from qubes_fwd_qrexec.common.errors import LocalProtocolError
from qubes_fwd_qrexec.mux import (
    HEADER_BYTES,
    MAX_DATA_BYTES,
    AcceptReceived,
    Buffer,
    Connection,
    CreditReceived,
    CreditReturned,
    DataReceived,
    EofReceived,
    Event,
    GoawayCode,
    GoawayReceived,
    HelloReceived,
    OpenReceived,
    Origin,
    ProxyVersion,
    ResetCode,
    ResetReceived,
)

from .backlog import BULK_FRAMES, MAX_BYTES, Backlog
from .budget import Budget, Share
from .idleness import HALF_CLOSE_S, Idleness
from .leg import Leg
from .looks import Looks
from .loop import Loop
from .muxbase import TURN_FRAMES, MuxBase, new_buffer
from .muxowner import MuxOwner
from .patience import HELLO_S

_FRAME_BYTES = HEADER_BYTES + MAX_DATA_BYTES


class Mux(MuxBase):
    """One end of a mux call that carries streams, between ``source`` and ``sink``; see `MuxBase`.

    ``half_close_s``: abort a stream of which one direction has ended when nothing has moved for so many
    seconds. ``idle_s``: abort any stream in which nothing has moved for so many seconds; a target leaves that
    to the listener, whose setting it does not know. ``hello_s``: how many seconds the peer may take to say
    HELLO; a listener, whose target may still be starting, decides that itself.

    Raises OSError when the kernel can watch no more sockets.
    """

    def __init__(
        self,
        loop: Loop,
        connection: Connection,
        source: socket.socket,
        sink: socket.socket,
        budget: Budget,
        owner: MuxOwner,
        half_close_s: float = HALF_CLOSE_S,
        idle_s: float = math.inf,
        hello_s: float = HELLO_S,
    ) -> None:
        self.share = Share(budget)
        self.connection = connection
        self.legs: dict[int, Leg] = {}
        self._owner = owner
        self._frames = new_buffer(BULK_FRAMES * _FRAME_BYTES)
        self._payloads = [
            self._frames[start + HEADER_BYTES : start + _FRAME_BYTES]
            for start in range(0, len(self._frames), _FRAME_BYTES)
        ]
        self.payload_buffer = self._payloads[0]
        self.idleness = Idleness(half_close_s, idle_s, time.monotonic())
        self._looks = Looks()
        self.backlog = Backlog(loop, connection, sink, self._flush_soon, self._call_broken, self.fail)
        super().__init__(loop, connection, source, self.backlog, owner, hello_s)

    # For the owner

    @property
    def open_room(self) -> int:
        """How many streams may be opened now."""
        return 0 if self.is_over else self.connection.open_room

    def open(
        self, port: int, origin: Origin, sock: socket.socket, proxy: ProxyVersion = ProxyVersion.OFF
    ) -> Leg | None:
        """Ask for a stream, and join it with ``sock`` once it is accepted.

        The leg owns ``sock``, unless the stream is refused. Returns None, and leaves ``sock`` alone, if the
        budget has no room. Raises LocalProtocolError without `open_room`.
        """
        if not self.open_room:
            raise LocalProtocolError("there is no room for another stream")
        window = self.share.admit()
        if not window:
            return None
        first = self._first_bytes(sock)
        stream_id = self.connection.open_stream(port, origin, window, proxy, first)
        leg = self.legs[stream_id] = Leg(self, stream_id, window, sock)
        leg.wait(len(first))
        self._flush_soon()
        return leg

    def _first_bytes(self, sock: socket.socket) -> bytes:
        """What there is already, as far as OPEN takes it, so that a request need not wait for ACCEPT.

        It stays in the socket until then, for another mux call where this one does not begin the stream.
        """
        most = self.connection.first_max
        if not most or self.backlog.bytes_queued > MAX_BYTES:
            return b""
        try:
            return sock.recv(most, socket.MSG_PEEK)
        except OSError:  # nothing yet, or an abort, which the leg is told in the next turn
            return b""

    def accept(self, stream_id: int, sock: socket.socket) -> Leg | None:
        """The server is connected: join the stream with ``sock``, which the leg owns then.

        Returns None, after refusing the stream and leaving ``sock`` alone, if the budget has no room.
        """
        if not (window := self.share.admit()):
            self.refuse(stream_id, ResetCode.OVER_LIMIT)
            return None
        self.connection.accept_stream(stream_id, window)
        leg = self.legs[stream_id] = Leg(self, stream_id, window, sock)
        leg.join()
        self._flush_soon()
        return leg

    def refuse(self, stream_id: int, code: ResetCode) -> None:
        """Refuse a stream that the peer asked for."""
        self.connection.reset_stream(stream_id, code)
        self._flush_soon()

    # For the legs; see `LegOwner`

    def send_data(self, stream_id: int, data: bytes) -> None:
        self.connection.send_data(stream_id, data)
        self._flush_soon()

    def payload_buffers(self, limit: int) -> list[memoryview]:
        full, rest = divmod(limit, MAX_DATA_BYTES)
        return [*self._payloads[:full], self._payloads[full][:rest]] if rest else self._payloads[:full]

    def send_now(self, stream_id: int, length: int) -> None:
        self.backlog.send_now(self.connection.send_data_now(stream_id, length, self._frames))

    def send_eof(self, stream_id: int) -> None:
        self.connection.send_eof(stream_id)
        self._flush_soon()

    def reset(self, stream_id: int, code: ResetCode) -> None:
        self.connection.reset_stream(stream_id, code)
        self._flush_soon()

    def grant(self, stream_id: int, credit: int) -> None:
        self.connection.grant(stream_id, credit)
        self._flush_soon()

    def forget(self, stream_id: int) -> None:
        self.backlog.forget(self.legs.pop(stream_id))
        self._flush_soon()

    # From the call

    def _take_lone(self, chunk: memoryview) -> bool:
        stream_id = self.connection.receive_lone_data(chunk)
        if stream_id:
            self._deliver(stream_id, (chunk[HEADER_BYTES:],))
        return stream_id > 0

    def _take(self, chunk: memoryview) -> Iterator[None]:
        """Frames of one stream that come in a row are written as one: each write wakes a reader."""
        stream_id = 0
        run: list[memoryview] = []
        left = TURN_FRAMES
        try:
            for event in self.connection.receive_data(chunk):
                goes_on = type(event) is DataReceived and event.stream_id == stream_id
                if run and not goes_on:
                    self._deliver(stream_id, run)
                    run = []
                if type(event) is DataReceived:
                    stream_id = event.stream_id
                    run.append(event.data)
                else:
                    self._on_event(event)
                left -= 1
                if not left:
                    if run:
                        self._deliver(stream_id, run)
                        run = []
                    yield
                    left = TURN_FRAMES
        finally:
            if run:
                self._deliver(stream_id, run)

    def _deliver(self, stream_id: int, run: Sequence[Buffer]) -> None:
        leg = self.legs.get(stream_id)
        if leg is not None:  # earlier data may have ended it, as writing shows an abort
            self.loop.guarded(leg.fail, leg.deliver, run)

    def _to_leg(self, stream_id: int, method: Callable[..., None], *arguments: object) -> None:
        """Earlier data may have ended it, as writing shows an abort."""
        leg = self.legs.get(stream_id)
        if leg is not None:
            self.loop.guarded(leg.fail, method, leg, *arguments)

    def _on_event(self, event: Event | None) -> None:
        """Any event but DATA, which is by far the most frequent and is handled first."""
        match event:
            case CreditReceived():
                self._to_leg(event.stream_id, Leg.resume)
            case AcceptReceived():
                self._to_leg(event.stream_id, Leg.join)
            case EofReceived():
                self._to_leg(event.stream_id, Leg.receive_eof)
            case CreditReturned():
                self._to_leg(event.stream_id, Leg.take_back, event.amount)
            case ResetReceived():
                self._on_reset(event)
            case OpenReceived():
                not_begun = partial(self._not_begun, event.stream_id)
                self.loop.guarded(not_begun, self._owner.open_requested, event)
            case HelloReceived():
                self._owner.ready()
            case GoawayReceived():
                if event.goaway.is_final:
                    self._refuse_unseen(event.goaway.last_id)
                self._on_goaway(event.goaway)

    def _refuse_unseen(self, last_id: int) -> None:
        """Streams that the peer had not seen yet may be asked for again elsewhere."""
        for stream_id in [stream_id for stream_id in self.legs if stream_id > last_id]:
            self._refused(self.legs[stream_id], ResetCode.SHUTDOWN)

    def _refused(self, leg: Leg, code: ResetCode) -> None:
        leg.leave()
        self._owner.refused(leg, code)

    def _on_reset(self, event: ResetReceived) -> None:
        leg = self.legs.get(event.stream_id)
        self.connection.reset_stream(event.stream_id)
        if leg is None:
            self._owner.open_abandoned(event.stream_id)
        elif leg.is_joined:
            self.loop.guarded(leg.fail, leg.abort_from_there)
        else:
            self._refused(leg, event.code)

    def _not_begun(self, stream_id: int) -> None:
        """A bug kept a stream from beginning."""
        leg = self.legs.get(stream_id)
        if leg is not None:
            leg.fail()
        else:
            self._owner.open_abandoned(stream_id)
            self.refuse(stream_id, ResetCode.INTERNAL)

    # To the call

    def _write(self) -> None:
        self.backlog.send()
        self.backlog.give_turns()

    # Time and endings

    def _second(self) -> None:
        now = time.monotonic()
        idle = self.idleness.tick(self.legs.values(), now)
        for leg in self._looks.due(self.legs.values(), self.share, now):
            self.loop.guarded(leg.fail, leg.look)
        for leg in idle:
            self.loop.guarded(leg.fail, leg.abort_from_here)

    @property
    def _is_empty(self) -> bool:
        return not self.legs

    def _abort_all(self, code: GoawayCode) -> None:
        for leg in list(self.legs.values()):
            is_done = code is GoawayCode.DONE and leg.has_ended
            self.loop.guarded(leg.fail, leg.outlive_call if is_done else leg.abort_from_there)
