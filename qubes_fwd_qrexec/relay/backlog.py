# SPDX-License-Identifier: GPL-2.0-or-later
"""What a mux call has queued for its socket, and which stream may add to it next.

All streams share the call. What is queued is bounded, so that a keystroke never waits behind much, and bulk
streams take turns, so that each one gets its share.
"""

import itertools
import socket
from collections.abc import Callable
from typing import Protocol

from qubes_fwd_qrexec.mux import MAX_DATA_BYTES, Connection

from .callwriter import SHORTAGE, CallWriter
from .loop import End, Loop

# Bulk streams are not read while more than this is queued, so that a keystroke waits for so much and no more
# (docs/behaviours.md, 20: 20 ms, which is 2 MiB at 100 MiB/s).
HIGH_BYTES = 256 << 10
_LOW_BYTES = 64 << 10
# A stream that is not bulk waits only when more than this is queued, and never behind bulk streams.
MAX_BYTES = 2 * HIGH_BYTES
# What a stream sends in one turn at most: four of the longest frames, which go out in one write.
TURN_BYTES = 4 * MAX_DATA_BYTES
# How many streams get a turn once little is left in the queue.
_TURNS = HIGH_BYTES // TURN_BYTES


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
        super().__init__(loop, connection, sink, ready, broken, fail)
        self._connection = connection
        # A dict, because it is ordered and any sender can leave.
        self.waiting: dict[Sender, None] = {}

    def room(self, sender: Sender) -> int:
        """How many bytes a stream may send now. At 0 it is resumed when it gets credit, or is its turn."""
        limit = self._connection.send_limit(sender.stream_id)
        if limit:
            queued = self._unsent_bytes + self._connection.bytes_queued
            is_turn_over = sender.is_bulk and (queued > HIGH_BYTES or self.waiting)
            if is_turn_over or queued > MAX_BYTES:
                self.waiting[sender] = None
                return 0
        return limit

    def give_turns(self) -> None:
        """Resume the streams that have waited longest, as many as there is room for.

        Some of them may have nothing left to send. So that nobody waits behind those, the next ones get their
        turn in the next turn of the loop, whatever these do.
        """
        if self.waiting and self.bytes_queued < _LOW_BYTES:
            for sender in list(itertools.islice(self.waiting, _TURNS)):
                del self.waiting[sender]
                sender.is_bulk = False
                self._loop.guarded(sender.fail, sender.resume)
            if self.waiting:
                self._loop.after(0.0, self._ready, self._fail)

    def forget(self, sender: Sender) -> None:
        """A stream has ended: it waits for no turn."""
        self.waiting.pop(sender, None)

    def room_now(self, sender: Sender) -> int:
        """How many bytes a stream may send with `send_now`; 0 while anything is queued."""
        if self._unsent_bytes or self._is_broken:
            return 0
        return self._connection.send_limit_now(sender.stream_id)

    def send_now(self, frame: memoryview) -> None:
        """Write a frame while nothing is queued; what the call does not take is copied and queued."""
        try:
            count = self._sink.send(frame)
        except (BlockingIOError, InterruptedError):
            count = 0
        except OSError as error:
            if error.errno not in SHORTAGE:
                self._break()
                return
            count = 0
        if count < len(frame):
            self._unsent.append(bytes(frame[count:]))
            self._unsent_bytes = len(frame) - count
            self._write()
