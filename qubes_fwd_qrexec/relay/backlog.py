# SPDX-License-Identifier: GPL-2.0-or-later
"""What a mux call has queued for its socket, and which stream may add to it next.

All streams share the call. What is queued is bounded, so that a keystroke never waits behind much, and bulk
streams take turns, so that each one gets its share.
"""

import errno
import itertools
import socket
from collections import deque
from collections.abc import Callable
from typing import Protocol

from qubes_fwd_qrexec.mux import MAX_DATA_BYTES, Buffer, Connection

from .loop import GONE, WRITE, End, Loop

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
# The kernel is short of memory, which is temporary: it ends neither the call nor its streams.
_SHORTAGE = frozenset((errno.ENOBUFS, errno.ENOMEM))
# How many buffers one write passes on (IOV_MAX is 1024).
_WRITE_BUFFERS = 64


class Sender(Protocol):
    """A stream that takes turns. ``is_bulk``: it has had its turn, and has more to send."""

    stream_id: int
    is_bulk: bool

    def resume(self) -> None:
        """It may send again."""

    def fail(self) -> None:
        """There was a bug in `resume`: the stream ends."""


class Backlog:
    """Writes what ``connection`` has queued to ``sink``, the call's non-blocking socket.

    It does not own the sink: call `let_go` before closing that. ``ready`` is called when the sink takes more,
    ``broken`` once when it never will again, and ``fail`` after a bug. Raises OSError when the kernel can
    watch no more sockets.
    """

    def __init__(
        self,
        loop: Loop,
        connection: Connection,
        sink: socket.socket,
        ready: Callable[[], None],
        broken: Callable[[], None],
        fail: End,
    ) -> None:
        self.stuck_ticks = 0
        """For how many ticks something has been queued and the sink has taken nothing."""
        self._loop = loop
        self._connection = connection
        self._sink = sink
        self._ready = ready
        self._broken = broken
        self._fail = fail
        self._mask = 0
        self._is_broken = False
        self._unsent: deque[Buffer] = deque()
        self._unsent_bytes = 0
        # A dict, because it is ordered and any sender can leave.
        self.waiting: dict[Sender, None] = {}
        loop.watch(sink.fileno(), 0, self._on_sink, fail)

    @property
    def is_empty(self) -> bool:
        return not self._unsent

    @property
    def bytes_queued(self) -> int:
        return self._unsent_bytes + self._connection.bytes_queued

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

    def send(self) -> None:
        """Write everything that is queued, or as much as the call takes now."""
        if self._unsent:
            self._write()
        # The rest stays with the connection, which bounds it, until the call has taken what came before.
        if not self._unsent and self._connection.bytes_queued:
            self._unsent_bytes = self._connection.bytes_queued
            self._unsent.extend(self._connection.data_to_send())
            self._write()

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
            if error.errno not in _SHORTAGE:
                self._break()
                return
            count = 0
        if count < len(frame):
            self._unsent.append(bytes(frame[count:]))
            self._unsent_bytes = len(frame) - count
            self._write()

    def tick(self) -> None:
        """A second has passed: try again. No event says that the peer of a UNIX socket will not read on."""
        if self._unsent:
            self._write()
        self.stuck_ticks = self.stuck_ticks + 1 if self._unsent_bytes else 0

    def let_go(self) -> None:
        """Stop using the sink, before it is closed; what is still queued is lost."""
        if not self._is_broken:
            self._is_broken = True
            self._loop.unwatch(self._sink.fileno())

    def _write(self) -> None:
        mask = 0
        try:
            while self._unsent and not self._is_broken:
                is_short = len(self._unsent) <= _WRITE_BUFFERS
                some = self._unsent if is_short else itertools.islice(self._unsent, _WRITE_BUFFERS)
                self._written(self._sink.sendmsg(some))
        except (BlockingIOError, InterruptedError):
            mask = WRITE
        except OSError as error:
            if error.errno not in _SHORTAGE:  # no event says when that is over: `tick` tries again
                self._break()
        if self._is_broken:
            self._unsent.clear()
            self._unsent_bytes = 0
        elif mask != self._mask:
            self._mask = mask
            self._loop.change(self._sink.fileno(), mask)

    def _written(self, count: int) -> None:
        self.stuck_ticks = 0
        self._unsent_bytes -= count
        if not self._unsent_bytes:
            self._unsent.clear()
            return
        while count:
            first = self._unsent.popleft()
            if count < len(first):
                self._unsent.appendleft(memoryview(first)[count:])
                return
            count -= len(first)

    def _on_sink(self, events: int) -> None:
        if events & GONE:
            self._break()
        else:
            self._ready()

    def _break(self) -> None:
        if not self._is_broken:
            self.let_go()
            self._broken()
