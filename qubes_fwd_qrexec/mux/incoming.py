# SPDX-License-Identifier: GPL-2.0-or-later
"""What the peer's frames do to one end of a mux. Each is checked, changes the state, and may become an event.

Any violation raises RemoteProtocolError, which ends the mux; nothing is repaired or skipped.
"""

from collections.abc import Iterator

from qubes_fwd_qrexec.common.errors import RemoteProtocolError

from . import wire
from .credit import first_cost
from .events import (
    AcceptReceived,
    CreditReceived,
    CreditReturned,
    DataReceived,
    EofReceived,
    Event,
    OpenReceived,
    ResetReceived,
)
from .limits import FRAME_COST_BYTES, HEADER_BYTES, MAX_DATA_BYTES, MIN_WINDOW_BYTES
from .messages import REFUSAL_WHILE_DRAINING, Role
from .states import Half
from .stream import Stream
from .streams import Streams
from .wire import DATA_KIND, HEADER, Buffer, FrameType

# Looked up once: members of an enumeration are slower to look up than other names.
_FLOWING = Half.FLOWING
_RESET = Half.RESET


class Incoming(Streams):
    """The receiving side of `Connection`."""

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
        left = stream.outstanding - cost
        if left < 0 or self._outbox.control_bytes > self.control_bound_bytes:
            return 0
        stream.outstanding = left
        self.granted_bytes -= cost
        return stream_id  # type: ignore[no-any-return]

    def _read(self, untrusted_chunk: Buffer) -> Iterator[Event | None]:
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
                stream.receive(cost)
                if stream.local < Half.RESET:
                    self.granted_bytes -= cost
                    yield DataReceived(stream_id, untrusted_payload)
                else:
                    yield None
            elif self._is_closed:
                return
            else:
                yield self._on_control(FrameType(frame_type), stream_id, untrusted_payload)

    def _on_control(self, frame_type: FrameType, stream_id: int, untrusted_payload: Buffer) -> Event | None:
        """Any frame but DATA on a live stream."""
        self._check_order(frame_type)
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

    # One stream

    def _on_open(self, stream_id: int, untrusted_payload: Buffer) -> Event | None:
        request = wire.decode_open(untrusted_payload)
        self._check_request("OPEN", stream_id, request.port)
        self._check_peer_credit(request.credit)
        if len(request.first) > self.first_max:
            raise RemoteProtocolError(f"OPEN with first bytes in version {self.version}")
        self._last_id = stream_id
        cost = first_cost(request.first)
        stream = self._streams[stream_id] = Stream(request.credit, -cost, self._rapid.tick)
        self.granted_bytes -= cost
        if self._drain_sent is None:
            return OpenReceived(stream_id, request.port, request.origin, request.proxy, request.first)
        # It crossed our GOAWAY. Until the listener side has seen that, each such stream holds a slot of its
        # own, as only frames that we sent later could free it. So there cannot be more of them than slots.
        self._late_opens += 1
        if self._late_opens > self._max_slots:
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
        stream.available += credit
        if stream.available < 0:
            raise RemoteProtocolError(f"ACCEPT with {credit} bytes, which do not cover the first bytes")
        if stream.is_discarding:
            return None
        stream.local = Half.FLOWING
        return AcceptReceived(stream_id)

    def _on_credit(self, stream_id: int, stream: Stream, untrusted_payload: Buffer) -> Event | None:
        stream.move_remote(FrameType.CREDIT)
        stream.replenish(wire.decode_number(untrusted_payload), self._peer_window_bytes)
        return CreditReceived(stream_id) if stream.local is Half.FLOWING else None

    def _on_recall(self, stream_id: int, stream: Stream, untrusted_payload: Buffer) -> None:
        """The answer goes out in order with DATA, so it gives back what is left of the credit right now."""
        stream.move_remote(FrameType.RECALL)
        keep = self._decode_keep(untrusted_payload)
        stream.note_recall()
        if stream.local is Half.FLOWING:
            amount = stream.give_back(keep)
            self._outbox.add_control(wire.encode_return(stream_id, amount))

    def _on_return(self, stream_id: int, stream: Stream, untrusted_payload: Buffer) -> Event | None:
        stream.move_remote(FrameType.RETURN)
        amount = wire.decode_number(untrusted_payload)
        stream.take_back(amount)
        if not amount or stream.is_discarding:
            return None
        self.granted_bytes -= amount
        # What was held back may be worth a frame now that the peer has less.
        if increment := stream.grant(0):
            self._outbox.add_control(wire.encode_credit(stream_id, increment))
        return CreditReturned(stream_id, amount)

    def _on_eof(self, stream_id: int, stream: Stream) -> Event | None:
        was_receiving = stream.is_receiving
        stream.move_remote(FrameType.EOF)
        self._free_if_over(stream_id, stream)
        if not was_receiving:
            return None
        self.granted_bytes -= stream.granted
        return EofReceived(stream_id)

    def _on_reset(self, stream_id: int, stream: Stream, untrusted_payload: Buffer) -> Event | None:
        code = wire.decode_reset(untrusted_payload)
        was_receiving = stream.is_receiving
        stream.move_remote(FrameType.RESET)
        if was_receiving:
            self.granted_bytes -= stream.granted
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
