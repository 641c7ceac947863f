# SPDX-License-Identifier: GPL-2.0-or-later
"""Chunks of bytes in, frames out. It knows the header's layout and legal lengths, and no more.

Payloads are copied exactly once, so that a payload which is kept never keeps the chunk it came in.
At most one frame, HEADER_BYTES + MAX_DATA_BYTES, is ever buffered.
"""

from collections.abc import Iterator

from .limits import HEADER_BYTES, MAX_DATA_BYTES
from .wire import DATA_KIND, HEADER, Buffer, FrameType, check_header

Frame = tuple[int, int, bytes | bytearray]
"""Type, stream, payload."""


class FrameReader:
    """Cuts a byte stream into frames, however it is chunked."""

    __slots__ = ("partial",)

    def __init__(self) -> None:
        self.partial = bytearray()
        """What has come of a frame that is not complete; to be looked at and no more."""

    @property
    def has_partial_frame(self) -> bool:
        """Whether a frame has begun and not ended."""
        return bool(self.partial)

    def frames(self, untrusted_chunk: Buffer) -> Iterator[Frame]:
        """The frames that are complete with this chunk. Take them all before the next chunk.

        Raises RemoteProtocolError as soon as a header is complete and cannot be; not reading on from
        there is up to the caller.
        """
        view = memoryview(untrusted_chunk)
        position = 0
        size = len(view)
        if self.partial:
            position = self._fill(view)
            frame = self._finished()
            if frame is None:
                return
            yield frame
        # A slice of bytes is the one copy; a slice of a view would be none, and is copied below.
        is_bytes = isinstance(untrusted_chunk, bytes)
        unpack_from = HEADER.unpack_from
        while size - position >= HEADER_BYTES:
            kind, length, stream_id = unpack_from(view, position)
            if kind == DATA_KIND and 0 < length <= MAX_DATA_BYTES and stream_id:
                frame_type = FrameType.DATA
            else:
                frame_type = check_header(kind, length, stream_id)
            start = position + HEADER_BYTES
            end = start + length
            if end > size:
                break
            position = end
            if is_bytes:
                yield frame_type, stream_id, untrusted_chunk[start:end]  # type: ignore[misc]
            else:
                yield frame_type, stream_id, bytes(view[start:end])
        if position < size:
            self.partial += view[position:]

    def _fill(self, view: memoryview) -> int:
        """Move what the frame that has begun lacks into it; returns how much of the chunk that took."""
        partial = self.partial
        taken = 0
        if len(partial) < HEADER_BYTES:
            taken = HEADER_BYTES - len(partial)
            partial += view[:taken]
        if len(partial) < HEADER_BYTES:
            return taken
        kind, length, stream_id = _header(partial)
        check_header(kind, length, stream_id)
        missing = HEADER_BYTES + length - len(partial)
        partial += view[taken : taken + missing]
        return taken + missing

    def _finished(self) -> Frame | None:
        """The frame that has begun, if it is complete now."""
        partial = self.partial
        if len(partial) < HEADER_BYTES:
            return None
        kind, length, stream_id = _header(partial)
        if len(partial) < HEADER_BYTES + length:
            return None
        self.partial = bytearray()
        # It is handed over as it is: cutting a bytearray at its front moves a pointer and no bytes.
        del partial[:HEADER_BYTES]
        return kind >> 8, stream_id, partial


def _header(partial: bytearray) -> tuple[int, int, int]:
    kind, length, stream_id = HEADER.unpack_from(partial)
    return kind, length, stream_id
