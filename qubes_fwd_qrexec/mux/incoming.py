# SPDX-License-Identifier: GPL-2.0-or-later
"""What the peer's frames do to one end of a mux. Each is checked, changes the state, and may become an event.

Any violation raises RemoteProtocolError, which ends the mux; nothing is repaired or skipped.
"""

from collections.abc import Iterator

from qubes_fwd_qrexec.common.errors import LocalProtocolError, RemoteProtocolError

from . import wire
from .endpoint import Endpoint
from .events import (
    AcceptReceived,
    CreditReceived,
    CreditReturned,
    DataReceived,
    EofReceived,
    Event,
    GoawayReceived,
    HelloReceived,
    OpenReceived,
    PongReceived,
    ResetReceived,
)
from .limits import FRAME_COST_BYTES, HEADER_BYTES, MAX_DATA_BYTES, MIN_WINDOW_BYTES
from .messages import REFUSAL_WHILE_DRAINING, GoawayCode, Role
from .states import Half
from .stream import Stream
from .wire import DATA_KIND, HEADER, Buffer, FrameType

# Looked up once: members of an enumeration are slower to look up than other names.
_FLOWING = Half.FLOWING
_RESET = Half.RESET


class Incoming(Endpoint):
    """The receiving side of `Connection`."""

    def receive_data(self, untrusted_chunk: Buffer) -> Iterator[Event]:
        """Return the events of a chunk, each made as it is taken, so that what the caller does for one counts
        for the next. Take them all before the next call, and do not change the chunk until then.

        Raises RemoteProtocolError, also between events, if the peer broke the protocol, and
        LocalProtocolError if the last chunk's events were not all taken.
        """
        if self._failure is not None:
            raise RemoteProtocolError(self._failure)
        if self._is_receiving:
            raise LocalProtocolError("the events of the last chunk were not all taken")
        if self._is_closed:
            return iter(())
        self._is_receiving = True
        return self._events(untrusted_chunk)

    def receive_lone_data(self, untrusted_chunk: memoryview) -> int:
        """The fast path for the most frequent chunk: exactly one legal DATA frame.

        Returns its stream; the frame counts as received, and its payload follows the header
        (`limits.HEADER_BYTES`). For any other chunk it returns 0 and does nothing: give that one to
        `receive_data`, which also says what is wrong with it.
        """
        length = len(untrusted_chunk) - HEADER_BYTES
        if length <= 0 or self._is_receiving or self._reader.partial:
            return 0
        kind, untrusted_length, stream_id = HEADER.unpack_from(untrusted_chunk)
        if kind != DATA_KIND or untrusted_length != length or length > MAX_DATA_BYTES:
            return 0
        stream = self._streams.get(stream_id)
        if stream is None or stream.remote is not _FLOWING or stream.local >= _RESET:
            return 0
        cost = length + FRAME_COST_BYTES
        left = stream.incoming.outstanding - cost
        if left < 0 or self._outbox.control_bytes > self.control_bound_bytes:
            return 0
        stream.incoming.outstanding = left
        self.granted_bytes -= cost
        return stream_id  # type: ignore[no-any-return]

    def receive_eof(self) -> None:
        """The byte stream has ended. Raises RemoteProtocolError unless either end had sent its final GOAWAY:
        then it is an abort."""
        if not self._is_closed and (not self._is_closed_by_peer or self.has_partial_frame):
            problem = "the byte stream ended without a final GOAWAY"
            self._fail(problem, GoawayCode.PROTOCOL_ERROR)
            raise RemoteProtocolError(problem)

    def _events(self, untrusted_chunk: Buffer) -> Iterator[Event]:
        try:
            yield from self._read(untrusted_chunk)
        except RemoteProtocolError as error:
            # After our own final GOAWAY it no longer matters what was on its way.
            if not self._is_closed or self._failure is not None:
                self._fail(str(error), GoawayCode.PROTOCOL_ERROR)
                raise
        self._is_receiving = False

    def _read(self, untrusted_chunk: Buffer) -> Iterator[Event]:
        streams = self._streams
        outbox = self._outbox
        for frame_type, stream_id, untrusted_payload in self._reader.frames(untrusted_chunk):
            if outbox.control_bytes > self.control_bound_bytes:
                raise RemoteProtocolError("the peer sends and does not read")
            # DATA comes first and needs no table of moves: its only row there is FLOWING.
            if frame_type == FrameType.DATA and (stream := streams.get(stream_id)) is not None:
                if stream.remote is not Half.FLOWING:
                    stream.move_remote(FrameType.DATA)
                cost = len(untrusted_payload) + FRAME_COST_BYTES
                stream.incoming.receive(cost)
                if stream.local < Half.RESET:
                    self.granted_bytes -= cost
                    yield DataReceived(stream_id, untrusted_payload)
            elif self._is_closed:
                return
            else:
                event = self._on_control(FrameType(frame_type), stream_id, untrusted_payload)
                if event is not None:
                    yield event

    def _on_control(self, frame_type: FrameType, stream_id: int, untrusted_payload: Buffer) -> Event | None:
        """Any frame but DATA on a live stream."""
        if self._is_closed_by_peer:
            raise RemoteProtocolError(f"{frame_type.name} after the final GOAWAY")
        if self.peer is None and frame_type is not FrameType.HELLO:
            raise RemoteProtocolError(f"{frame_type.name} before HELLO")
        match frame_type:
            case FrameType.HELLO:
                return self._on_hello(untrusted_payload)
            case FrameType.OPEN:
                return self._on_open(stream_id, untrusted_payload)
            case FrameType.PING:
                self._on_ping(bytes(untrusted_payload))
                return None
            case FrameType.PONG:
                return self._on_pong(bytes(untrusted_payload))
            case FrameType.GOAWAY:
                return self._on_goaway(untrusted_payload)
        stream = self._streams.get(stream_id)
        if stream is None:
            self._on_late(frame_type, stream_id, untrusted_payload)
            return None
        match frame_type:
            case FrameType.ACCEPT:
                return self._on_accept(stream_id, stream, untrusted_payload)
            case FrameType.CREDIT:
                return self._on_credit(stream_id, stream, untrusted_payload)
            case FrameType.RECALL:
                self._on_recall(stream_id, stream, untrusted_payload)
                return None
            case FrameType.RETURN:
                return self._on_return(stream_id, stream, untrusted_payload)
            case FrameType.RESET:
                return self._on_reset(stream_id, stream, untrusted_payload)
            case _:
                return self._on_eof(stream_id, stream)

    # The mux as a whole

    def _on_hello(self, untrusted_payload: Buffer) -> Event:
        if self.peer is not None:
            raise RemoteProtocolError("a second HELLO")
        lowest, highest = wire.decode_versions(untrusted_payload)
        own = self.hello
        version = min(own.max_version, highest)
        if version < max(own.min_version, lowest):
            problem = (
                f"the peer speaks versions {lowest} to {highest} of the mux protocol, "
                f"this end {own.min_version} to {own.max_version}"
            )
            self._fail(problem, GoawayCode.NO_COMMON_VERSION)
            raise RemoteProtocolError(problem)
        peer = wire.decode_hello(untrusted_payload)
        if peer.role is self.role:
            raise RemoteProtocolError(f"both ends say that they are the {peer.role.value} side")
        self.peer = peer
        self._peer_window_bytes = peer.window_bytes
        self._max_streams = max(self._max_streams, peer.max_streams)
        self.control_bound_bytes = self._control_bound()
        return HelloReceived(peer, version)

    def _on_ping(self, payload: bytes) -> None:
        # The peer may not ping again before it has our answer, which is still queued here.
        if self._is_pong_queued:
            raise RemoteProtocolError("a PING before the PONG to the last one was sent")
        self._is_pong_queued = True
        self._outbox.add_control(wire.encode_pong(payload))

    def _on_pong(self, payload: bytes) -> Event:
        if payload != self._ping:
            raise RemoteProtocolError("a PONG that answers no PING")
        self._ping = None
        return PongReceived(payload)

    def _on_goaway(self, untrusted_payload: Buffer) -> Event:
        goaway = wire.decode_goaway(untrusted_payload)
        earlier = self._drain_received
        if earlier is not None and not goaway.is_final:
            raise RemoteProtocolError("a second GOAWAY that is not final")
        if earlier is not None:
            is_possible = goaway.last_id == earlier.last_id
        elif self.role is Role.TARGET:
            is_possible = goaway.last_id == self._last_id
        else:
            # It had processed what it accepted, which may not be asked for again elsewhere.
            is_possible = self._last_accepted <= goaway.last_id <= self._last_id
        if not is_possible:
            raise RemoteProtocolError(f"GOAWAY with the last stream {goaway.last_id}, which is impossible")
        self._drain_received = goaway
        if goaway.is_final:
            self._is_closed_by_peer = True
            self._forget_streams()
        return GoawayReceived(goaway)

    # One stream

    def _on_open(self, stream_id: int, untrusted_payload: Buffer) -> Event | None:
        request = wire.decode_open(untrusted_payload)
        if self.role is not Role.TARGET:
            raise RemoteProtocolError("OPEN from the target side")
        if self._drain_received is not None:
            raise RemoteProtocolError("OPEN after the listener side said GOAWAY")
        if stream_id != self._last_id + 1:
            raise RemoteProtocolError(f"OPEN of stream {stream_id} after stream {self._last_id}")
        if request.port not in self._target_ports:
            raise RemoteProtocolError(f"OPEN to port {request.port}, which is none of this call's ports")
        self._check_peer_credit(request.credit)
        if len(self._streams) >= self._max_streams:
            raise RemoteProtocolError(f"OPEN past the limit of {self._max_streams} streams")
        self._last_id = stream_id
        stream = self._streams[stream_id] = Stream(request.credit, 0, self._rapid.tick)
        if self._drain_sent is None:
            return OpenReceived(stream_id, request.port, request.origin, request.proxy)
        # It crossed our GOAWAY. Until the listener side has seen that, each such stream holds a slot of its
        # own, as only frames that we sent later could free it. So there cannot be more of them than slots.
        self._late_opens += 1
        if self._late_opens > self._max_streams:
            raise RemoteProtocolError("OPEN after GOAWAY was seen")
        self._reset(stream_id, stream, REFUSAL_WHILE_DRAINING[self._drain_sent.code])
        return None

    def _on_accept(self, stream_id: int, stream: Stream, untrusted_payload: Buffer) -> Event | None:
        if self.role is not Role.LISTENER:
            raise RemoteProtocolError("ACCEPT from the listener side")
        if self._drain_received is not None and stream_id > self._drain_received.last_id:
            raise RemoteProtocolError(f"ACCEPT of stream {stream_id} after a GOAWAY that left it out")
        stream.move_remote(FrameType.ACCEPT)
        self._last_accepted = max(self._last_accepted, stream_id)
        credit = wire.decode_number(untrusted_payload)
        self._check_peer_credit(credit)
        stream.outgoing.available = credit
        if stream.is_discarding:
            return None
        stream.local = Half.FLOWING
        return AcceptReceived(stream_id)

    def _on_credit(self, stream_id: int, stream: Stream, untrusted_payload: Buffer) -> Event | None:
        stream.move_remote(FrameType.CREDIT)
        stream.outgoing.replenish(wire.decode_number(untrusted_payload), self._peer_window_bytes)
        return CreditReceived(stream_id) if stream.local is Half.FLOWING else None

    def _on_recall(self, stream_id: int, stream: Stream, untrusted_payload: Buffer) -> None:
        """The answer goes out in order with DATA, so it gives back what is left of the credit right now."""
        stream.move_remote(FrameType.RECALL)
        keep = self._decode_keep(untrusted_payload)
        stream.outgoing.note_recall()
        if stream.local is Half.FLOWING:
            amount = stream.outgoing.give_back(keep)
            self._outbox.add_control(wire.encode_return(stream_id, amount))

    def _on_return(self, stream_id: int, stream: Stream, untrusted_payload: Buffer) -> Event | None:
        stream.move_remote(FrameType.RETURN)
        amount = wire.decode_number(untrusted_payload)
        stream.incoming.take_back(amount)
        if not amount or stream.is_discarding:
            return None
        self.granted_bytes -= amount
        # What was held back may be worth a frame now that the peer has less.
        if increment := stream.incoming.grant(0):
            self._outbox.add_control(wire.encode_credit(stream_id, increment))
        return CreditReturned(stream_id, amount)

    def _on_eof(self, stream_id: int, stream: Stream) -> Event | None:
        was_receiving = stream.is_receiving
        stream.move_remote(FrameType.EOF)
        self._free_if_over(stream_id, stream)
        if not was_receiving:
            return None
        self.granted_bytes -= stream.incoming.granted
        return EofReceived(stream_id)

    def _on_reset(self, stream_id: int, stream: Stream, untrusted_payload: Buffer) -> Event | None:
        code = wire.decode_reset(untrusted_payload)
        was_receiving = stream.is_receiving
        stream.move_remote(FrameType.RESET)
        if was_receiving:
            self.granted_bytes -= stream.incoming.granted
        if stream.is_discarding:
            # Ours crossed it, or this is the answer.
            self._free_if_over(stream_id, stream)
            return None
        stream.local = Half.MUST_RESET
        return ResetReceived(stream_id, code)

    def _on_late(self, frame_type: FrameType, stream_id: int, untrusted_payload: Buffer) -> None:
        """A frame for a stream that is over, or was never opened."""
        if stream_id > self._last_id:
            raise RemoteProtocolError(f"{frame_type.name} on stream {stream_id}, which was never opened")
        match frame_type:
            case FrameType.CREDIT:
                self._late.take_credit(stream_id, wire.decode_number(untrusted_payload))
            case FrameType.RECALL:
                self._decode_keep(untrusted_payload)
                self._late.take_recall(stream_id)
            case FrameType.RESET:
                wire.decode_reset(untrusted_payload)
                self._late.take_reset(stream_id)
            case _:
                raise RemoteProtocolError(f"{frame_type.name} on stream {stream_id}, which is over")

    # Violations

    def _check_peer_credit(self, credit: int) -> None:
        if credit and not MIN_WINDOW_BYTES <= credit <= self._peer_window_bytes:
            raise RemoteProtocolError(f"an initial credit of {credit} bytes")

    def _decode_keep(self, untrusted_payload: Buffer) -> int:
        keep = wire.decode_number(untrusted_payload)
        if not MIN_WINDOW_BYTES <= keep <= self._peer_window_bytes:
            raise RemoteProtocolError(f"a RECALL that lets us keep {keep} bytes")
        return keep

    def _fail(self, problem: str, code: GoawayCode) -> None:
        """End the mux; the first reason counts."""
        if self._failure is None:
            self._failure = problem
            self._say_goodbye(code)
