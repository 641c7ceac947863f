# SPDX-License-Identifier: GPL-2.0-or-later
"""The state of one end of a mux, and the questions that the caller may ask about it.

`incoming` changes it by what the peer sends, `connection` by what the caller does.
"""

from qubes_fwd_qrexec.common.errors import LocalProtocolError

from . import wire
from .abuse import LateFrames, RapidResets
from .limits import CONTROL_BYTES, CONTROL_BYTES_PER_STREAM, LAST_STREAM_ID
from .messages import Goaway, GoawayCode, Hello, ResetCode, Role
from .outbox import Outbox
from .reader import FrameReader
from .states import Half
from .stream import Stream
from .wire import FrameType


class Endpoint:
    """What one end knows. Use `Connection`, which derives from it."""

    def __init__(self, hello: Hello, target_ports: range) -> None:
        self.role = hello.role
        self.hello = hello
        self.peer: Hello | None = None
        """The peer's HELLO; None before it has arrived."""
        self.granted_bytes = 0
        """The credit that the peer has left over all streams. A bound in bytes for the whole process must
        cover it, together with what the caller holds."""
        self._peer_window_bytes = 0
        self._max_streams = hello.max_streams
        self.control_bound_bytes = self._control_bound()
        self._target_ports = target_ports
        self._streams: dict[int, Stream] = {}
        self._last_id = 0
        self._last_accepted = 0
        self._reader = FrameReader()
        self._outbox = Outbox()
        self._late = LateFrames()
        self._rapid = RapidResets()
        self._late_opens = 0
        self._ping: bytes | None = None
        self._is_pong_queued = False
        self._drain_sent: Goaway | None = None
        self._drain_received: Goaway | None = None
        self._is_closed = False
        self._is_closed_by_peer = False
        self._is_receiving = False
        self._failure: str | None = None
        self._outbox.add_control(wire.encode_hello(hello))

    # Questions of the caller

    @property
    def is_ready(self) -> bool:
        """Whether both HELLOs were exchanged and neither end has sent its final GOAWAY."""
        return self.peer is not None and not self.is_over

    @property
    def is_over(self) -> bool:
        """Whether either end sent a final GOAWAY, or the peer broke the protocol. No stream is left then."""
        return self._is_closed or self._is_closed_by_peer

    @property
    def is_draining(self) -> bool:
        """Whether either end takes or opens no more streams."""
        return self._drain_sent is not None or self._drain_received is not None

    @property
    def is_drained(self) -> bool:
        """Whether it drains and no stream is left: time to `close`."""
        return self.is_draining and not self._streams

    @property
    def open_streams(self) -> int:
        """How many slots are taken, by live streams and by those whose RESET is unanswered."""
        return len(self._streams)

    @property
    def open_room(self) -> int:
        """How many streams this end may open now; always 0 on the target side."""
        if self.role is Role.TARGET or not self.is_ready or self.is_draining:
            return 0
        return min(self._max_streams - len(self._streams), LAST_STREAM_ID - self._last_id)

    @property
    def are_ids_used_up(self) -> bool:
        """Whether no stream can be opened here any more: drain, and make another mux call."""
        return self._last_id >= LAST_STREAM_ID

    @property
    def has_partial_frame(self) -> bool:
        """Whether a frame has begun and not ended; the caller bounds how long that may last."""
        return self._reader.has_partial_frame

    @property
    def bytes_queued(self) -> int:
        """How many bytes `data_to_send` would return."""
        return self._outbox.bytes_queued

    def send_limit(self, stream_id: int) -> int:
        """The longest payload that `send_data` takes for a stream now; at 0 wait for CreditReceived."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.local is not Half.FLOWING:
            return 0
        return stream.outgoing.sendable_bytes

    def granted(self, stream_id: int) -> int:
        """The credit that the peer has left on a stream, including what is held back.

        It is the stream's part of `granted_bytes`, and 0 after the peer's EOF or a RESET of either end.
        """
        stream = self._streams.get(stream_id)
        return stream.incoming.granted if stream is not None and stream.is_receiving else 0

    # Shared by both directions

    def _control_bound(self) -> int:
        return CONTROL_BYTES + CONTROL_BYTES_PER_STREAM * self._max_streams

    def _known(self, stream_id: int) -> Stream | None:
        """The stream, or None if it is over. Raises LocalProtocolError if it never existed."""
        stream = self._streams.get(stream_id)
        if stream is None and not 0 < stream_id <= self._last_id:
            raise LocalProtocolError(f"stream {stream_id} never existed")
        return stream

    def _reset(self, stream_id: int, stream: Stream, code: ResetCode) -> None:
        """Send the first RESET of this end on a stream."""
        was_receiving = stream.is_receiving
        stream.move_local(FrameType.RESET)
        if was_receiving:
            self.granted_bytes -= stream.incoming.granted
        self._outbox.add_control(wire.encode_reset(stream_id, code))
        self._free_if_over(stream_id, stream)

    def _free_if_over(self, stream_id: int, stream: Stream) -> None:
        """Free the slot if neither end has anything left to say on the stream."""
        if not stream.is_over:
            return
        del self._streams[stream_id]
        if stream.remote is Half.ENDED:
            # It ended with both EOFs. The peer may not have seen ours yet, and may still send.
            self._late.expect(self._peer_window_bytes - stream.outgoing.available)

    def _say_goodbye(self, code: GoawayCode) -> None:
        """Queue the final GOAWAY, if it was not queued before, and forget all streams."""
        if not self._is_closed:
            self._is_closed = True
            last_id = self._last_id if self._drain_sent is None else self._drain_sent.last_id
            self._outbox.add_control(wire.encode_goaway(Goaway(last_id, code, is_final=True)))
        self._forget_streams()

    def _forget_streams(self) -> None:
        self._streams.clear()
        self._rapid.forget()
        self.granted_bytes = 0
