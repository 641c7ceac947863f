# SPDX-License-Identifier: GPL-2.0-or-later
"""Two ends of a datagram call wired together, and the bytes of frames for tests that play a peer."""

from ipaddress import ip_address

from qubes_fwd_qrexec.mux import (
    DatagramsReceived,
    FlowCode,
    FlowConnection,
    FlowEvent,
    FlowRequested,
    Hello,
    Origin,
    ProxyVersion,
    wire,
)
from qubes_fwd_qrexec.mux.reader import FrameReader
from qubes_fwd_qrexec.mux.wire import FrameType

from . import helpers
from .helpers import AnyPair, feed, take

PORTS = range(5300, 5303)
ORIGIN = Origin(ip_address("192.0.2.1"), 40000, ip_address("10.137.0.5"), 53)


def hello(side: str, **changes: object) -> Hello:
    return helpers.hello(side, **({"window_bytes": 0} | changes))


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


class FlowPair(AnyPair[FlowConnection, FlowEvent]):
    def __init__(self, **target_changes: object) -> None:
        listener = FlowConnection(hello("listener"), PORTS)
        super().__init__(listener, FlowConnection(hello("target", **target_changes), PORTS))

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


# An end with a peer that the test plays, and what it has been told.


def target_with_flow() -> FlowConnection:
    target = ready("target")
    assert feed(target, flow_frame(1)) == [FlowRequested(1, 5300, ORIGIN, ProxyVersion.OFF)]
    return target


def listener_with_flow() -> FlowConnection:
    listener = ready("listener")
    listener.open_flow(5300, ORIGIN)
    take(listener)
    return listener
