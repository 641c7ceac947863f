# SPDX-License-Identifier: GPL-2.0-or-later
"""A stream of a mux call joined with a local socket: bytes both ways, and every ending as it is.

FIN becomes EOF and EOF becomes FIN, in each direction by itself. RST becomes RESET and RESET becomes RST,
after everything that arrived before it. Anything that goes wrong is an abort: only an explicit end is clean.
"""

import errno
import socket
import time
from collections.abc import Callable, Sequence
from select import EPOLLERR
from socket import AF_UNIX

from qubes_fwd_qrexec.mux import FRAME_COST_BYTES, MAX_DATA_BYTES, Buffer, ResetCode

from .backlog import TURN_BYTES
from .budget import FLOOR_BYTES
from .copy import abort, abort_by_default, close_cleanly, half_close, unsent_bytes
from .leg_end import LegEnd
from .legowner import LegOwner
from .looks import BYTES, FLOORS, LENT
from .loop import GONE, READ, WRITE
from .pending import Pending
from .socketbuffers import SocketBuffer
from .watchedsocket import UNWATCHED, WatchedSocket
from .window import Window

# docs/behaviours.md, 12: what arrived before an abort is delivered before the RST, within a second.
_LAST_WORDS_S = 0.8
# The kernel has no event for it, so it is polled: first after this time, then after twice as long each time.
_LAST_WORDS_LOOK_S = 0.005
# docs/behaviours.md, 13: how long the last bytes of a peer that is gone may wait until they are taken.
_STALLED_GONE_S = 10.0
# How long the last bytes of a stream that is over may wait for the local peer once its call is over, too: as
# long as connections may finish when a listener stops.
_LAST_BYTES_S = 60.0
# Reading or writing also shows that the peer is gone.
_READABLE = READ | GONE
_WRITABLE = WRITE | GONE


