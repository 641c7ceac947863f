# SPDX-License-Identifier: GPL-2.0-or-later
"""One end of a datagram call: bytes in, events out; calls in, bytes out. See SPEC.md, "Datagram calls".

It does no I/O and has no clock: the caller moves the bytes, calls `tick` every second, and `drain` when the
lease is over. It keeps no datagram: what arrives is handed on as views of its chunk, and what is sent goes
out with the next `data_to_send`. There is no credit: the caller keeps what waits, within a bound of its own,
drops what does not fit, and queues here only what it can write at once. Any violation by the peer ends the
mux.

The caller must take all events of one `receive_data` before the next call. After RemoteProtocolError it
should write what `data_to_send` still has (it tells the peer why), close the byte stream, and end every flow.
"""

from collections.abc import Iterator
from typing import ClassVar, Final

from qubes_fwd_qrexec.common.errors import LocalProtocolError, RemoteProtocolError

from . import wire
from .endpoint import Endpoint
from .events import DatagramsReceived, FlowEnded, FlowEvent, FlowRequested, LostReported
from .limits import CONTROL_BYTES_PER_FLOW, FLOWS_PER_TICK, MAX_DATAGRAM_BYTES
from .messages import REFUSAL_WHILE_DRAINING, FlowCode, Hello, Origin, ProxyVersion, Role
from .reader import FrameReader
from .wire import Buffer, FrameType

_LOST_MAX: Final = (1 << 64) - 1
_DATAGRAMS: Final = FrameType.DATAGRAMS.value


