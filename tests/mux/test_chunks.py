# SPDX-License-Identifier: GPL-2.0-or-later
"""The same bytes give the same events however they are cut, and any bytes give events or one error: in a call
with streams and in a datagram call."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_fwd_qrexec.common.errors import RemoteProtocolError
from qubes_fwd_qrexec.mux import (
    DatagramsReceived,
    DataReceived,
    FlowCode,
    FlowRequested,
    HelloReceived,
    OpenReceived,
    wire,
)
from qubes_fwd_qrexec.mux.messages import GoawayCode

from . import flow_helpers, helpers
from .flow_helpers import datagrams_frame, end_frame, flow_frame
from .helpers import CREDIT, ORIGIN, data_frame, goaway_frame, open_frame, raw_frame, reset_frame, take, told


def act_on_streams(connection, event):
    """Accept streams as they come."""
    match event:
        case OpenReceived():
            connection.accept_stream(event.stream_id, CREDIT)
        case HelloReceived() if event.hello.max_streams:
            for _ in range(3):
                connection.open_stream(8080, ORIGIN, CREDIT)
        case DataReceived():
            connection.grant(event.stream_id, event.cost)
    return event


def act_on_flows(connection, event):
    """Refuse some flows as they come."""
    match event:
        case DatagramsReceived(flow_id, segment, data):
            return flow_id, segment, bytes(data)
        case FlowRequested() if event.flow_id % 3 == 0:
            connection.end_flow(event.flow_id, FlowCode.REFUSED)
        case HelloReceived() if event.hello.max_streams:
            for _ in range(3):
                connection.open_flow(5300, ORIGIN)
    return event


@dataclass
class Call:
    """One kind of call: what a listener side says in one, other frames, and what a caller does for events.

    ``act`` returns what is compared of an event, and ``held`` what an end has left.
    """

    helpers: Any
    said: list[bytes]
    others: list[bytes]
    types: int
    sizes: list[int]
    act: Callable[..., Any]
    held: Callable[[Any], int]
    examples: int
    whole: bytes = field(init=False)

    def __post_init__(self):
        self.said.insert(0, self.hello("listener"))
        self.whole = b"".join(self.said)

    def hello(self, side):
        return wire.encode_hello(self.helpers.hello(side))

    def play(self, chunks, side="target"):
        """The events of these chunks, and the error at the end if any."""
        connection = self.helpers.fresh(side)
        events = []
        try:
            for chunk in chunks:
                for event in told(connection.receive_data(chunk)):
                    events.append(self.act(connection, event))
        except RemoteProtocolError as error:
            return events, str(error), connection
        return events, None, connection

    def nearly_right(self):
        """What a side gets to hear: frames that are nearly right, as random bytes hardly pass the header."""
        numbers = st.integers(0, 3) | st.integers(0, 0xFFFF_FFFF)
        payloads = st.sampled_from(self.sizes).flatmap(lambda n: st.binary(min_size=n, max_size=n))
        loose = st.builds(raw_frame, st.integers(0, self.types), numbers, payloads)
        right = st.sampled_from([*self.said[1:], *self.others])
        return st.builds(
            lambda has_hello, side, frames, tail: (
                side,
                (self.hello("listener" if side == "target" else "target") if has_hello else b"")
                + b"".join(frames)
                + tail,
            ),
            st.sampled_from([True, True, True, False]),
            st.sampled_from(["listener", "target"]),
            st.lists(right | loose, max_size=12),
            st.binary(max_size=20),
        )


STREAMS = Call(
    helpers=helpers,
    said=[
        open_frame(1),
        open_frame(2),
        data_frame(1, b"some data"),
        wire.encode_credit(1, 2048),
        wire.encode_ping(b"12345678"),
        reset_frame(2),
        data_frame(1, b"y" * 100),
        wire.encode_eof(1),
        goaway_frame(2, GoawayCode.SHUTDOWN),
        goaway_frame(2, GoawayCode.DONE, is_final=True),
    ],
    others=[wire.encode_accept(1, 2048), wire.encode_accept(2, 0)],
    types=13,
    sizes=[4, 8, 40, 43, 1, 0],
    act=act_on_streams,
    held=lambda connection: connection.open_streams + connection.granted_bytes,
    examples=150,
)
FLOWS = Call(
    helpers=flow_helpers,
    said=[
        flow_frame(1),
        datagrams_frame(1, b"first"),
        flow_frame(2),
        datagrams_frame(1, b""),
        wire.encode_ping(b"12345678"),
        datagrams_frame(2, b"aaabbbc", 3),
        end_frame(2),
        datagrams_frame(1, b"y" * 100),
        goaway_frame(2, GoawayCode.SHUTDOWN),
        end_frame(1),
        goaway_frame(2, GoawayCode.DONE, is_final=True),
    ],
    others=[flow_frame(3), datagrams_frame(3), wire.encode_lost(1, 2)],
    types=17,
    sizes=[2, 3, 4, 8, 16, 39, 40, 1, 0],
    act=act_on_flows,
    held=lambda connection: connection.slots_taken,
    examples=300,
)
calls = pytest.mark.parametrize("call", [STREAMS, FLOWS], ids=["streams", "flows"])


@calls
def test_the_whole_is_a_conversation_without_error(call):
    events, error, _ = call.play([call.whole])
    assert error is None
    assert len(events) == len(call.said) - 1  # a PING is no event


@calls
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_cut_at_every_byte_changes_nothing(call, kind):
    events, *_ = call.play([call.whole])
    for cut in range(len(call.whole)):
        assert call.play([kind(call.whole[:cut]), kind(call.whole[cut:])])[:2] == (events, None)


@calls
def test_byte_by_byte_changes_nothing(call):
    events, *_ = call.play([call.whole])
    assert call.play([bytes([byte]) for byte in call.whole])[:2] == (events, None)


@calls
def test_a_buffer_that_is_used_again_for_the_next_chunk_changes_nothing(call):
    events, *_ = call.play([call.whole])
    buffer = bytearray(7)

    def chunks():
        for start in range(0, len(call.whole), len(buffer)):
            piece = call.whole[start : start + len(buffer)]
            buffer[: len(piece)] = piece
            yield memoryview(buffer)[: len(piece)]
            buffer[:] = b"\xff" * len(buffer)

    assert call.play(chunks())[:2] == (events, None)


@calls
def test_an_end_at_every_byte_is_an_abort_and_leaves_nothing(call):
    all_events, *_ = call.play([call.whole])
    for cut in range(len(call.whole)):
        events, error, connection = call.play([call.whole[:cut]])
        assert (events, error) == (all_events[: len(events)], None)
        with pytest.raises(RemoteProtocolError):
            connection.receive_eof()
        assert call.held(connection) == 0


@pytest.mark.hypothesis
@calls
def test_any_bytes_give_the_same_events_and_error_however_they_are_cut(call):
    @settings(max_examples=call.examples, deadline=None, derandomize=True)
    @given(call.nearly_right(), st.lists(st.integers(0, 600), max_size=6))
    def check(heard, cuts):
        side, data = heard
        edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
        events, error, connection = call.play([data], side)
        sent, late = take(connection), getattr(connection, "late_datagrams", 0)
        for chunks in ([data[a:b] for a, b in pairwise(edges)], [bytes([byte]) for byte in data]):
            again = call.play(chunks, side)
            assert again[:2] == (events, error)
            assert take(again[2]) == sent
            assert getattr(again[2], "late_datagrams", 0) == late
        if error is not None:
            assert call.held(connection) == 0

    check()


@pytest.mark.hypothesis
@calls
def test_random_bytes_give_events_or_the_peers_fault(call):
    @settings(max_examples=call.examples, deadline=None, derandomize=True)
    @given(st.binary(max_size=200), st.booleans())
    def check(data, has_hello):
        _, _, connection = call.play([(call.said[0] if has_hello else b"") + data])
        assert connection.slots_taken <= 8

    check()
