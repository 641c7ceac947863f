# SPDX-License-Identifier: GPL-2.0-or-later
"""The streams of one end of a mux, and the questions that the caller may ask about them.

`incoming` changes them by what the peer sends, `connection` by what the caller does.
"""

from typing import ClassVar

from qubes_fwd_qrexec.common.errors import LocalProtocolError

from . import wire
from .abuse import LateFrames, RapidResets
from .endpoint import Endpoint
from .events import Event
from .limits import CONTROL_BYTES_PER_STREAM, MAX_FIRST_BYTES
from .messages import Hello, ResetCode
from .reader import FrameReader
from .states import Half
from .stream import Stream
from .wire import FrameType


class Streams(Endpoint[Event]):
    """What one end knows of its streams. Use `Connection`, which derives from it."""

    CONTROL_BYTES_PER_SLOT: ClassVar = CONTROL_BYTES_PER_STREAM
    MAGIC: ClassVar = wire.MAGIC
    SLOT: ClassVar = "stream"

    def __init__(self, hello: Hello, target_ports: range) -> None:
        super().__init__(hello, target_ports, FrameReader())
        self.granted_bytes = 0
        """The credit that the peer has left over all streams. A bound in bytes for the whole process must
        cover it, together with what the caller holds."""
        self._streams: dict[int, Stream] = {}
        self._late = LateFrames()
        self._rapid = RapidResets()
        self._late_opens = 0

    # Questions of the caller

    @property
    def open_streams(self) -> int:
        """How many slots are taken, by live streams and by those whose RESET is unanswered."""
        return len(self._streams)

    @property
    def slots_taken(self) -> int:
        return len(self._streams)

    @property
    def first_max(self) -> int:
        """How many bytes of a stream OPEN may have."""
        return MAX_FIRST_BYTES if self.version > 1 else 0

    def send_limit(self, stream_id: int) -> int:
        """The longest payload that `send_data` takes for a stream now; at 0 wait for CreditReceived."""
        stream = self._streams.get(stream_id)
        if stream is None or stream.local is not Half.FLOWING:
            return 0
        return stream.sendable_bytes

    def granted(self, stream_id: int) -> int:
        """The credit that the peer has left on a stream, including what is held back.

        It is the stream's part of `granted_bytes`, and 0 after the peer's EOF or a RESET of either end.
        """
        stream = self._streams.get(stream_id)
        return stream.granted if stream is not None and stream.is_receiving else 0

    # Shared by both directions

    @property
    def _peer_window_bytes(self) -> int:
        return 0 if self.peer is None else self.peer.window_bytes

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
            self.granted_bytes -= stream.granted
        self._outbox.add_control(wire.encode_reset(stream_id, code))
        self._free_if_over(stream_id, stream)

    def _free_if_over(self, stream_id: int, stream: Stream) -> None:
        """Free the slot if neither end has anything left to say on the stream."""
        if not stream.is_over:
            return
        del self._streams[stream_id]
        if stream.remote is Half.ENDED:
            # It ended with both EOFs. The peer may not have seen ours yet, and may still send.
            self._late.expect(self._peer_window_bytes - stream.available)

    def _forget_all(self) -> None:
        self._streams.clear()
        self._rapid.forget()
        self.granted_bytes = 0
