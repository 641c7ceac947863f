# SPDX-License-Identifier: GPL-2.0-or-later
"""Two ends of a datagram call wired together, and the bytes of frames for tests that play a peer."""

from ipaddress import ip_address

import pytest

from qubes_fwd_qrexec.common.errors import RemoteProtocolError
from qubes_fwd_qrexec.mux import (
    DatagramsReceived,
    FlowCode,
    FlowConnection,
    FlowEvent,
    FlowRequested,
    GoawayCode,
    Hello,
    Origin,
    ProxyVersion,
    wire,
)
from qubes_fwd_qrexec.mux.reader import FrameReader
from qubes_fwd_qrexec.mux.wire import FrameType

from .helpers import feed, take

PORTS = range(5300, 5303)
ORIGIN = Origin(ip_address("192.0.2.1"), 40000, ip_address("10.137.0.5"), 53)


def hello(side: str, **changes: object) -> Hello:
    values: dict[str, object] = {"window_bytes": 0, "nonce": side[:1].encode() * 16}
    if side == "target":
        values |= {"max_streams": 8, "lease_s": 300}
    return Hello(**(values | changes))  # type: ignore[arg-type]


def fresh(side: str, **changes: object) -> FlowConnection:
    """An end whose own HELLO has been written and whose peer said nothing yet."""
    connection = FlowConnection(hello(side, **changes), PORTS)
    take(connection)
    return connection


def ready(side: str, **changes: object) -> FlowConnection:
    """An end whose peer said HELLO, and may now be played by the test."""
    connection = fresh(side, **changes)
    feed(connection, wire.encode_hello(hello("listener" if side == "target" else "target")))
    return connection


class FlowPair:
    """A listener side and a target side, and the bytes between them."""

    def __init__(self, **target_changes: object) -> None:
        self.listener = FlowConnection(hello("listener"), PORTS)
        self.target = FlowConnection(hello("target", **target_changes), PORTS)
        self.settle()

    def settle(self) -> tuple[list[FlowEvent], list[FlowEvent]]:
        """Move bytes until none are left; the events at the listener side and at the target side."""
        events: tuple[list[FlowEvent], list[FlowEvent]] = ([], [])
        moved = True
        while moved:
            moved = False
            for here, there, seen in (
                (self.listener, self.target, events[1]),
                (self.target, self.listener, events[0]),
            ):
                data = take(here)
                if data:
                    moved = True
                    seen += feed(there, data)
        return events

    def open(self) -> int:
        """A flow that the target side has heard of."""
        flow_id = self.listener.open_flow(5300, ORIGIN)
        self.settle()
        return flow_id


# Frames as a peer would send them, without the checks that `FlowConnection` makes on sending.


def flow_frame(flow_id: int, port: int = 5300, proxy: ProxyVersion = ProxyVersion.OFF) -> bytes:
    return wire.encode_flow(flow_id, wire.FlowRequest(port, ORIGIN, proxy))


def datagrams_frame(flow_id: int, payload: bytes = b"x", segment: int = 0) -> bytes:
    return wire.datagrams_header(flow_id, segment, len(payload)) + payload


def end_frame(flow_id: int, code: FlowCode = FlowCode.DONE) -> bytes:
    return wire.encode_end(flow_id, code)


def datagrams(flow_id: int, payload: bytes = b"x", segment: int = 0) -> DatagramsReceived:
    return DatagramsReceived(flow_id, segment, memoryview(payload))


def frames(data: bytes) -> list[tuple[FrameType, int, bytes]]:
    """The frames that these bytes are."""
    reader = FrameReader(wire.FLOW_SHAPES, wire.DATAGRAMS_KIND)
    found = [(FrameType(kind), flow_id, bytes(payload)) for kind, flow_id, payload in reader.frames(data)]
    assert not reader.has_partial_frame
    return found


# An end with a peer that the test plays, and what it makes of a frame that may not be.


def target_with_flow() -> FlowConnection:
    target = ready("target")
    assert feed(target, flow_frame(1)) == [FlowRequested(1, 5300, ORIGIN, ProxyVersion.OFF)]
    return target


def listener_with_flow() -> FlowConnection:
    listener = ready("listener")
    listener.open_flow(5300, ORIGIN)
    take(listener)
    return listener


def refuses(
    connection: FlowConnection, data: bytes, problem: str, code: GoawayCode = GoawayCode.PROTOCOL_ERROR
) -> None:
    """The bytes end the mux and all flows, and the peer gets a GOAWAY."""
    with pytest.raises(RemoteProtocolError, match=problem):
        feed(connection, data)
    assert connection.is_over
    assert connection.slots_taken == 0
    *_, (frame_type, _, payload) = frames(take(connection))
    assert frame_type == FrameType.GOAWAY
    goaway = wire.decode_goaway(payload)
    assert (goaway.code, goaway.is_final) == (code, True)
    with pytest.raises(RemoteProtocolError, match=problem):
        connection.receive_data(b"")
    connection.receive_eof()
    assert take(connection) == b""