class Leg(WatchedSocket):
    """Owns ``sock`` (non-blocking) and closes it in the end; no byte is taken from it before `join`.

    ``sent`` and ``received`` count the bytes into the mux call and out of it; ``moved_at`` is when some last
    moved, or one side has ended (`time.monotonic`). ``has_eof``: the other end sends nothing more. ``ended``
    is None while the leg lives; ``on_end`` is called with the leg when it has closed its socket. ``is_bulk``:
    it has had its turn, and has more to send. ``seen``: see `looks`. It belongs to the loop's thread.
    """

    __slots__ = (
        "_broken_by",
        "_inlet",
        "_is_closed",
        "_outlet",
        "_owner",
        "_sent_eof",
        "ended",
        "has_eof",
        "is_bulk",
        "is_joined",
        "moved_at",
        "on_end",
        "pending",
        "received",
        "seen",
        "sent",
        "stream_id",
        "window",
    )

    def __init__(self, owner: LegOwner, stream_id: int, window: int, sock: socket.socket) -> None:
        super().__init__(owner.loop, sock)
        self._owner = owner
        self.pending: Pending | None = None
        self._sent_eof = False
        self._broken_by = 0
        self._is_closed = False
        self.has_eof = self.is_bulk = self.is_joined = False
        self.stream_id = stream_id
        self.ended: LegEnd | None = None
        self.on_end: Callable[[Leg], None] | None = None
        self.sent = self.received = 0
        self.seen = BYTES
        self.moved_at = time.monotonic()
        self.window = Window(owner.share, window, self.moved_at)
        self._inlet = SocketBuffer(owner.share.sockets, sock, socket.SO_RCVBUF)
        self._outlet = SocketBuffer(owner.share.sockets, sock, socket.SO_SNDBUF)
        abort_by_default(sock)

    @property
    def is_half_closed(self) -> bool:
        """Whether one direction has ended, so that only the other one, or the last bytes, are awaited."""
        return self.has_eof or self._sent_eof

    @property
    def has_ended(self) -> bool:
        """Whether both directions have ended, so that only the last bytes wait for the local peer."""
        return self.has_eof and self._sent_eof

    @property
    def is_broken(self) -> bool:
        """Whether a write has failed: the local peer takes nothing more."""
        return self._broken_by != 0

    def wait(self, first: int) -> None:
        """The stream was asked for, with so many bytes that the socket still has.

        Nothing is taken from it before the stream is accepted, but an abort is noticed.
        """
        self.sent = first
        self._watch(0)

    def join(self) -> None:
        """The stream is accepted and the socket connected: let bytes flow."""
        self.is_joined = True
        left = self.sent
        try:
            while left and (count := self.sock.recv_into(self._owner.payload_buffer, left)):
                left -= count  # the other end has these first bytes
        except OSError:
            self.abort_from_here()
        else:
            self._watch(READ)

    def leave(self) -> None:
        """The stream was refused: it ends here, and the socket stays open, with all that the client sent."""
        self.sent = 0
        self.ended = LegEnd.REMOTE_RESET
        self._let_go()

    # From the socket into the mux call

    def on_ready(self, events: int) -> None:
        mask = self._mask
        if mask & WRITE and events & _WRITABLE:
            self._push()
        if mask & READ and events & _READABLE and not self._is_closed:
            (self._pull if self.ended is None else self._discard)()
        elif events & GONE and not mask & READ and self._mask != UNWATCHED:
            self._gone(events)

    def _pull(self) -> None:
        """Read what one turn may send, and send it on."""
        if (self.is_bulk or self._loop.served == 1) and (limit := self._owner.backlog.room_now(self)):
            self._pull_now(limit)
            return
        stop_at = self.sent + TURN_BYTES
        while self.sent < stop_at:
            limit = self._owner.backlog.room(self)
            if not limit:
                self._wait_for_room()
                return
            try:
                data = self.sock.recv(limit)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self.abort_from_here()
                return
            self.moved_at = time.monotonic()
            if not data:
                self._end_of_file()
                return
            self._count_sent(len(data))
            self._owner.send_data(self.stream_id, data)
            self.is_bulk = len(data) == limit
            if not self.is_bulk:
                return

    def _pull_now(self, limit: int) -> None:
        """The fast path, for a lone small payload and for bulk: one read and one write, without a copy."""
        owner = self._owner
        try:
            if limit <= MAX_DATA_BYTES:
                count = self.sock.recv_into(owner.payload_buffer, limit)
            else:
                count = self.sock.recvmsg_into(owner.payload_buffers(limit))[0]
        except (BlockingIOError, InterruptedError):
            self.is_bulk = False
            self._watch_too(READ)
            return
        except OSError:
            self.abort_from_here()
            return
        self.moved_at = time.monotonic()
        if not count:
            self._end_of_file()
            return
        self._count_sent(count)
        owner.send_now(self.stream_id, count)
        if count < limit and count < MAX_DATA_BYTES:
            self.is_bulk = False
            self._watch_too(READ)
        elif self.is_bulk and not owner.backlog.room(self):
            self._wait_for_room()
        else:
            self.is_bulk = True
            self._watch_too(READ)

    def _wait_for_room(self) -> None:
        self._watch(self._mask & ~READ)
        self.seen = BYTES

    def _count_sent(self, count: int) -> None:
        self.sent += count
        if self.sent >= self._inlet.grow_at:
            self._inlet.grow(self.sent)

    def _end_of_file(self) -> None:
        """The local peer sent FIN, or this is the end of what it sent before its abort."""
        if not self._broken_by or (self._broken_by == errno.EPIPE and not self.has_eof):
            self._sent_eof = True
            self._owner.send_eof(self.stream_id)
        if self._broken_by:
            self.abort_from_here()
        else:
            self._watch(self._mask & ~READ)
            self._close_if_done()

    def resume(self) -> None:
        """There is credit again, or it is this stream's turn."""
        if self._sent_eof or self.ended is not None:
            return
        if self.is_bulk:
            self._watch_too(0)  # if its peer is gone, `_gone` has unwatched it, and does so again
            if self.is_watched and (limit := self._owner.backlog.room_now(self)):
                self._pull_now(limit)  # there is more, so the kernel is not asked first
                return
        self._watch_too(READ)

    def _gone(self, events: int) -> None:
        """The local peer is gone in both directions while we are not reading.

        After its FIN that is an abort, but not of a server on a UNIX socket, which has only closed: the next
        byte for it shows that (docs/facts.md, L26). Before it, there may be bytes left that wait for credit:
        the socket is not watched until there is some, but an abort does not wait for ever.
        """
        if self._sent_eof and self.ended is None and not events & EPOLLERR and self.sock.family == AF_UNIX:
            self._watch(UNWATCHED)
            return
        if self._sent_eof or not self.is_joined or self.ended is not None:
            self.abort_from_here()
            return
        self._watch(UNWATCHED)
        if events & EPOLLERR or self._broken_by:
            self._after(_STALLED_GONE_S, self._abort_if_stalled)

    def _abort_if_stalled(self) -> None:
        if self._mask == UNWATCHED:
            self.abort_from_here()

    # From the mux call into the socket

    def deliver(self, payloads: Sequence[Buffer]) -> None:
        """Data of the other end, which came in so many frames.

        What the socket takes is written at once; the rest is copied and kept until it does.
        """
        is_one = len(payloads) == 1
        length = len(payloads[0]) if is_one else sum(map(len, payloads))
        cost = length + len(payloads) * FRAME_COST_BYTES
        self.received += length
        if self._broken_by:
            return
        if self.pending is not None:
            self.pending.add(b"".join(payloads), cost)
            return
        try:
            sent = self.sock.send(payloads[0]) if is_one else self.sock.sendmsg(payloads)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self.broken(error)
            return
        self.moved_at = time.monotonic()
        if sent == length:
            self._taken(cost)
            return
        self.pending = Pending(b"".join(payloads)[sent:], cost)
        self._watch_too(WRITE)

    def receive_eof(self) -> None:
        """The other end sent EOF: FIN goes out behind everything that still waits."""
        self.has_eof = True
        self.moved_at = time.monotonic()
        if self.pending is None:
            self._pass_eof_on()

    def _pass_eof_on(self) -> None:
        half_close(self.sock)
        self.window.end()
        self._close_if_done()

    def _push(self) -> None:
        pending = self.pending
        try:
            while pending:
                cost = pending.send(self.sock)
                self.moved_at = time.monotonic()
                if not cost:
                    return
                self._taken(cost)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.broken(error)
            return
        self.pending = None
        self._watch(self._mask & ~WRITE)
        if self.has_eof:
            self._pass_eof_on()

    def broken(self, error: OSError) -> None:
        """The local peer takes nothing more. What it sent before is still passed on, then RESET.

        The kernel reports an abort only once, and what is read after that seems to end with FIN. That is true
        only if a FIN came before the RST, and then the error is EPIPE.
        """
        self.pending = None
        if self._sent_eof or self.ended is not None:
            self.abort_from_here()
            return
        self._broken_by = error.errno or errno.ECONNRESET
        self._watch(READ)

    def _taken(self, cost: int) -> None:
        """The local peer has taken data that cost so much credit, which may be granted again.

        Nothing is granted to a stream that has ended: then the budget gets it back with the window.
        """
        window = self.window
        window.owed += cost
        if window.is_owed_much and self.ended is None and not self.has_eof:
            credit = window.grant(self._owner.connection.granted(self.stream_id), self.moved_at)
            if credit:
                self._owner.grant(self.stream_id, credit)
            if self.received >= self._outlet.grow_at:
                self._outlet.grow(self.received)

    def look(self) -> None:
        """Give back what this stream has and does not use, and note what it has; see `looks`."""
        window, inlet, outlet = self.window, self._inlet, self._outlet
        if window.is_missed(self.received) and self.is_joined and self.ended is None:
            self._owner.connection.recall(self.stream_id, FLOOR_BYTES)
        inlet.look(self.sent)
        outlet.look(self.received)
        if inlet.is_too_much or outlet.is_too_much:
            self.abort_from_here()
        elif outlet.held or not (self._mask & READ or self._sent_eof):
            self.seen = BYTES
        elif window.size > FLOOR_BYTES or inlet.is_lent or outlet.is_lent:
            self.seen = LENT
        else:
            self.seen = FLOORS

    def take_back(self, amount: int) -> None:
        """The other end has given back credit that it does not use."""
        self.window.give_back(amount)

    # Endings

    def abort_from_here(self, code: ResetCode = ResetCode.ABORTED, how: LegEnd = LegEnd.LOCAL_RESET) -> None:
        """Abort both ways: RESET to the other end, RST to the local peer."""
        if self._is_closed:
            return
        was_alive = self.ended is None
        self.ended = self.ended or how
        try:
            if was_alive:
                self._owner.reset(self.stream_id, code)
        finally:
            self._close(is_clean=False)

    def fail(self) -> None:
        """A bug ends it, whatever state it is in."""
        self.abort_from_here(ResetCode.INTERNAL, LegEnd.BUG)

    def abort_from_there(self) -> None:
        """The other end aborted: deliver what had arrived, for a limited time, and then abort with RST."""
        if self.ended is not None:
            return
        self.ended = LegEnd.REMOTE_RESET
        if not self.is_joined or self._broken_by:
            self._close(is_clean=False)
            return
        self._watch(READ | WRITE if self.pending else READ)
        self._last_words(_LAST_WORDS_LOOK_S, time.monotonic() + _LAST_WORDS_S)

    def outlive_call(self) -> None:
        """The call is over, and this stream `has_ended` before it: the local peer still gets the rest."""
        self._after(_LAST_BYTES_S, self.abort_from_here)

    def _last_words(self, look_s: float, deadline: float) -> None:
        """An RST makes the kernel drop what is not acknowledged, so wait for that."""
        left_s = deadline - time.monotonic()
        if left_s <= 0 or (self.pending is None and unsent_bytes(self.sock) == 0):
            self._close(is_clean=False)
        else:
            self._after(min(look_s, left_s), lambda: self._last_words(2 * look_s, deadline))

    def _discard(self) -> None:
        """Read and drop what the local peer still sends; see `copy.read_out`."""
        try:
            if not self.sock.recv_into(self._owner.payload_buffer):
                self._watch(self._mask & ~READ)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.abort_from_here()

    def _close_if_done(self) -> None:
        if self.has_ended and self.pending is None and self.ended is None:
            self.ended = LegEnd.DONE
            self._close(is_clean=True)

    def _close(self, *, is_clean: bool) -> None:
        try:
            self._let_go()
        finally:
            if is_clean:
                close_cleanly(self.sock)
            else:
                abort(self.sock)
            if self.on_end is not None and self.ended is not None:
                self.on_end(self)

    def _let_go(self) -> None:
        """Give back everything but the socket; nothing calls this leg any more."""
        self._is_closed = True
        self.pending = None
        self._cancel_timer()
        self.window.leave()
        self._inlet.leave()
        self._outlet.leave()
        self._owner.forget(self.stream_id)
        self._watch(UNWATCHED)

    def _on_unwatchable(self) -> None:
        """Only this stream ends."""
        self.abort_from_here()
