# SPDX-License-Identifier: GPL-2.0-or-later
"""What a mux call has queued for its socket, and which stream may add to it next.

All streams share the call. What is queued is bounded, so that a keystroke never waits behind much, and bulk
streams take turns, so that each one gets its share.
"""

import socket
from collections.abc import Callable
from typing import Protocol

from qubes_fwd_qrexec.mux import MAX_DATA_BYTES, Connection

from .callwriter import SHORTAGE, CallWriter
from .loop import End, Loop

# A stream that is not bulk waits only when more than this is queued (docs/behaviours.md, 20: 20 ms, which is
# 2 MiB at 100 MiB/s), and never behind bulk streams. Those are not read while the call has not taken all that
# is queued, so that a keystroke waits for one turn of one of them.
MAX_BYTES = 512 << 10
# What a stream sends in one turn at most: so many of the longest frames, which go out in one write.
BULK_FRAMES = 8
TURN_BYTES = BULK_FRAMES * MAX_DATA_BYTES


class Sender(Protocol):
    """A stream that takes turns. ``is_bulk``: it has had its turn, and has more to send."""

    stream_id: int
    is_bulk: bool

    def resume(self) -> None:
        """It may send again."""

    def fail(self) -> None:
        """There was a bug in `resume`: the stream ends."""


class Backlog(CallWriter):
    """Writes what ``connection`` has queued, and gives its streams their turns; see `CallWriter`."""

    def __init__(
        self,
        loop: Loop,
        connection: Connection,
        sink: socket.socket,
        ready: Callable[[], None],
        broken: Callable[[], None],
        fail: End,
    ) -> None:
        # A turn then goes out in one write: the kernel doubles this, for what it needs beside the bytes.
        sink.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, TURN_BYTES)
        super().__init__(loop, connection, sink, ready, broken, fail)
        self._connection = connection
        # A dict, because it is ordered and any sender can leave.
        self.waiting: dict[Sender, None] = {}
        self._next: Sender | None = None
        """Whose turn it is."""

    def room(self, sender: Sender) -> int:
        """How many bytes a stream may queue now. At 0 it is resumed when it gets credit, or is its turn."""
        limit = self._connection.send_limit(sender.stream_id)
        if limit and (self._is_turn_over(sender) or self.bytes_queued > MAX_BYTES):
            self.waiting[sender] = None
            return 0
        return limit

    def room_now(self, sender: Sender) -> int:
        """How many bytes a stream may send with `send_now`; 0 while anything is queued, and to a bulk stream
        while others wait for their turn.
        """
        if self._unsent_bytes or self._is_broken:
            return 0
        if not sender.is_bulk:
            return self._connection.send_limit_now(sender.stream_id, 1)
        if self._is_turn_over(sender):
            return 0
        return self._connection.send_limit_now(sender.stream_id, BULK_FRAMES)

    def _is_turn_over(self, sender: Sender) -> bool:
        return sender.is_bulk and sender is not self._next and (self._unsent_bytes > 0 or bool(self.waiting))

    def send_now(self, frames: memoryview) -> None:
        """Write frames while nothing is queued; what the call does not take is copied and queued."""
        try:
            count = self._sink.send(frames)
        except (BlockingIOError, InterruptedError):
            count = 0
        except OSError as error:
            if error.errno not in SHORTAGE:
                self._break()
                return
            count = 0
        if count < len(frames):
            self._unsent.append(bytes(frames[count:]))
            self._unsent_bytes = len(frames) - count
            self._write()

    def give_turns(self) -> None:
        """Resume the stream that has waited longest, once nothing is queued.

        It may have nothing left to send. So that nobody waits behind it, the next one gets its turn in the
        next turn of the loop, whatever this one does.
        """
        if self.waiting and not self.bytes_queued:
            self._next = sender = next(iter(self.waiting))
            del self.waiting[sender]
            self._loop.guarded(sender.fail, sender.resume)
            self._next = None
            if self.waiting:
                self._loop.after(0.0, self._ready, self._fail)

    def forget(self, sender: Sender) -> None:
        """A stream has ended: it waits for no turn."""
        self.waiting.pop(sender, None)
