# SPDX-License-Identifier: GPL-2.0-or-later
"""One end of a mux: bytes in, events out; calls in, bytes out. SPEC.md describes the protocol.

It does no I/O and has no clock: the caller moves the bytes, calls `tick` every second, and `drain` when the
lease is over. It buffers no stream data: it hands on what arrives at once, and the peer may send only what
the caller has granted. Any violation by the peer ends the mux.

The caller must take all events of one `receive_data` before the next call, answer each ResetReceived with
`reset_stream`, give back each consumed byte with `grant`, and queue no more while `bytes_queued` is high.
After RemoteProtocolError it should write what `data_to_send` still has (it tells the peer why), close the
byte stream, and abort every stream of the mux.
"""

from qubes_fwd_qrexec.common.errors import LocalProtocolError

from . import wire
from .credit import first_cost
from .incoming import Incoming
from .limits import FRAME_COST_BYTES, HEADER_BYTES, MAX_DATA_BYTES, MIN_WINDOW_BYTES
from .messages import Origin, ProxyVersion, ResetCode, Role
from .states import Half
from .stream import Stream
from .wire import DATA_KIND, HEADER, Buffer, FrameType

# Looked up once: members of an enumeration are slower to look up than other names.
_FLOWING = Half.FLOWING


class Connection(Incoming):
    """One end of a mux. ``hello`` says which end it is, and what it offers; see `Hello`.

    ``target_ports``: the ports of the call's argument; no stream may name another one. HELLO is queued at
    once, so `data_to_send` has something from the start.
    """

    def open_stream(
        self,
        port: int,
        origin: Origin,
        credit: int,
        proxy: ProxyVersion = ProxyVersion.OFF,
        first: bytes = b"",
    ) -> int:
        """Ask for a stream to ``port``, granting ``credit`` bytes to the target side; returns its id.

        ``proxy``: the version of the PROXY header, made of ``origin``, that the server gets first. ``first``:
        what the stream begins with, at most `first_max` bytes; whoever asks again elsewhere needs them again.
        Raises LocalProtocolError on the target side, without `open_room`, or for a port, credit or first
        bytes out of bounds.
        """
        if self.open_room <= 0:
            raise LocalProtocolError("there is no room for another stream, or this is the target side")
        if port not in self._target_ports:
            raise LocalProtocolError(f"port {port} is none of this call's ports")
        if len(first) > self.first_max:
            raise LocalProtocolError(f"{len(first)} first bytes, where {self.first_max} may be sent")
        self._check_own_credit(credit)
        self._last_id += 1
        self._streams[self._last_id] = Stream(-first_cost(first), credit, self._rapid.tick)
        self.granted_bytes += credit
        request = wire.OpenRequest(credit, port, origin, proxy, first)
        self._outbox.add_control(wire.encode_open(self._last_id, request), len(first))
        return self._last_id

    def accept_stream(self, stream_id: int, credit: int) -> None:
        """The server is connected: let data flow, granting ``credit`` bytes to the listener side, of which
        the first bytes in OPEN have used some.

        Raises LocalProtocolError if the peer did not ask for the stream, it was answered before, or the
        credit does not cover the first bytes.
        """
        stream = self._streams.get(stream_id)
        if stream is None or self.role is not Role.TARGET:
            raise LocalProtocolError(f"there is no stream {stream_id} to accept")
        self._check_own_credit(credit)
        if credit + stream.outstanding < 0:
            raise LocalProtocolError(f"{credit} bytes do not cover the first bytes of stream {stream_id}")
        stream.move_local(FrameType.ACCEPT)
        stream.remote = Half.FLOWING
        stream.outstanding += credit
        self.granted_bytes += credit
        self._outbox.add_control(wire.encode_accept(stream_id, credit))

    def send_data(self, stream_id: int, data: Buffer) -> None:
        """Queue 1 to `send_limit` bytes. ``data`` must not change until it has been written.

        Raises LocalProtocolError if it is too long, or the stream is not flowing.
        """
        stream = self._streams.get(stream_id)
        if stream is None or stream.local is not Half.FLOWING:
            raise LocalProtocolError(
                f"DATA cannot be sent on stream {stream_id}, which is {stream or 'over'}"
            )
        length = len(data)
        if not 0 < length <= MAX_DATA_BYTES or not stream.spend(length):
            raise LocalProtocolError(f"{length} bytes, where 1 to {stream.sendable_bytes} may be sent")
        self._outbox.add_data(stream_id, data, length)

    def send_limit_now(self, stream_id: int, frames: int) -> int:
        """How many bytes `send_data_now` takes in so many frames; 0 without credit, or while anything is
        queued.
        """
        stream = self._streams.get(stream_id)
        if stream is None or stream.local is not _FLOWING or self._outbox.bytes_queued:
            return 0
        full, rest = divmod(stream.available, MAX_DATA_BYTES + FRAME_COST_BYTES)
        if full >= frames:
            return frames * MAX_DATA_BYTES
        return full * MAX_DATA_BYTES + max(rest - FRAME_COST_BYTES, 0)

    def send_data_now(self, stream_id: int, length: int, buffer: memoryview) -> memoryview:
        """Make DATA frames of the next ``length`` bytes of a stream, for a caller that writes them at once:
        the fast path. Nothing is queued.

        The payloads are in ``buffer``, 32768 bytes each but the last, and in front of each is room for a
        header. Returns the part of it to be written. Raises LocalProtocolError for no bytes, or more than
        `send_limit_now`.
        """
        stream = self._streams.get(stream_id)
        cost = length + -(-length // MAX_DATA_BYTES) * FRAME_COST_BYTES
        if (
            stream is None
            or stream.local is not _FLOWING
            or self._outbox.bytes_queued
            or length <= 0
            or (left := stream.available - cost) < 0
        ):
            raise LocalProtocolError(f"{length} bytes cannot be sent at once on stream {stream_id}")
        stream.available = left
        end = 0
        while length > 0:
            payload = length if length < MAX_DATA_BYTES else MAX_DATA_BYTES
            HEADER.pack_into(buffer, end, DATA_KIND, payload, stream_id)
            end += HEADER_BYTES + payload
            length -= payload
        return buffer[:end]

    def send_eof(self, stream_id: int) -> None:
        """End this half of the stream (FIN): this end sends no more data on it.

        Raises LocalProtocolError if it has ended already, or the stream is not accepted, over or reset.
        """
        stream = self._streams.get(stream_id)
        if stream is None:
            raise LocalProtocolError(f"EOF cannot be sent on stream {stream_id}, which is over")
        stream.move_local(FrameType.EOF)
        self._outbox.add_control(wire.encode_eof(stream_id))
        self._free_if_over(stream_id, stream)

    def reset_stream(self, stream_id: int, code: ResetCode = ResetCode.ABORTED) -> None:
        """Abort a stream, refuse it, or answer the peer's RESET; does nothing if it is reset or over.

        There are no more events of this stream. The answer to a RESET may be held back until a later `tick`;
        see `abuse.RapidResets`. Raises LocalProtocolError for a stream that never existed.
        """
        stream = self._known(stream_id)
        if stream is None or stream.is_discarding:
            return
        is_answer = self.role is Role.TARGET and stream.local is Half.MUST_RESET
        if not is_answer or self._rapid.may_answer(stream_id, stream.opened_tick):
            self._reset(stream_id, stream, code)

    def grant(self, stream_id: int, credit: int) -> None:
        """Let the peer send ``credit`` bytes more; does nothing if it can send no more on the stream.

        Small grants are held back and sent together; see `Credit.grant`. A consumed event gives back its
        `cost`. Raises LocalProtocolError past our own window, before ACCEPT, or for a stream that never
        existed.
        """
        stream = self._known(stream_id)
        if stream is None or not stream.is_receiving:
            return
        stream.move_local(FrameType.CREDIT)
        if credit <= 0 or stream.granted + credit > self.hello.window_bytes:
            raise LocalProtocolError(f"{credit} bytes more do not fit the window")
        self.granted_bytes += credit
        increment = stream.grant(credit)
        if increment:
            self._outbox.add_control(wire.encode_credit(stream_id, increment))

    def recall(self, stream_id: int, keep: int) -> bool:
        """Ask the peer to give back all but ``keep`` bytes of its credit on a stream.

        If it has any to give, CreditReturned follows. Returns whether it was asked: it is not if it has no
        more than ``keep``, or has not yet answered the last RECALL and got credit since. Raises
        LocalProtocolError for a number out of bounds, or a stream that never existed or is not accepted.
        """
        if not MIN_WINDOW_BYTES <= keep <= self.hello.window_bytes:
            raise LocalProtocolError(
                f"a peer keeps {MIN_WINDOW_BYTES} to {self.hello.window_bytes} bytes, not {keep}"
            )
        stream = self._known(stream_id)
        if stream is None or not stream.is_receiving:
            return False
        stream.move_local(FrameType.RECALL)
        if not stream.recall(keep):
            return False
        self._outbox.add_control(wire.encode_recall(stream_id, keep))
        return True

    def tick(self) -> None:
        """A second has passed: start counting rates anew, and queue RESETs that were held back."""
        for stream_id in self._rapid.next_tick():
            self._reset(stream_id, self._streams[stream_id], ResetCode.ABORTED)

    def _check_own_credit(self, credit: int) -> None:
        if credit and not MIN_WINDOW_BYTES <= credit <= self.hello.window_bytes:
            raise LocalProtocolError(
                f"an initial credit is 0, or {MIN_WINDOW_BYTES} to {self.hello.window_bytes} bytes"
            )
