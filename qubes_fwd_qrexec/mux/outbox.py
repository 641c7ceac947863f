# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames that wait to be written: small ones joined, large payloads by reference.

It counts all bytes that wait, and separately those that are not DATA: a peer that sends and never reads can
cause those, and `Connection` enforces a bound on them (`limits.CONTROL_BYTES`).
"""

from .limits import COPY_BYTES
from .wire import Buffer, data_header


class Outbox:
    """The frames of the next write, in order."""

    __slots__ = ("_ready", "_tail", "bytes_queued", "control_bytes")

    def __init__(self) -> None:
        self._ready: list[Buffer] = []
        self._tail = bytearray()
        self.bytes_queued = 0
        self.control_bytes = 0

    def add_control(self, frame: bytes) -> None:
        """Queue a complete frame other than DATA."""
        self._tail += frame
        self.bytes_queued += len(frame)
        self.control_bytes += len(frame)

    def add_data(self, stream_id: int, payload: Buffer, length: int) -> None:
        """Queue a DATA frame whose ``payload`` has ``length`` bytes."""
        tail = self._tail
        header = data_header(stream_id, length)
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
