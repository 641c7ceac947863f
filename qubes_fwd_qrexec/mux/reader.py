# SPDX-License-Identifier: GPL-2.0-or-later
"""Chunks of bytes in, frames out. It knows the layout of the header and the legal lengths, and no more.

Payloads are copied exactly once, so that keeping a payload never keeps the chunk it came in. At most one
frame, HEADER_BYTES + MAX_DATA_BYTES, is ever buffered.
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
        """The part of an incomplete frame that has arrived; do not change it."""

    @property
    def has_partial_frame(self) -> bool:
        """Whether a frame has begun and not ended."""
        return bool(self.partial)

    def frames(self, untrusted_chunk: Buffer) -> Iterator[Frame]:
        """Yield the frames that this chunk completes. Take them all before the next chunk.

        Raises RemoteProtocolError as soon as an illegal header is complete; the caller must not read on then.
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
        # Slicing bytes makes the one copy; slicing a view makes none, so that one is copied below.
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
        """Complete the partial frame as far as the chunk goes; returns how many of its bytes that took."""
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
        """The partial frame, if it is complete now."""
        partial = self.partial
        if len(partial) < HEADER_BYTES:
            return None
        kind, length, stream_id = _header(partial)
        if len(partial) < HEADER_BYTES + length:
            return None
        self.partial = bytearray()
        # It is handed over without a copy: cutting a bytearray at its front moves a pointer and no bytes.
        del partial[:HEADER_BYTES]
        return kind >> 8, stream_id, partial


def _header(partial: bytearray) -> tuple[int, int, int]:
    kind, length, stream_id = HEADER.unpack_from(partial)
    return kind, length, stream_id
