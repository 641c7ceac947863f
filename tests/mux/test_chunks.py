# SPDX-License-Identifier: GPL-2.0-or-later
"""The same bytes give the same events however they are cut, and any bytes give events or one error."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_fwd_qrexec.common.errors import RemoteProtocolError
from qubes_fwd_qrexec.mux import DataReceived, HelloReceived, OpenReceived, wire
from qubes_fwd_qrexec.mux.messages import GoawayCode

from .helpers import (
    CREDIT,
    ORIGIN,
    data_frame,
    fresh,
    goaway_frame,
    hello,
    open_frame,
    reset_frame,
    take,
    told,
)

FROM_LISTENER = [
    wire.encode_hello(hello("listener")),
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
]


def play(chunks, side="target"):
    """The events of these chunks, with streams accepted as they come, and the error at the end if any."""
    connection = fresh(side)
    events = []
    try:
        for chunk in chunks:
            for event in told(connection.receive_data(chunk)):
                events.append(event)
                if isinstance(event, OpenReceived):
                    connection.accept_stream(event.stream_id, CREDIT)
                elif isinstance(event, HelloReceived) and side == "listener":
                    for _ in range(3):
                        connection.open_stream(8080, ORIGIN, CREDIT)
                elif isinstance(event, DataReceived):
                    connection.grant(event.stream_id, event.cost)
    except RemoteProtocolError as error:
        return events, str(error), connection
    return events, None, connection


WHOLE = b"".join(FROM_LISTENER)
EVENTS, ERROR, _ = play([WHOLE])


def test_the_whole_is_a_conversation_without_error():
    assert ERROR is None
    assert len(EVENTS) == len(FROM_LISTENER) - 1  # a PING is no event


def test_a_cut_at_every_byte_changes_nothing():
    for cut in range(len(WHOLE)):
        assert play([WHOLE[:cut], WHOLE[cut:]])[:2] == (EVENTS, None)


def test_byte_by_byte_changes_nothing():
    assert play([bytes([byte]) for byte in WHOLE])[:2] == (EVENTS, None)


def test_an_end_at_every_byte_is_an_abort_and_leaves_nothing():
    for cut in range(len(WHOLE)):
        events, error, connection = play([WHOLE[:cut]])
        assert (events, error) == (EVENTS[: len(events)], None)
        try:
            connection.receive_eof()
        except RemoteProtocolError:
            pass
        else:
            raise AssertionError(f"a cut at {cut} was taken for an end")
        assert connection.open_streams == connection.granted_bytes == 0


# Frames that are nearly right, since random bytes alone hardly pass the header.
numbers = st.integers(0, 3) | st.integers(0, 0xFFFF_FFFF)
payloads = st.sampled_from([4, 8, 40, 43, 1, 0]).flatmap(lambda n: st.binary(min_size=n, max_size=n))
loose = st.builds(
    lambda kind, stream_id, payload: (
        bytes([kind, 0]) + len(payload).to_bytes(2, "big") + stream_id.to_bytes(4, "big") + payload
    ),
    st.integers(0, 13),
    numbers,
    payloads,
)
right = st.sampled_from([*FROM_LISTENER[1:], wire.encode_accept(1, 2048), wire.encode_accept(2, 0)])
streams = st.builds(
    lambda has_hello, side, frames, tail: (
        side,
        (wire.encode_hello(hello("listener" if side == "target" else "target")) if has_hello else b"")
        + b"".join(frames)
        + tail,
    ),
    st.sampled_from([True, True, True, False]),
    st.sampled_from(["listener", "target"]),
    st.lists(right | loose, max_size=12),
    st.binary(max_size=20),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(streams, st.lists(st.integers(0, 600), max_size=6))
def test_any_bytes_give_the_same_events_and_error_however_they_are_cut(stream, cuts):
    side, data = stream
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    events, error, connection = play([data], side)
    sent = take(connection)
    for chunks in ([data[a:b] for a, b in pairwise(edges)], [bytes([byte]) for byte in data]):
        again = play(chunks, side)
        assert again[:2] == (events, error)
        assert take(again[2]) == sent
    if error is not None:
        assert connection.open_streams == connection.granted_bytes == 0


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_give_events_or_the_peers_fault(data, has_hello):
    before = FROM_LISTENER[0] if has_hello else b""
    _, _, connection = play([before + data])
    assert connection.open_streams <= 8
