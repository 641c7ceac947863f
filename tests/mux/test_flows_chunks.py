# SPDX-License-Identifier: GPL-2.0-or-later
"""The same bytes of a datagram call give the same events however they are cut, and any bytes give events or
one error."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_fwd_qrexec.common.errors import RemoteProtocolError
from qubes_fwd_qrexec.mux import DatagramsReceived, FlowCode, FlowRequested, HelloReceived, wire
from qubes_fwd_qrexec.mux.messages import GoawayCode

from .flow_helpers import ORIGIN, datagrams_frame, end_frame, flow_frame, fresh, hello
from .helpers import goaway_frame, take, told

FROM_LISTENER = [
    wire.encode_hello(hello("listener")),
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
]


def play(chunks, side="target"):
    """The events of these chunks, with some flows refused as they come, and the error at the end if any."""
    connection = fresh(side)
    events = []
    try:
        for chunk in chunks:
            for event in told(connection.receive_data(chunk)):
                if isinstance(event, DatagramsReceived):
                    events.append((event.flow_id, event.segment, bytes(event.data)))
                    continue
                events.append(event)
                if isinstance(event, FlowRequested) and event.flow_id % 3 == 0:
                    connection.end_flow(event.flow_id, FlowCode.REFUSED)
                elif isinstance(event, HelloReceived) and side == "listener":
                    for _ in range(3):
                        connection.open_flow(5300, ORIGIN)
    except RemoteProtocolError as error:
        return events, str(error), connection
    return events, None, connection


WHOLE = b"".join(FROM_LISTENER)
EVENTS, ERROR, _ = play([WHOLE])


def test_the_whole_is_a_conversation_without_error():
    assert ERROR is None
    assert len(EVENTS) == len(FROM_LISTENER) - 1  # a PING is no event


def test_a_cut_at_every_byte_changes_nothing():
    for kind in (bytes, bytearray, memoryview):
        for cut in range(len(WHOLE)):
            assert play([kind(WHOLE[:cut]), kind(WHOLE[cut:])])[:2] == (EVENTS, None)


def test_byte_by_byte_changes_nothing():
    assert play([bytes([byte]) for byte in WHOLE])[:2] == (EVENTS, None)


def test_a_buffer_that_is_used_again_for_the_next_chunk_changes_nothing():
    buffer = bytearray(7)

    def chunks():
        for start in range(0, len(WHOLE), len(buffer)):
            piece = WHOLE[start : start + len(buffer)]
            buffer[: len(piece)] = piece
            yield memoryview(buffer)[: len(piece)]
            buffer[:] = b"\xff" * len(buffer)

    assert play(chunks())[:2] == (EVENTS, None)


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
        assert connection.slots_taken == 0


# Frames that are nearly right, since random bytes alone hardly pass the header.
numbers = st.integers(0, 3) | st.integers(0, 0xFFFF_FFFF)
payloads = st.sampled_from([2, 3, 4, 8, 16, 39, 40, 1, 0]).flatmap(
    lambda n: st.binary(min_size=n, max_size=n)
)
loose = st.builds(
    lambda kind, stream_id, payload: (
        bytes([kind, 0]) + len(payload).to_bytes(2, "big") + stream_id.to_bytes(4, "big") + payload
    ),
    st.integers(0, 17),
    numbers,
    payloads,
)
right = st.sampled_from([*FROM_LISTENER[1:], flow_frame(3), datagrams_frame(3), wire.encode_lost(1, 2)])
calls = st.builds(
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


@settings(max_examples=300, deadline=None, derandomize=True)
@given(calls, st.lists(st.integers(0, 600), max_size=6))
def test_any_bytes_give_the_same_events_and_error_however_they_are_cut(call, cuts):
    side, data = call
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    events, error, connection = play([data], side)
    sent, late = take(connection), connection.late_datagrams
    for chunks in ([data[a:b] for a, b in pairwise(edges)], [bytes([byte]) for byte in data]):
        again = play(chunks, side)
        assert again[:2] == (events, error)
        assert take(again[2]) == sent
        assert again[2].late_datagrams == late
    if error is not None:
        assert connection.slots_taken == 0


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=200), st.booleans())
def test_random_bytes_give_events_or_the_peers_fault(data, has_hello):
    before = FROM_LISTENER[0] if has_hello else b""
    _, _, connection = play([before + data])
    assert connection.slots_taken <= 8
