# SPDX-License-Identifier: GPL-2.0-or-later
"""What a mux call has to say and its call has not taken yet, and whose turn it is to add to it.

The call is shared by all streams. So that a keystroke waits behind little, there is a bound to what is
queued; and so that each bulk stream gets its share, those that have had their turn queue up for the next.
"""

import errno
import itertools
import socket
from collections import deque
from collections.abc import Callable
from typing import Protocol

from qubes_fwd_qrexec.mux import MAX_DATA_BYTES, Buffer, Connection

from .loop import GONE, WRITE, End, Loop

# Above it no more is read from sockets, so that a keystroke behind a bulk stream waits for this much and for
# no more (docs/behaviours.md, 20: 20 ms, which is 2 MiB at 100 MiB/s).
HIGH_BYTES = 256 << 10
_LOW_BYTES = 64 << 10
# A stream that does not send all the time waits only for more than this, and never behind those that do.
MAX_BYTES = 2 * HIGH_BYTES
# What a stream sends in one turn at most: four of the longest frames, which go out in one write.
TURN_BYTES = 4 * MAX_DATA_BYTES
# How many streams may send when the call has taken what waited.
_TURNS = HIGH_BYTES // TURN_BYTES
# The kernel lacks memory for now, which is no fault of the call and ends none of its streams.
_SHORTAGE = frozenset((errno.ENOBUFS, errno.ENOMEM))
# How many buffers one write takes (IOV_MAX is 1024).
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
    """Writes what ``connection`` has to ``sink``, the call's non-blocking socket, which is only used.

    ``ready`` is called when the sink takes more, ``broken`` once when it never will again, ``fail`` after a
    bug. Raises OSError when the kernel can watch no more sockets.
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
        """For how many ticks something has waited and nothing of it was taken."""
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
        # A dict for its order, and so that each can leave.
        self._waiting: dict[Sender, None] = {}
        loop.watch(sink.fileno(), 0, self._on_sink, fail)

    @property
    def is_empty(self) -> bool:
        return not self._unsent

    @property
    def bytes_queued(self) -> int:
        return self._unsent_bytes + self._connection.bytes_queued

    def room(self, sender: Sender) -> int:
        """How many bytes a stream may send now; if it has the credit, it is resumed when it is its turn."""
        limit = self._connection.send_limit(sender.stream_id)
        if limit:
            queued = self._unsent_bytes + self._connection.bytes_queued
            is_turn_over = sender.is_bulk and (queued > HIGH_BYTES or self._waiting)
            if is_turn_over or queued > MAX_BYTES:
                self._waiting[sender] = None
                return 0
        return limit

    def give_turns(self) -> None:
        """As many as there is room for, to those who have waited longest.

        Some may have nothing to send any more; so that nobody waits behind those, the others have their turn
        after the next turn of the loop, whatever comes of these.
        """
        if self._waiting and self.bytes_queued < _LOW_BYTES:
            for sender in list(itertools.islice(self._waiting, _TURNS)):
                del self._waiting[sender]
                sender.is_bulk = False
                self._loop.guarded(sender.fail, sender.resume)
            if self._waiting:
                self._loop.after(0.0, self._ready, self._fail)

    def forget(self, sender: Sender) -> None:
        """It has ended and waits for nothing."""
        self._waiting.pop(sender, None)

    def send(self) -> None:
        """Write all that there is, or as much as the call takes now."""
        if self._unsent:
            self._write()
        # What waits stays with the connection, which bounds it, until the call has taken what came before.
        if not self._unsent and self._connection.bytes_queued:
            self._unsent_bytes = self._connection.bytes_queued
            self._unsent.extend(self._connection.data_to_send())
            self._write()

    def room_now(self, sender: Sender) -> int:
        """How many bytes a stream may send by `send_now`; 0 while anything waits."""
        if self._unsent_bytes or self._is_broken:
            return 0
        return self._connection.send_limit_now(sender.stream_id)

    def send_now(self, frame: memoryview) -> None:
        """Write a frame before anything else is queued; what is not taken is copied, and waits."""
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
        """A second has passed. That a UNIX socket's peer will not read on no event tells either."""
        if self._unsent:
            self._write()
        self.stuck_ticks = self.stuck_ticks + 1 if self._unsent_bytes else 0

    def let_go(self) -> None:
        """Of the sink, before it is closed; what is still to be written is for nobody."""
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
            if error.errno not in _SHORTAGE:  # of which no event tells when it is over: `tick` tries again
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
