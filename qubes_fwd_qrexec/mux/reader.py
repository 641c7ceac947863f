# SPDX-License-Identifier: GPL-2.0-or-later
"""Chunks of bytes in, frames out. It knows the layout of the header and the legal lengths, and no more.

No payload is copied: each is a view of the chunk, to be used or copied before the next one. Only a frame
that comes in pieces is put together here, so at most one, of the greatest length that is legal in the kind of
call, is ever buffered.
"""

from collections.abc import Iterator

from .limits import HEADER_BYTES
from .wire import DATA_KIND, HEADER, STREAM_SHAPES, Buffer, Shapes, check_header

Frame = tuple[int, int, memoryview]
"""Type, stream, payload."""


class FrameReader:
    """Cuts a byte stream into frames, however it is chunked.

    ``shapes``: the frames of this kind of call; ``bulk_kind``: the most frequent one of them.
    """

    __slots__ = ("_bulk_kind", "_bulk_least", "_bulk_most", "_shapes", "partial")

    def __init__(self, shapes: Shapes = STREAM_SHAPES, bulk_kind: int = DATA_KIND) -> None:
        self.partial = bytearray()
        """The part of an incomplete frame that has arrived; do not change it."""
        self._shapes = shapes
        self._bulk_kind = bulk_kind
        self._bulk_least, self._bulk_most, _ = shapes[bulk_kind]

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
        bulk_kind, bulk_least, bulk_most = self._bulk_kind, self._bulk_least, self._bulk_most
        unpack_from = HEADER.unpack_from
        while size - position >= HEADER_BYTES:
            kind, length, stream_id = unpack_from(view, position)
            if kind == bulk_kind and bulk_least <= length <= bulk_most and stream_id:
                frame_type = kind >> 8
            else:
                frame_type = check_header(kind, length, stream_id, self._shapes)
            start = position + HEADER_BYTES
            end = start + length
            if end > size:
                break
            position = end
            yield frame_type, stream_id, view[start:end]
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
        check_header(kind, length, stream_id, self._shapes)
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
        return kind >> 8, stream_id, memoryview(partial)[HEADER_BYTES:]


def _header(partial: bytearray) -> tuple[int, int, int]:
    kind, length, stream_id = HEADER.unpack_from(partial)
    return kind, length, stream_id
