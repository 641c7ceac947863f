# SPDX-License-Identifier: GPL-2.0-or-later
"""Bytes from one socket to another, until they end, and how they ended.

This is the arrow between two sockets of one qube: accepted client and qrexec call in the exposed qube,
qrexec call and server in the target. A `Copy` is one direction. It never passes an ending on: whoever
started it is told `CopyEnd` and decides, because only the owner knows whether an end of file on this
side is a clean one.

It works in a plain `Loop` without trio; `relaythread` makes it usable from trio.
"""

import contextlib
import errno
import fcntl
import select
import socket
import struct
import termios
import time
from collections.abc import Callable
from enum import Enum, auto
from functools import partial

from .loop import GONE, READ, WRITE, Loop

# As much as qrexec-client-vm asks for by default (qubes-core-qrexec agent/qrexec-client-vm.c): what a
# stalled direction holds at most, beside the kernel's own socket buffers.
BUFFER_BYTES = 65536
# How often a sink is asked whether it still takes anything. Of a UNIX socket whose peer will not read on
# (SHUT_RD, as the qrexec agent does when a call is lost) no event tells: only a send does.
LOOK_S = 2.0
# What is read and dropped so that a close is no abort: more than a receive buffer of the default size.
_READ_OUT_BYTES = 16 * BUFFER_BYTES


class CopyEnd(Enum):
    """How a copy ended."""

    EOF = auto()
    """The source ended cleanly and the sink has taken every byte of it."""
    SOURCE_RESET = auto()
    """The source was aborted; the sink has taken what had arrived before."""
    SINK_BROKEN = auto()
    """The sink takes no more; what it had not taken is lost."""
    BUG = auto()
    """There was a bug of ours in it; what it had not passed on is lost."""


class Copy:
    """One direction: non-blocking ``source`` to non-blocking ``sink``.

    ``looks``: whether the sink is looked at also while there is nothing to send, for who has no timer of its
    own. One that has been sent more than it takes always is.

    ``moved`` counts the bytes that the sink has taken, ``moved_at`` is when it last did
    (`time.monotonic`, seconds). Both may be read from any thread.
    """

    __slots__ = ("looks", "moved", "moved_at", "on_end", "pending", "sink", "source")

    def __init__(self, source: socket.socket, sink: socket.socket, *, looks: bool = False) -> None:
        self.looks = looks
        self.source = source
        self.sink = sink
        self.moved = 0
        self.moved_at = time.monotonic()
        self.pending = b""
        self.on_end: Callable[[CopyEnd], None] | None = None


class _Endpoint:
    """A socket in the loop, with the copy that reads it and the one that writes it.

    ``was_reset`` outlives the kernel's own note of an abort. The first call that meets it takes it away,
    and a read after a failed write would look like a clean end.
    """

    __slots__ = ("fd", "mask", "reader", "was_reset", "writer")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.reader: Copy | None = None
        self.writer: Copy | None = None
        self.was_reset = False
        self.mask = -1  # not watched

    def wanted(self) -> int:
        reading = self.reader is not None and not self.reader.pending
        writing = self.writer is not None and self.writer.pending
        return (READ if reading else 0) | (WRITE if writing else 0)


