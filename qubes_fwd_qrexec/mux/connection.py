# SPDX-License-Identifier: GPL-2.0-or-later
"""One end of a mux: bytes in, events out; calls in, bytes out. SPEC.md describes the protocol.

It does no I/O and knows no clock: the caller moves the bytes, says when a second has passed (`tick`)
and when the lease is over (`drain`). It buffers no stream data: what comes is handed on at once, and
what may come is what the caller granted. Whatever the peer does wrong ends the mux.

The caller's duties: one `receive_data` at a time, its events taken to the end before the next; each
ResetReceived answered by `reset_stream`; each byte consumed given back by `grant`; no more put in while
`bytes_queued` is high. After RemoteProtocolError it may write what `data_to_send` has left (the peer is
told why) and closes the byte stream; every stream of the mux is to be aborted.
"""

from qubes_fwd_qrexec.common.errors import LocalProtocolError

from . import wire
from .incoming import Incoming
from .limits import FRAME_COST_BYTES, HEADER_BYTES, MAX_DATA_BYTES, MIN_WINDOW_BYTES
from .messages import PING_BYTES, Goaway, GoawayCode, Origin, ProxyVersion, ResetCode, Role
from .states import Half
from .stream import Stream
from .wire import DATA_KIND, HEADER, Buffer, FrameType

# Looked up once: the members of an enumeration are not as quick to find as other names.
_FLOWING = Half.FLOWING


