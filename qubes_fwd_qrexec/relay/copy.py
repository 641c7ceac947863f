# SPDX-License-Identifier: GPL-2.0-or-later
"""Copying bytes from one socket to another until they end, and how they ended.

The two sockets are in the same qube: accepted client and qrexec call in the exposed qube, qrexec call and
server in the target. A `Copy` is one direction. It never passes an ending on: its owner gets a `CopyEnd` and
decides, because only the owner knows whether an end of file on this side is a clean one.

It works in a plain `Loop` without trio; `thread` makes it usable from trio.
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

# The default buffer of qrexec-client-vm (qubes-core-qrexec agent/qrexec-client-vm.c): the most that a stalled
# direction holds, beside the kernel's own socket buffers.
BUFFER_BYTES = 65536
# How often to try whether a sink still takes anything. When the peer of a UNIX socket will not read on
# (SHUT_RD, as the qrexec agent does when a call is lost), no event says so: only a send fails.
LOOK_S = 2.0
# How much is read and dropped so that a close is no abort: more than a receive buffer of the default size.
_READ_OUT_BYTES = 16 * BUFFER_BYTES


class CopyEnd(Enum):
    """How a copy ended."""

    EOF = auto()
    """The source ended cleanly, and the sink has taken every byte."""
    SOURCE_RESET = auto()
    """The source was aborted; the sink has taken what arrived before."""
    SINK_BROKEN = auto()
    """The sink takes no more; what it had not taken is lost."""
    BUG = auto()
    """A bug of ours ended it; what it had not passed on is lost."""


class Copy:
    """One direction: non-blocking ``source`` to non-blocking ``sink``.

    ``looks``: whether to check the sink even while there is nothing to send, for owners without a timer of
    their own. A sink that holds up bytes is always checked. ``may_close``: the sink is a server. One on a
    UNIX socket that has closed says at once what TCP says only after both FINs (docs/facts.md, L26), and that
    is no fault before there is something to send to it.

    ``moved`` counts the bytes that the sink has taken, ``moved_at`` is when it last took some
    (`time.monotonic`, seconds). Both may be read from any thread.
    """

    __slots__ = ("looks", "may_close", "moved", "moved_at", "on_end", "pending", "sink", "source")

    def __init__(
        self, source: socket.socket, sink: socket.socket, *, looks: bool = False, may_close: bool = False
    ) -> None:
        self.looks = looks
        self.may_close = may_close and sink.family == socket.AF_UNIX
        self.source = source
        self.sink = sink
        self.moved = 0
        self.moved_at = time.monotonic()
        self.pending = b""
        self.on_end: Callable[[CopyEnd], None] | None = None


class _Endpoint:
    """A socket in the loop, with the copy that reads it and the one that writes it.

    ``was_reset`` remembers an abort, which the kernel reports only once: a read after a failed write would
    look like a clean end.
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
    """Any number of copies in a loop. Call it from the loop's thread alone.

    It owns no socket. A socket must outlive its copies: stop those before you close it.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._endpoints: dict[int, _Endpoint] = {}
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._is_looking = False

    def start(self, copy: Copy, on_end: Callable[[CopyEnd], None]) -> None:
        """Begin to copy. ``on_end`` is called once, from the loop, and may start or stop other copies.

        Raises ValueError if another copy already reads the source or writes the sink, and OSError if the
        kernel can watch no more sockets; the copy has not begun then.
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
        """Let go of the copy's sockets; what it had not passed on is lost, and ``on_end`` is not called."""
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
        """Watch for the events that the copies of this endpoint need."""
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
        if writer is not None and writer.pending and events & (WRITE | GONE):  # a write shows that it is gone
            self._push(writer, endpoint)
        if events & GONE and not can_read:
            self._gone(endpoint, events)

    def _gone(self, endpoint: _Endpoint, events: int) -> None:
        """The peer is gone in both directions, and no copy is reading, which would find out why.

        A sink is broken then: TCP reports HUP only after an abort or after both FINs, and a socket whose FIN
        we sent has no writer any more. A reader that waits for its own sink reads the rest later; until then
        the socket is not watched, as the kernel would report this in every turn.
        """
        writer = endpoint.writer
        if writer is not None and not (writer.may_close and not events & select.EPOLLERR):
            self._end(writer, CopyEnd.SINK_BROKEN)
        if (endpoint.reader or endpoint.writer) is not None and endpoint.mask == 0:
            self._loop.unwatch(endpoint.fd)
            endpoint.mask = -1

    def _pull(self, copy: Copy, source: _Endpoint) -> None:
        """Read once and write at once: most bytes never wait here."""
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
        """Try each sink that holds something up, and each whose copy ``looks``."""
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
        """How many bytes the sink took; -1 if that ended the copy."""
        try:
            sent = copy.sink.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            # EPIPE means that a FIN came before the RST: what is left to read does end cleanly (tcp_reset).
            self._endpoint(copy.sink).was_reset = error.errno != errno.EPIPE
            self._end(copy, CopyEnd.SINK_BROKEN)
            return -1
        if sent:
            copy.moved += sent
            copy.moved_at = time.monotonic()
        return sent

    def _fail(self, endpoint: _Endpoint) -> None:
        """A bug in a copy of this socket ends both."""
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
    """Close so that the peer sees an abort: RST on TCP, never a clean end."""
    abort_by_default(sock)
    sock.close()


def abort_by_default(sock: socket.socket) -> None:
    """Make every close an abort, even the kernel's when this process dies; `close_cleanly` undoes it."""
    with contextlib.suppress(OSError):  # it may have ended by itself, and then closing is enough
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def keep_urgent_bytes(sock: socket.socket) -> None:
    """Read TCP's urgent bytes in their place: otherwise the kernel sets them aside, and they are lost.

    Accepted sockets inherit it from the listening one. Raises OSError.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)


def close_cleanly(sock: socket.socket) -> None:
    """Close a connection that has ended both ways: the kernel delivers what it still has, then FIN."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
    sock.close()


def close_well(sock: socket.socket) -> None:
    """Close a connection that has ended both ways, so that the peer still gets everything.

    A TCP socket that is closed with unread bytes sends RST and drops what it had not delivered. So they are
    read first, within bounds: later bytes meet a closed socket, as with any server.
    """
    read_out(sock)
    close_cleanly(sock)


def read_out(sock: socket.socket) -> None:
    """Read and drop what has arrived, within bounds.

    While our receive buffer is full, a peer that still sends may not get what we sent: Linux drops
    acknowledgements together with data that has no room.
    """
    with contextlib.suppress(OSError):  # nothing to read, or the peer is gone
        sock.setblocking(False)
        for _ in range(_READ_OUT_BYTES // BUFFER_BYTES):
            if not sock.recv(BUFFER_BYTES):
                break


def undelivered_bytes(sock: socket.socket) -> int:
    """How many bytes a TCP peer has not acknowledged yet; 0 if it is gone."""
    gone = select.poll()
    gone.register(sock, 0)
    return 0 if gone.poll(0) else unsent_bytes(sock)


def unsent_bytes(sock: socket.socket) -> int:
    """How many bytes the kernel still holds for the peer, gone or not; 0 if that cannot be known."""
    with contextlib.suppress(OSError):
        return int(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0])
    return 0


def half_close(sock: socket.socket) -> None:
    """Send FIN; the other direction goes on."""
    with contextlib.suppress(OSError):  # the peer is gone altogether, which reading will show
        sock.shutdown(socket.SHUT_WR)
