# SPDX-License-Identifier: GPL-2.0-or-later
"""Two connections wired together, and the bytes of frames for tests that play a peer."""

from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any, Generic, TypeVar

import pytest

from qubes_fwd_qrexec.common.errors import RemoteProtocolError
from qubes_fwd_qrexec.mux import (
    AcceptReceived,
    Connection,
    Event,
    Hello,
    OpenReceived,
    Origin,
    ProxyVersion,
    wire,
)
from qubes_fwd_qrexec.mux.endpoint import Endpoint
from qubes_fwd_qrexec.mux.limits import HEADER_BYTES
from qubes_fwd_qrexec.mux.messages import Goaway, GoawayCode, ResetCode

PORTS = range(8080, 8083)
WINDOW = 65_536
CREDIT = 16_384
GOAWAY_BYTES = HEADER_BYTES + 8
AnyEvent = TypeVar("AnyEvent")
AnyEnd = TypeVar("AnyEnd", bound=Endpoint[Any])
ORIGIN = Origin(ip_address("192.0.2.1"), 40000, ip_address("10.137.0.5"), 80)


def hello(side: str, **changes: object) -> Hello:
    values: dict[str, object] = {"window_bytes": WINDOW, "nonce": side[:1].encode() * 16}
    if side == "target":
        values |= {"max_streams": 8, "lease_s": 300}
    return Hello(**(values | changes))  # type: ignore[arg-type]


def take(connection: Endpoint[Any]) -> bytes:
    """Return everything that it has to send."""
    return b"".join(connection.data_to_send())


def told(events: Iterator[AnyEvent | None]) -> Iterator[AnyEvent]:
    """Without the frames of which there is nothing to tell."""
    return (event for event in events if event is not None)


def feed(connection: Endpoint[AnyEvent], data: bytes) -> list[AnyEvent]:
    """Return all events of one chunk."""
    return list(told(connection.receive_data(data)))


def fresh(side: str, **changes: object) -> Connection:
    """A connection whose own HELLO has been written and whose peer said nothing yet."""
    connection = Connection(hello(side, **changes), PORTS)
    take(connection)
    return connection


def ready(side: str, **changes: object) -> Connection:
    """A connection whose peer said HELLO, and may now be played by the test."""
    connection = fresh(side, **changes)
    other = "listener" if side == "target" else "target"
    feed(connection, wire.encode_hello(hello(other)))
    return connection


class AnyPair(Generic[AnyEnd, AnyEvent]):
    """A listener side and a target side of one kind, and the bytes between them."""

    def __init__(self, listener: AnyEnd, target: AnyEnd) -> None:
        self.listener = listener
        self.target = target
        self.settle()

    def settle(self) -> tuple[list[AnyEvent], list[AnyEvent]]:
        """Move bytes until none are left; the events at the listener side and at the target side."""
        events: tuple[list[AnyEvent], list[AnyEvent]] = ([], [])
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


class Pair(AnyPair[Connection, Event]):
    def __init__(self, **target_changes: object) -> None:
        super().__init__(
            Connection(hello("listener"), PORTS), Connection(hello("target", **target_changes), PORTS)
        )

    def open(self, credit: int = CREDIT) -> int:
        """A stream that the target side has accepted."""
        stream_id = self.listener.open_stream(8080, ORIGIN, credit)
        self.settle()
        self.target.accept_stream(stream_id, credit)
        self.settle()
        return stream_id


# Frames as a peer would send them, without the checks that `Connection` makes on sending.


def open_frame(stream_id: int, port: int = 8080, credit: int = CREDIT) -> bytes:
    return wire.encode_open(stream_id, wire.OpenRequest(credit, port, ORIGIN, ProxyVersion.OFF))


def data_frame(stream_id: int, payload: bytes = b"x") -> bytes:
    return wire.data_header(stream_id, len(payload)) + payload


def reset_frame(stream_id: int, code: ResetCode = ResetCode.ABORTED) -> bytes:
    return wire.encode_reset(stream_id, code)


def goaway_frame(last_id: int, code: GoawayCode, is_final: bool = False) -> bytes:
    return wire.encode_goaway(Goaway(last_id, code, is_final))


def raw_frame(kind: int, stream_id: int = 0, payload: bytes = b"", flags: int = 0) -> bytes:
    return bytes([kind, flags]) + len(payload).to_bytes(2, "big") + stream_id.to_bytes(4, "big") + payload


# A connection with a peer that the test plays, and what it makes of a frame that may not be.


def target_with_stream(is_accepted: bool = True) -> Connection:
    target = ready("target")
    assert feed(target, open_frame(1)) == [OpenReceived(1, 8080, ORIGIN, ProxyVersion.OFF)]
    if is_accepted:
        target.accept_stream(1, CREDIT)
    take(target)
    return target


def listener_with_stream(is_accepted: bool = True) -> Connection:
    listener = ready("listener")
    listener.open_stream(8080, ORIGIN, CREDIT)
    if is_accepted:
        assert feed(listener, wire.encode_accept(1, CREDIT)) == [AcceptReceived(1)]
    take(listener)
    return listener


def refuses(
    connection: Endpoint[Any], data: bytes, problem: str, code: GoawayCode = GoawayCode.PROTOCOL_ERROR
) -> None:
    """The bytes end the mux and all that it carries, and the peer gets a GOAWAY as the last frame."""
    with pytest.raises(RemoteProtocolError, match=problem):
        feed(connection, data)
    assert connection.is_over
    assert connection.slots_taken == 0
    if isinstance(connection, Connection):
        assert connection.granted_bytes == 0
    last = take(connection)[-GOAWAY_BYTES:]
    said = wire.decode_goaway(last[HEADER_BYTES:])
    assert last == goaway_frame(said.last_id, code, is_final=True)
    with pytest.raises(RemoteProtocolError, match=problem):
        connection.receive_data(b"")
    connection.receive_eof()
    assert take(connection) == b""
