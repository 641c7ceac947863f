# SPDX-License-Identifier: GPL-2.0-or-later
"""What streams and flows have in common at one end of a mux call: HELLO, PING, GOAWAY and the end.

`Connection` (streams) and `FlowConnection` (datagrams) derive from it, and say what the other frames do.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Generic, TypeVar

from qubes_fwd_qrexec.common.errors import LocalProtocolError, RemoteProtocolError

from . import wire
from .events import GoawayReceived, HelloReceived, PongReceived
from .limits import CONTROL_BYTES, LAST_STREAM_ID
from .messages import PING_BYTES, Goaway, GoawayCode, Hello, Role
from .outbox import Outbox
from .reader import FrameReader
from .wire import Buffer, FrameType

_AnyEvent = TypeVar("_AnyEvent")


class Endpoint(ABC, Generic[_AnyEvent]):
    """One end of a mux call. A slot is what a stream or a flow holds.

    Raises LocalProtocolError if ``hello`` is of the other kind of call.
    """

    CONTROL_BYTES_PER_SLOT: ClassVar[int]
    """How many bytes of control frames may be queued for each slot."""
    MAGIC: ClassVar[bytes]
    """How the HELLO of this kind of call begins."""
    SLOT: ClassVar[str]
    """What holds a slot, in messages: stream or flow."""
    LAST_ID: ClassVar[int] = LAST_STREAM_ID
    """The last id that a slot may have."""

    def __init__(self, hello: Hello, target_ports: range, reader: FrameReader) -> None:
        if hello.is_of_datagrams != (self.MAGIC == wire.MAGIC_OF_DATAGRAMS):
            raise LocalProtocolError("a HELLO of the other kind of call")
        self.role = hello.role
        self.hello = hello
        self.peer: Hello | None = None
        """The peer's HELLO; None before it has arrived."""
        self.version = 0
        """The version in use; 0 before the peer's HELLO."""
        self._max_slots = hello.max_streams
        self.control_bound_bytes = self._control_bound()
        self._target_ports = target_ports
        self._last_id = 0
        self._last_accepted = 0
        self._reader = reader
        self._outbox = Outbox()
        self._ping: bytes | None = None
        self._is_pong_queued = False
        self._drain_sent: Goaway | None = None
        self._drain_received: Goaway | None = None
        self._is_closed = False
        self._is_closed_by_peer = False
        self._is_receiving = False
        self._failure: str | None = None
        self._outbox.add_control(wire.encode_hello(hello))

    # What each kind of call says

    @property
    @abstractmethod
    def slots_taken(self) -> int:
        """How many slots are not free."""

    @abstractmethod
    def _read(self, untrusted_chunk: Buffer) -> Iterator[_AnyEvent | None]:
        """The events of a chunk, one for each frame. Raises RemoteProtocolError."""

    @abstractmethod
    def _forget_all(self) -> None:
        """The mux is over: free all slots."""

    # Questions of the caller

    @property
    def is_ready(self) -> bool:
        """Whether both HELLOs were exchanged and neither end has sent its final GOAWAY."""
        return self.peer is not None and not self.is_over

    @property
    def is_over(self) -> bool:
        """Whether either end sent a final GOAWAY, or the peer broke the protocol. No slot is taken then."""
        return self._is_closed or self._is_closed_by_peer

    @property
    def is_draining(self) -> bool:
        """Whether either end takes or opens no more streams or flows."""
        return self._drain_sent is not None or self._drain_received is not None

    @property
    def is_drained(self) -> bool:
        """Whether it drains and no stream or flow is left: time to `close`."""
        return self.is_draining and not self.slots_taken

    @property
    def open_room(self) -> int:
        """How many streams or flows this end may open now; always 0 on the target side."""
        if self.role is Role.TARGET or not self.is_ready or self.is_draining:
            return 0
        return min(self._max_slots - self.slots_taken, self.LAST_ID - self._last_id)

    @property
    def are_ids_used_up(self) -> bool:
        """Whether nothing can be opened here any more: drain, and make another mux call."""
        return self._last_id >= self.LAST_ID

    @property
    def has_partial_frame(self) -> bool:
        """Whether a frame has begun and not ended; the caller bounds how long that may last."""
        return self._reader.has_partial_frame

    @property
    def bytes_queued(self) -> int:
        """How many bytes `data_to_send` would return."""
        return self._outbox.bytes_queued

    # What the caller does

    def data_to_send(self) -> list[Buffer]:
        """Return everything that waits to be written, in order; it counts as written from now on.

        Payloads above COPY_BYTES are not copied: they are the objects that were given to be sent.
        """
        self._is_pong_queued = False
        return self._outbox.take()

    def ping(self, payload: bytes) -> None:
        """Ask for a PONG with the same 8 bytes. Raises LocalProtocolError until the last one is answered.

        None of our programs does: either end may (SPEC.md, 6), so that its answer must be checked.
        """
        if not self.is_ready or self._ping is not None or len(payload) != PING_BYTES:
            raise LocalProtocolError("one PING of 8 bytes at a time, once the mux is ready")
        self._ping = payload
        self._outbox.add_control(wire.encode_ping(payload))

    @abstractmethod
    def tick(self) -> None:
        """A second has passed: start counting rates anew, and queue what was held back."""

    def drain(self, code: GoawayCode) -> None:
        """Take (or open) no more streams or flows, and let the live ones go on. Only the first call counts.

        Raises LocalProtocolError for a code that may not begin a drain; see `REFUSAL_WHILE_DRAINING`.
        """
        if self._drain_sent is None and not self.is_over:
            self._drain_sent = Goaway(self._last_id, code, is_final=False)
            self._outbox.add_control(wire.encode_goaway(self._drain_sent))

    def close(self, code: GoawayCode = GoawayCode.DONE) -> None:
        """Queue the final GOAWAY, which ends every stream or flow that is left. Only the first call counts.

        Then write what `data_to_send` returns, and close the byte stream. What still arrives is dropped.
        """
        self._say_goodbye(code)

    # What the peer sends

    def receive_data(self, untrusted_chunk: Buffer) -> Iterator[_AnyEvent | None]:
        """Return the events of a chunk, each made as it is taken, so that what the caller does for one counts
        for the next. Take them all before the next call, and do not change the chunk until then.

        There is one for each frame, so that the caller can bound how many it takes at a time; None stands for
        a frame of which there is nothing to tell.

        Raises RemoteProtocolError, also between events, if the peer broke the protocol, and
        LocalProtocolError if the last chunk's events were not all taken.
        """
        if self._failure is not None:
            raise RemoteProtocolError(self._failure)
        if self._is_receiving:
            raise LocalProtocolError("the events of the last chunk were not all taken")
        if self._is_closed:
            return iter(())
        self._is_receiving = True
        return self._events(untrusted_chunk)

    def receive_eof(self) -> None:
        """The byte stream has ended. Raises RemoteProtocolError unless either end had sent its final GOAWAY:
        then it is an abort."""
        if not self._is_closed and (not self._is_closed_by_peer or self.has_partial_frame):
            problem = "the byte stream ended without a final GOAWAY"
            self._fail(problem, GoawayCode.PROTOCOL_ERROR)
            raise RemoteProtocolError(problem)

    def _events(self, untrusted_chunk: Buffer) -> Iterator[_AnyEvent | None]:
        try:
            yield from self._read(untrusted_chunk)
        except RemoteProtocolError as error:
            # After our own final GOAWAY it no longer matters what was on its way.
            if not self._is_closed or self._failure is not None:
                self._fail(str(error), GoawayCode.PROTOCOL_ERROR)
                raise
        self._is_receiving = False

    def _check_order(self, frame_type: FrameType) -> None:
        """HELLO comes first, and nothing after the final GOAWAY."""
        if self._is_closed_by_peer:
            raise RemoteProtocolError(f"{frame_type.name} after the final GOAWAY")
        if self.peer is None and frame_type is not FrameType.HELLO:
            raise RemoteProtocolError(f"{frame_type.name} before HELLO")

    def _on_hello(self, untrusted_payload: Buffer) -> HelloReceived:
        if self.peer is not None:
            raise RemoteProtocolError("a second HELLO")
        lowest, highest = wire.decode_versions(untrusted_payload, self.MAGIC)
        own = self.hello
        version = min(own.max_version, highest)
        if version < max(own.min_version, lowest):
            problem = (
                f"the peer speaks versions {lowest} to {highest} of the mux protocol, "
                f"this end {own.min_version} to {own.max_version}"
            )
            self._fail(problem, GoawayCode.NO_COMMON_VERSION)
            raise RemoteProtocolError(problem)
        peer = wire.decode_hello(untrusted_payload, self.MAGIC)
        if peer.role is self.role:
            raise RemoteProtocolError(f"both ends say that they are the {peer.role.value} side")
        self.peer = peer
        self.version = version
        self._max_slots = max(self._max_slots, peer.max_streams)
        self.control_bound_bytes = self._control_bound()
        return HelloReceived(peer)

    def _on_ping(self, payload: bytes) -> None:
        # The peer may not ping again before it has our answer, which is still queued here.
        if self._is_pong_queued:
            raise RemoteProtocolError("a PING before the PONG to the last one was sent")
        self._is_pong_queued = True
        self._outbox.add_control(wire.encode_pong(payload))

    def _on_pong(self, payload: bytes) -> PongReceived:
        if payload != self._ping:
            raise RemoteProtocolError("a PONG that answers no PING")
        self._ping = None
        return PongReceived(payload)

    def _on_goaway(self, untrusted_payload: Buffer) -> GoawayReceived:
        goaway = wire.decode_goaway(untrusted_payload)
        earlier = self._drain_received
        if earlier is not None and not goaway.is_final:
            raise RemoteProtocolError("a second GOAWAY that is not final")
        if earlier is not None:
            is_possible = goaway.last_id == earlier.last_id
        elif self.role is Role.TARGET:
            is_possible = goaway.last_id == self._last_id
        else:
            # It had processed what it accepted, which may not be asked for again elsewhere.
            is_possible = self._last_accepted <= goaway.last_id <= self._last_id
        if not is_possible:
            raise RemoteProtocolError(
                f"GOAWAY with the last {self.SLOT} {goaway.last_id}, which is impossible"
            )
        self._drain_received = goaway
        if goaway.is_final:
            self._is_closed_by_peer = True
            self._forget_all()
        return GoawayReceived(goaway)

    # Shared by both directions

    def _check_request(self, name: str, untrusted_id: int, untrusted_port: int) -> None:
        """The peer asks for a stream or flow. Raises RemoteProtocolError if it may not."""
        if self.role is not Role.TARGET:
            raise RemoteProtocolError(f"{name} from the target side")
        if self._drain_received is not None:
            raise RemoteProtocolError(f"{name} after the listener side said GOAWAY")
        if untrusted_id != self._last_id + 1:
            raise RemoteProtocolError(
                f"{name} of {self.SLOT} {untrusted_id} after {self.SLOT} {self._last_id}"
            )
        if untrusted_port not in self._target_ports:
            raise RemoteProtocolError(f"{name} to port {untrusted_port}, which is none of this call's ports")
        if self.slots_taken >= self._max_slots:
            raise RemoteProtocolError(f"{name} past the limit of {self._max_slots} {self.SLOT}s")

    def _control_bound(self) -> int:
        return CONTROL_BYTES + self.CONTROL_BYTES_PER_SLOT * self._max_slots

    def _fail(self, problem: str, code: GoawayCode) -> None:
        """End the mux; the first reason counts."""
        if self._failure is None:
            self._failure = problem
            self._say_goodbye(code)

    def _say_goodbye(self, code: GoawayCode) -> None:
        """Queue the final GOAWAY, if it was not queued before, and free all slots."""
        if not self._is_closed:
            self._is_closed = True
            last_id = self._last_id if self._drain_sent is None else self._drain_sent.last_id
            self._outbox.add_control(wire.encode_goaway(Goaway(last_id, code, is_final=True)))
        self._forget_all()