class Connection(Incoming):
    """One end of a mux. ``hello`` says which end, and what it offers; see `Hello`.

    ``target_ports``: the ports of the call's argument; no stream may name another. HELLO is queued at
    once, so `data_to_send` has something from the start.
    """

    def data_to_send(self) -> list[Buffer]:
        """Everything that waits to be written, in order; it counts as written from now on.

        Payloads above COPY_BYTES are the very objects that `send_data` got.
        """
        self._is_pong_queued = False
        return self._outbox.take()

    def open_stream(
        self, port: int, origin: Origin, credit: int, proxy: ProxyVersion = ProxyVersion.OFF
    ) -> int:
        """Ask for a stream to that port, granting ``credit`` bytes to the target side; returns its id.

        ``proxy``: which header of the PROXY protocol, made of ``origin``, the server is to get first.
        Raises LocalProtocolError on the target side, without `open_room`, or for a port or credit that
        cannot be.
        """
        if self.open_room <= 0:
            raise LocalProtocolError("there is no room for another stream, or this is the target side")
        if port not in self._target_ports:
            raise LocalProtocolError(f"port {port} is not of this call")
        self._check_own_credit(credit)
        self._last_id += 1
        self._streams[self._last_id] = Stream(0, credit, self._rapid.tick)
        self.granted_bytes += credit
        request = wire.OpenRequest(credit, port, origin, proxy)
        self._outbox.add_control(wire.encode_open(self._last_id, request))
        return self._last_id

    def accept_stream(self, stream_id: int, credit: int) -> None:
        """The target's service is connected: let data flow, granting ``credit`` bytes to the listener side.

        Raises LocalProtocolError if the stream was not asked for or was answered before.
        """
        stream = self._streams.get(stream_id)
        if stream is None or self.role is not Role.TARGET:
            raise LocalProtocolError(f"there is no stream {stream_id} to accept")
        self._check_own_credit(credit)
        stream.move_local(FrameType.ACCEPT)
        stream.remote = Half.FLOWING
        stream.incoming.outstanding = credit
        self.granted_bytes += credit
        self._outbox.add_control(wire.encode_accept(stream_id, credit))

    def send_data(self, stream_id: int, data: Buffer) -> None:
        """Queue 1 to `send_limit` bytes. ``data`` must not change until it was written.

        Raises LocalProtocolError if it is too long, or the stream does not flow.
        """
        stream = self._streams.get(stream_id)
        if stream is None or stream.local is not Half.FLOWING:
            raise LocalProtocolError(
                f"DATA cannot be sent on stream {stream_id}, which is {stream or 'over'}"
            )
        length = len(data)
        if not 0 < length <= MAX_DATA_BYTES or not stream.outgoing.spend(length):
            raise LocalProtocolError(f"{length} bytes, and {stream.outgoing.sendable_bytes} may be sent")
        self._outbox.add_data(stream_id, data, length)

    def send_limit_now(self, stream_id: int) -> int:
        """The longest payload that `send_data_now` takes; 0 while there is no credit or anything waits."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.local is not _FLOWING or self._outbox.bytes_queued:
            return 0
        room = stream.outgoing.available - FRAME_COST_BYTES
        if room >= MAX_DATA_BYTES:
            return MAX_DATA_BYTES
        return room if room > 0 else 0

    def send_data_now(self, stream_id: int, frame: memoryview) -> None:
        """The short way for the little that there mostly is: make a DATA frame of a payload that stands
        behind HEADER_BYTES of room in ``frame``, for a caller who writes it at once. Nothing is queued.

        Raises LocalProtocolError for more than `send_limit_now`, or nothing.
        """
        length = len(frame) - HEADER_BYTES
        stream = self._streams.get(stream_id)
        if (
            stream is None
            or stream.local is not _FLOWING
            or self._outbox.bytes_queued
            or not 0 < length <= MAX_DATA_BYTES
            or (left := stream.outgoing.available - length - FRAME_COST_BYTES) < 0
        ):
            raise LocalProtocolError(f"{length} bytes cannot be sent at once on stream {stream_id}")
        stream.outgoing.available = left
        HEADER.pack_into(frame, 0, DATA_KIND, length, stream_id)

    def send_eof(self, stream_id: int) -> None:
        """Say that nothing more comes from this end (FIN). Raises LocalProtocolError if it was said, or not
        accepted, or the stream is over or reset."""
        stream = self._streams.get(stream_id)
        if stream is None:
            raise LocalProtocolError(f"EOF cannot be sent on stream {stream_id}, which is over")
        stream.move_local(FrameType.EOF)
        self._outbox.add_control(wire.encode_eof(stream_id))
        self._free_if_over(stream_id, stream)

    def reset_stream(self, stream_id: int, code: ResetCode = ResetCode.ABORTED) -> None:
        """Abort a stream, refuse it, or answer the peer's RESET; does nothing if that was done or it is over.

        No event of this stream comes any more. The answer to a RESET may be held back until a later `tick`;
        see `abuse.RapidResets`. Raises LocalProtocolError for a stream that never was.
        """
        stream = self._known(stream_id)
        if stream is None or stream.is_discarding:
            return
        is_answer = self.role is Role.TARGET and stream.local is Half.MUST_RESET
        if not is_answer or self._rapid.may_answer(stream_id, stream.opened_tick):
            self._reset(stream_id, stream, code)

    def grant(self, stream_id: int, credit: int) -> None:
        """Let the peer send ``credit`` bytes more; does nothing if it has ended the stream.

        Small grants are held back and told together; see `credit.ReceiveCredit.grant`. What a consumed
        event gives back is its `cost`. Raises LocalProtocolError past our own window, before ACCEPT, or for
        a stream that never was.
        """
        stream = self._known(stream_id)
        if stream is None or not stream.is_receiving:
            return
        stream.move_local(FrameType.CREDIT)
        incoming = stream.incoming
        if credit <= 0 or incoming.granted + credit > self.hello.window_bytes:
            raise LocalProtocolError(f"{credit} bytes more do not fit the window")
        self.granted_bytes += credit
        increment = incoming.grant(credit)
        if increment:
            self._outbox.add_control(wire.encode_credit(stream_id, increment))

    def recall(self, stream_id: int, keep: int) -> bool:
        """Ask the peer to give back its credit of that stream, but for ``keep`` bytes.

        Its answer comes as CreditReturned, if it has anything to give. Returns whether it was asked: not
        where there is nothing to ask for, nor before it has answered the last time and got credit since.
        Raises LocalProtocolError for a number out of bounds, or a stream that never was or is not accepted.
        """
        if not MIN_WINDOW_BYTES <= keep <= self.hello.window_bytes:
            raise LocalProtocolError(f"{keep} bytes cannot be what is kept")
        stream = self._known(stream_id)
        if stream is None or not stream.is_receiving:
            return False
        stream.move_local(FrameType.RECALL)
        if not stream.incoming.recall(keep):
            return False
        self._outbox.add_control(wire.encode_recall(stream_id, keep))
        return True

    def ping(self, payload: bytes) -> None:
        """Ask for a PONG with the same 8 bytes. Raises LocalProtocolError until the last one is answered.

        No program of ours asks: it is here because either end may (SPEC.md, 6), and a PONG has to be judged.
        """
        if not self.is_ready or self._ping is not None or len(payload) != PING_BYTES:
            raise LocalProtocolError("one PING of 8 bytes at a time, once the mux is ready")
        self._ping = payload
        self._outbox.add_control(wire.encode_ping(payload))

    def tick(self) -> None:
        """A second has passed: what bounds rates begins anew, and answers that were held back are queued."""
        for stream_id in self._rapid.next_tick():
            self._reset(stream_id, self._streams[stream_id], ResetCode.ABORTED)

    def drain(self, code: GoawayCode) -> None:
        """Take (or make) no more streams, and let those that are there go on. Only the first call counts.

        The target side says this when its lease is over. Raises LocalProtocolError for a code that says
        the mux is over.
        """
        if self._drain_sent is None and not self.is_over:
            self._drain_sent = Goaway(self._last_id, code, is_final=False)
            self._outbox.add_control(wire.encode_goaway(self._drain_sent))

    def close(self, code: GoawayCode = GoawayCode.DONE) -> None:
        """Say the last word: every stream that is left is gone. Only the first call counts.

        Write what `data_to_send` has, then close the byte stream. What still comes is dropped.
        """
        self._say_goodbye(code)

    def _check_own_credit(self, credit: int) -> None:
        if credit and not MIN_WINDOW_BYTES <= credit <= self.hello.window_bytes:
            raise LocalProtocolError(
                f"an initial credit is 0, or {MIN_WINDOW_BYTES} to {self.hello.window_bytes} bytes"
            )
