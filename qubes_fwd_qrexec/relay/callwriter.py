# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes what a mux has queued to its call, as far as the call takes it."""

import errno
import itertools
import socket
from collections import deque
from collections.abc import Callable
from typing import Protocol

from qubes_fwd_qrexec.mux import Buffer

from .loop import GONE, WRITE, End, Loop

# The kernel is short of memory, which is temporary: it ends neither the call nor what it carries.
SHORTAGE = frozenset((errno.ENOBUFS, errno.ENOMEM))
# How many buffers one write passes on (IOV_MAX is 1024).
_WRITE_BUFFERS = 64


class Queued(Protocol):
    """The protocol's state of a mux: what it has queued."""

    @property
    def bytes_queued(self) -> int: ...

    def data_to_send(self) -> list[Buffer]: ...


class CallWriter:
    """Writes what ``connection`` has queued to ``sink``, the call's non-blocking socket.

    It does not own the sink: call `let_go` before closing that. ``ready`` is called when the sink takes more,
    ``broken`` once when it never will again, and ``fail`` after a bug. Raises OSError when the kernel can
    watch no more sockets.
    """

    def __init__(
        self,
        loop: Loop,
        connection: Queued,
        sink: socket.socket,
        ready: Callable[[], None],
        broken: Callable[[], None],
        fail: End,
    ) -> None:
        self.stuck_ticks = 0
        """For how many ticks something has been queued and the sink has taken nothing."""
        self._loop = loop
        self._queued = connection
        self._sink = sink
        self._ready = ready
        self._broken = broken
        self._fail = fail
        self._mask = 0
        self._is_broken = False
        self._unsent: deque[Buffer] = deque()
        self._unsent_bytes = 0
        loop.watch(sink.fileno(), 0, self._on_sink, fail)

    @property
    def is_empty(self) -> bool:
        return not self._unsent

    @property
    def bytes_queued(self) -> int:
        return self._unsent_bytes + self._queued.bytes_queued

    def send(self) -> None:
        """Write everything that is queued, or as much as the call takes now."""
        if self._unsent:
            self._write()
        # The rest stays with the connection, which bounds it, until the call has taken what came before.
        if not self._unsent and self._queued.bytes_queued:
            self._unsent_bytes = self._queued.bytes_queued
            self._unsent.extend(self._queued.data_to_send())
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
            if error.errno not in SHORTAGE:  # no event says when that is over: `tick` tries again
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