class FlowConnection(Endpoint[FlowEvent]):
    """One end of a datagram call. ``hello`` says which end it is, and how many flows the target side takes
    (`max_streams`); its window is 0.

    ``target_ports``: the ports of the call's argument; no flow may name another one. HELLO is queued at
    once, so `data_to_send` has something from the start.
    """

    CONTROL_BYTES_PER_SLOT: ClassVar = CONTROL_BYTES_PER_FLOW
    MAGIC: ClassVar = wire.MAGIC_OF_DATAGRAMS
    SLOT: ClassVar = "flow"

    def __init__(self, hello: Hello, target_ports: range) -> None:
        reader = FrameReader(wire.FLOW_SHAPES, wire.DATAGRAMS_KIND)
        super().__init__(hello, target_ports, reader)
        self.late_datagrams = 0
        """How many datagrams have arrived on flows that were over, and were dropped."""
        self._flows: set[int] = set()
        # The flows that this end has ended, until END is written. Their slots are taken until then, so the
        # slots bound this, too.
        self._ending: dict[int, FlowCode] = {}
        self._flows_this_tick = 0
        # What the target side has lost: all of it, what it said last, and what the listener side heard last.
        self._lost = self._lost_said = self._lost_heard = (0, 0)
        self._is_lost_due = False

    # Questions of the caller

    @property
    def slots_taken(self) -> int:
        """How many slots are taken, by live flows and by those whose END is not written yet."""
        return len(self._flows) + len(self._ending)

    @property
    def bytes_queued(self) -> int:
        """How many bytes `data_to_send` would return."""
        due = len(self._ending) * wire.END_BYTES + self._is_lost_due * wire.LOST_BYTES
        return self._outbox.bytes_queued + due

    # What the caller does

    def data_to_send(self) -> list[Buffer]:
        """Return everything that waits to be written, in order; it counts as written from now on.

        Payloads above COPY_BYTES are not copied: they are the objects that `send_datagrams` was given.
        """
        if self._ending:
            for flow_id, code in self._ending.items():
                self._outbox.add_control(wire.encode_end(flow_id, code))
            self._ending.clear()
        if self._is_lost_due:
            self._is_lost_due = False
            self._lost_said = self._lost
            self._outbox.add_control(wire.encode_lost(*self._lost))
        return super().data_to_send()

    def open_flow(self, port: int, origin: Origin, proxy: ProxyVersion = ProxyVersion.OFF) -> int:
        """Begin a flow to ``port`` and return its id; its first datagrams should follow at once.

        ``proxy``: OFF, or V2 for a header, made of ``origin``, in front of each datagram to the server.
        Raises LocalProtocolError on the target side, without `open_room`, for V1, or for another port.
        """
        if self.open_room <= 0:
            raise LocalProtocolError("there is no room for another flow, or this is the target side")
        if port not in self._target_ports:
            raise LocalProtocolError(f"port {port} is none of this call's ports")
        if proxy is ProxyVersion.V1:
            raise LocalProtocolError("the PROXY header of version 1 is for TCP alone")
        self._last_id += 1
        self._flows.add(self._last_id)
        self._outbox.add_control(wire.encode_flow(self._last_id, wire.FlowRequest(port, origin, proxy)))
        return self._last_id

    def send_datagrams(self, flow_id: int, data: Buffer, segment: int = 0) -> bool:
        """Queue one datagram (``segment`` 0), or 2 to MAX_SEGMENTS of ``segment`` bytes each, of which the
        last may be shorter. ``data`` must not change until it has been written.

        Returns whether it was queued; it is not if the flow is over. Raises LocalProtocolError for more than
        MAX_DATAGRAM_BYTES in all, for a segment that does not fit, or a flow that never existed.
        """
        if flow_id not in self._flows:
            self._check_existed(flow_id)
            return False
        length = len(data)
        if length > MAX_DATAGRAM_BYTES or not wire.is_segment_of(segment, length):
            raise LocalProtocolError(f"{length} bytes in segments of {segment} cannot be sent")
        self._outbox.add_datagrams(flow_id, segment, data, length)
        return True

    def end_flow(self, flow_id: int, code: FlowCode) -> None:
        """End a flow, or refuse it; does nothing if it is over.

        There are no more events of it, and its slot is free once `data_to_send` has returned the END. Raises
        LocalProtocolError if it never existed.
        """
        if flow_id in self._flows:
            self._flows.remove(flow_id)
            self._ending[flow_id] = code
        else:
            self._check_existed(flow_id)

    def report_lost(self, to_server: int, to_listener: int) -> None:
        """Tell the listener side, with the next `tick`, how many datagrams this end has dropped in all.

        Raises LocalProtocolError on the listener side, and for a number that is smaller than before.
        """
        if self.role is not Role.TARGET:
            raise LocalProtocolError("only the target side reports what it dropped")
        if not self._lost[0] <= to_server <= _LOST_MAX or not self._lost[1] <= to_listener <= _LOST_MAX:
            raise LocalProtocolError(f"lost {to_server} and {to_listener} datagrams after {self._lost}")
        self._lost = to_server, to_listener

    def tick(self) -> None:
        """A second has passed: count new flows anew, and queue what `report_lost` was told last."""
        self._flows_this_tick = 0
        self._is_lost_due = self.is_ready and self._lost != self._lost_said

    # What the peer sends

    def _read(self, untrusted_chunk: Buffer) -> Iterator[FlowEvent | None]:
        flows = self._flows
        outbox = self._outbox
        decode_datagrams = wire.decode_datagrams
        for frame_type, flow_id, untrusted_payload in self._reader.frames(untrusted_chunk):
            if outbox.control_bytes > self.control_bound_bytes:
                raise RemoteProtocolError("the peer sends and does not read")
            if frame_type == _DATAGRAMS and flow_id in flows:
                segment, data = decode_datagrams(untrusted_payload)
                yield DatagramsReceived(flow_id, segment, data)
            elif self._is_closed:
                return
            else:
                yield self._on_control(FrameType(frame_type), flow_id, untrusted_payload)

    def _on_control(self, frame_type: FrameType, flow_id: int, untrusted_payload: Buffer) -> FlowEvent | None:
        """Any frame but DATAGRAMS on a live flow."""
        self._check_order(frame_type)
        match frame_type:
            case FrameType.HELLO:
                return self._on_hello(untrusted_payload)
            case FrameType.PING:
                self._on_ping(bytes(untrusted_payload))
                return None
            case FrameType.PONG:
                return self._on_pong(bytes(untrusted_payload))
            case FrameType.GOAWAY:
                return self._on_goaway(untrusted_payload)
            case FrameType.FLOW:
                return self._on_flow(flow_id, untrusted_payload)
            case FrameType.LOST:
                return self._on_lost(untrusted_payload)
        if flow_id > self._last_id:
            raise RemoteProtocolError(f"{frame_type.name} on flow {flow_id}, which was never opened")
        if frame_type is FrameType.END:
            return self._on_end(flow_id, untrusted_payload)
        segment, data = wire.decode_datagrams(memoryview(untrusted_payload))
        self.late_datagrams += wire.datagrams_in(segment, len(data))
        return None

    def _on_flow(self, flow_id: int, untrusted_payload: Buffer) -> FlowRequested | None:
        request = wire.decode_flow(untrusted_payload)
        self._check_request("FLOW", flow_id, request.port)
        self._last_id = flow_id
        if self._drain_sent is not None:
            # It crossed our GOAWAY. An END costs nothing that its slot does not bound, so any number may.
            self._ending[flow_id] = FlowCode(REFUSAL_WHILE_DRAINING[self._drain_sent.code])
            return None
        if self._flows_this_tick >= FLOWS_PER_TICK:
            self._ending[flow_id] = FlowCode.OVER_LIMIT
            return None
        self._flows_this_tick += 1
        self._flows.add(flow_id)
        return FlowRequested(flow_id, request.port, request.origin, request.proxy)

    def _on_end(self, flow_id: int, untrusted_payload: Buffer) -> FlowEnded | None:
        code = wire.decode_end(untrusted_payload)
        if flow_id not in self._flows:
            # If ours waits to be written, the two have crossed, and the peer needs ours no more.
            self._ending.pop(flow_id, None)
            return None
        self._flows.remove(flow_id)
        return FlowEnded(flow_id, code)

    def _on_lost(self, untrusted_payload: Buffer) -> LostReported | None:
        if self.role is not Role.LISTENER:
            raise RemoteProtocolError("LOST from the listener side")
        lost = wire.decode_lost(untrusted_payload)
        heard = self._lost_heard
        if lost[0] < heard[0] or lost[1] < heard[1]:
            raise RemoteProtocolError(f"LOST of {lost[0]} and {lost[1]} datagrams after {heard}")
        if lost == heard:
            return None
        self._lost_heard = lost
        return LostReported(*lost)

    # Shared by both directions

    def _check_existed(self, flow_id: int) -> None:
        if not 0 < flow_id <= self._last_id:
            raise LocalProtocolError(f"flow {flow_id} never existed")

    def _forget_all(self) -> None:
        self._flows.clear()
        self._ending.clear()
        self._is_lost_due = False
