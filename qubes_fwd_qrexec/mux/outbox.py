# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames that wait to be written: small ones joined, large payloads by reference.

It counts all bytes that wait, and separately those of frames other than DATA and DATAGRAMS: a peer that sends
and never reads can cause those, and there is a bound on them (`limits.CONTROL_BYTES`).
"""

from .limits import COPY_BYTES
from .wire import Buffer, data_header, datagrams_header


class Outbox:
    """The frames of the next write, in order."""

    __slots__ = ("_ready", "_tail", "bytes_queued", "control_bytes")

    def __init__(self) -> None:
        self._ready: list[Buffer] = []
        self._tail = bytearray()
        self.bytes_queued = 0
        self.control_bytes = 0

    def add_control(self, frame: bytes, first: int = 0) -> None:
        """Queue a complete frame other than DATA or DATAGRAMS, of which ``first`` bytes are a stream's."""
        self._tail += frame
        self.bytes_queued += len(frame)
        self.control_bytes += len(frame) - first

    def add_data(self, stream_id: int, payload: Buffer, length: int) -> None:
        """Queue a DATA frame whose ``payload`` has ``length`` bytes."""
        self._add(data_header(stream_id, length), payload, length)

    def add_datagrams(self, flow_id: int, segment: int, payload: Buffer, length: int) -> None:
        """Queue a DATAGRAMS frame whose ``payload``, without the segment, has ``length`` bytes."""
        self._add(datagrams_header(flow_id, segment, length), payload, length)

    def _add(self, header: bytes, payload: Buffer, length: int) -> None:
        tail = self._tail
        tail += header
        self.bytes_queued += len(header) + length
        if length <= COPY_BYTES:
            tail += payload
        else:
            self._ready.append(tail)
            self._ready.append(payload)
            self._tail = bytearray()

    def take(self) -> list[Buffer]:
        """Return and forget all that waits, in the order in which to write it."""
        ready = self._ready
        if self._tail:
            ready.append(self._tail)
            self._tail = bytearray()
        if ready:
            self._ready = []
        self.bytes_queued = self.control_bytes = 0
        return ready