class Relay:
    """Any number of copies in a loop, whose thread alone may call this.

    It owns no socket. A socket must outlive the copies it is part of: stop them, then close it.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._endpoints: dict[int, _Endpoint] = {}
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._is_looking = False

    def start(self, copy: Copy, on_end: Callable[[CopyEnd], None]) -> None:
        """Begin to copy. ``on_end`` is called once, from the loop, and may start or stop others.

        Raises ValueError where another copy reads the source or writes the sink already, and OSError where
        the kernel can watch no more sockets; nothing has begun then.
        """
        for role, sock in (("reader", copy.source), ("writer", copy.sink)):
            known = self._endpoints.get(sock.fileno())
            if known is not None and getattr(known, role) is not None:
                raise ValueError("one copy at a time may read a socket, and one may write it")
        source, sink = self._endpoint(copy.source), self._endpoint(copy.sink)
        copy.on_end = on_end
        source.reader = copy
        sink.writer = copy
        try:
            self._update(source)
            self._update(sink)
        except OSError:
            self.stop(copy)
            raise
        if not self._is_looking:
            self._is_looking = True
            self._loop.after(LOOK_S, self._look, self._stop_looking)

    def stop(self, copy: Copy) -> None:
        """Let go of a copy's sockets; what it had not passed on is lost, and ``on_end`` is not called."""
        if copy.on_end is None:
            return
        copy.on_end = None
        source, sink = self._endpoint(copy.source), self._endpoint(copy.sink)
        source.reader = None
        sink.writer = None
        self._update(source)
        self._update(sink)

    def _endpoint(self, sock: socket.socket) -> _Endpoint:
        fd = sock.fileno()
        endpoint = self._endpoints.get(fd)
        if endpoint is None:
            endpoint = self._endpoints[fd] = _Endpoint(fd)
        return endpoint

    def _update(self, endpoint: _Endpoint) -> None:
        """Make the kernel's interest what the copies of this endpoint need."""
        if endpoint.reader is None and endpoint.writer is None:
            if endpoint.mask >= 0:
                self._loop.unwatch(endpoint.fd)
            self._endpoints.pop(endpoint.fd, None)
            endpoint.mask = -1
            return
        wanted = endpoint.wanted()
        if endpoint.mask < 0:
            end = partial(self._fail, endpoint)
            self._loop.watch(endpoint.fd, wanted, partial(self._serve, endpoint), end)
        elif endpoint.mask != wanted:
            self._loop.change(endpoint.fd, wanted)
        endpoint.mask = wanted

    def _serve(self, endpoint: _Endpoint, events: int) -> None:
        reader = endpoint.reader
        can_read = reader is not None and not reader.pending
        if can_read and reader is not None and events & (READ | GONE):
            self._pull(reader, endpoint)
        writer = endpoint.writer
        if writer is not None and writer.pending and events & WRITE:
            self._push(writer, endpoint)
        if events & GONE and not can_read:
            self._gone(endpoint)

    def _gone(self, endpoint: _Endpoint) -> None:
        """The peer is away in both directions, and nobody is reading who would find out why.

        A sink is then broken: TCP says HUP only after an abort or after both FINs, and a socket whose
        FIN we sent has no writer any more. A reader that waits for its own sink reads the rest later;
        until then the kernel must not repeat the news at every turn.
        """
        if endpoint.writer is not None:
            self._end(endpoint.writer, CopyEnd.SINK_BROKEN)
        if endpoint.reader is not None and endpoint.mask == 0:
            self._loop.unwatch(endpoint.fd)
            endpoint.mask = -1

    def _pull(self, copy: Copy, source: _Endpoint) -> None:
        """Read once and write at once: most bytes never wait in here."""
        try:
            count = copy.source.recv_into(self._buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._end(copy, CopyEnd.SOURCE_RESET)
            return
        if count == 0:
            self._end(copy, CopyEnd.SOURCE_RESET if source.was_reset else CopyEnd.EOF)
            return
        sent = self._send(copy, self._buffer[:count])
        if 0 <= sent < count:
            copy.pending = bytes(self._buffer[sent:count])
            self._update(source)
            self._update(self._endpoint(copy.sink))

    def _look(self) -> None:
        """Ask each sink that holds something up, and each that is to be looked at, whether it takes more."""
        self._is_looking = bool(self._endpoints)
        for endpoint in list(self._endpoints.values()):
            copy = endpoint.writer
            if copy is not None and (copy.pending or copy.looks):
                self._loop.guarded(partial(self._fail, endpoint), self._push, copy, endpoint)
        if self._is_looking:
            self._loop.after(LOOK_S, self._look, self._stop_looking)

    def _stop_looking(self) -> None:
        self._is_looking = False

    def _push(self, copy: Copy, sink: _Endpoint) -> None:
        sent = self._send(copy, copy.pending)
        if sent >= 0:
            copy.pending = copy.pending[sent:]
            if not copy.pending:
                self._update(sink)
                self._update(self._endpoint(copy.source))

    def _send(self, copy: Copy, data: bytes | memoryview) -> int:
        """How many bytes the sink took; -1 when that ended the copy."""
        try:
            sent = copy.sink.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            # EPIPE tells of a FIN before the RST: what there is to read then does end cleanly (tcp_reset).
            self._endpoint(copy.sink).was_reset = error.errno != errno.EPIPE
            self._end(copy, CopyEnd.SINK_BROKEN)
            return -1
        if sent:
            copy.moved += sent
            copy.moved_at = time.monotonic()
        return sent

    def _fail(self, endpoint: _Endpoint) -> None:
        """There is a bug in a copy of this socket: both end."""
        for copy in (endpoint.reader, endpoint.writer):
            if copy is not None:
                self._end(copy, CopyEnd.BUG)

    def _end(self, copy: Copy, how: CopyEnd) -> None:
        on_end = copy.on_end
        try:
            self.stop(copy)
        finally:
            if on_end is not None:
                on_end(how)


def abort(sock: socket.socket) -> None:
    """Close so that the peer sees an abort: RST on TCP, and never a clean end of what was sent."""
    abort_by_default(sock)
    sock.close()


def abort_by_default(sock: socket.socket) -> None:
    """Make every close an abort, also the kernel's when this process dies; `close_cleanly` says otherwise."""
    with contextlib.suppress(OSError):  # it may have ended by itself, and then closing says it all
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def keep_urgent_bytes(sock: socket.socket) -> None:
    """Have TCP's urgent bytes read in their place: else the kernel keeps each aside, and nobody asks for it.

    What a listening socket accepts inherits it. Raises OSError.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


def close_cleanly(sock: socket.socket) -> None:
    """Close a connection whose both directions are over: the kernel delivers what it still has, and FIN."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
    sock.close()


def close_well(sock: socket.socket) -> None:
    """Close a connection whose both directions are over, so that the peer still gets all it was sent.

    A TCP socket closed with unread bytes sends RST and forgets what it had not delivered; so they are
    read first, within bounds: bytes that come later meet a closed socket, as with any server.
    """
    read_out(sock)
    close_cleanly(sock)


def read_out(sock: socket.socket) -> None:
    """Read what has come, for nobody, within bounds.

    A peer that still sends may not get what it was sent, as long as our receive buffer is full: Linux drops
    acknowledgements with what has no room there.
    """
    with contextlib.suppress(OSError):  # nothing there to read, or nobody left to be hurt
        sock.setblocking(False)
        for _ in range(_READ_OUT_BYTES // BUFFER_BYTES):
            if not sock.recv(BUFFER_BYTES):
                break


def undelivered_bytes(sock: socket.socket) -> int:
    """What a TCP peer has not yet acknowledged of what it was sent; 0 when it is gone."""
    gone = select.poll()
    gone.register(sock, 0)
    return 0 if gone.poll(0) else unsent_bytes(sock)


def unsent_bytes(sock: socket.socket) -> int:
    """What the kernel still holds for the peer, gone or not; 0 where that cannot be known."""
    with contextlib.suppress(OSError):
        return int(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0])
    return 0


def half_close(sock: socket.socket) -> None:
    """Send an end of file; the other direction goes on."""
    with contextlib.suppress(OSError):  # the peer is gone altogether: whoever reads from it will say so
        sock.shutdown(socket.SHUT_WR)
