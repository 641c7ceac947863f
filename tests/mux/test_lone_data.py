# SPDX-License-Identifier: GPL-2.0-or-later
"""The fast path for a single DATA frame, in and out, does what the usual path does, or nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qubes_fwd_qrexec.common.errors import LocalProtocolError, RemoteProtocolError
from qubes_fwd_qrexec.mux import (
    FRAME_COST_BYTES,
    HEADER_BYTES,
    MAX_DATA_BYTES,
    Connection,
    DataReceived,
    wire,
)
from qubes_fwd_qrexec.mux.limits import CONTROL_BYTES

from .helpers import CREDIT, ORIGIN, PORTS, data_frame, feed, hello, open_frame, ready, reset_frame, take


def flowing(credit: int = CREDIT) -> Connection:
    """A target side with streams 1 and 2, which flow, and nothing to write."""
    connection = ready("target")
    for stream_id in (1, 2):
        feed(connection, open_frame(stream_id))
        connection.accept_stream(stream_id, credit)
    take(connection)
    return connection


def receive(connection: Connection, chunk: bytes) -> int:
    return connection.receive_lone_data(memoryview(chunk))


def test_a_lone_frame_counts_as_received():
    connection, other = flowing(), flowing()
    assert receive(connection, data_frame(2, b"payload")) == 2
    assert feed(other, data_frame(2, b"payload")) == [DataReceived(2, b"payload")]
    assert connection.granted_bytes == other.granted_bytes
    assert connection.granted(2) == other.granted(2) == CREDIT - FRAME_COST_BYTES - len(b"payload")
    assert connection.granted(1) == CREDIT


@pytest.mark.parametrize(
    "chunk",
    [
        b"",
        data_frame(1, b"x")[:HEADER_BYTES],
        data_frame(1, b""),
        data_frame(1, b"xy")[:-1],
        data_frame(1, b"x") + b"\0",
        data_frame(1, b"x") * 2,
        wire.encode_eof(1),
        wire.encode_ping(b"12345678"),
        data_frame(3, b"x"),
        wire.HEADER.pack(wire.DATA_KIND | 1, 1, 1) + b"x",
        wire.HEADER.pack(wire.DATA_KIND, MAX_DATA_BYTES + 1, 1) + bytes(MAX_DATA_BYTES + 1),
        data_frame(1, bytes(CREDIT - FRAME_COST_BYTES + 1)),
    ],
    ids=[
        "nothing",
        "a header",
        "a frame without a payload",
        "half a frame",
        "a frame and a byte",
        "two frames",
        "EOF",
        "PING",
        "no such stream",
        "flags",
        "too long",
        "past the credit",
    ],
)
def test_the_fast_path_leaves_any_other_chunk_untouched(chunk):
    connection = flowing()
    assert receive(connection, chunk) == 0
    assert connection.granted_bytes == 2 * CREDIT
    assert connection.granted(1) == connection.granted(2) == CREDIT
    assert not connection.has_partial_frame
    assert take(connection) == b""


def test_the_last_byte_of_credit_may_be_used():
    connection = flowing()
    assert receive(connection, data_frame(1, bytes(CREDIT - FRAME_COST_BYTES))) == 1
    assert connection.granted(1) == 0


def test_the_largest_frame_takes_the_fast_path():
    connection = flowing(MAX_DATA_BYTES + FRAME_COST_BYTES)
    assert receive(connection, data_frame(1, bytes(MAX_DATA_BYTES))) == 1


def test_a_frame_that_has_begun_keeps_the_fast_path_closed():
    connection = flowing()
    feed(connection, data_frame(1, b"abc")[:-1])
    assert receive(connection, data_frame(2, b"x")) == 0


def test_events_that_were_not_taken_keep_the_fast_path_closed():
    connection = flowing()
    events = connection.receive_data(data_frame(1, b"x") * 2)
    next(events)
    assert receive(connection, data_frame(2, b"x")) == 0


def test_data_after_eof_or_our_reset_is_not_for_the_fast_path():
    connection = flowing()
    feed(connection, wire.encode_eof(1))
    assert receive(connection, data_frame(1, b"x")) == 0
    connection.reset_stream(2)
    assert receive(connection, data_frame(2, b"x")) == 0
    feed(connection, data_frame(2, b"x"))  # checked and dropped


def test_a_peer_that_does_not_read_its_answers_is_for_the_long_way():
    connection = flowing()
    while connection.bytes_queued <= 2 * CONTROL_BYTES:
        connection._outbox.add_control(wire.encode_ping(b"12345678"))
    assert receive(connection, data_frame(1, b"x")) == 0
    with pytest.raises(RemoteProtocolError, match="does not read"):
        feed(connection, data_frame(1, b"x"))


def test_nothing_comes_any_more_when_the_mux_is_over():
    connection = flowing()
    connection.close()
    assert receive(connection, data_frame(1, b"x")) == 0


@given(st.lists(st.sampled_from([b"a", b"bc" * 500]), max_size=8), st.data())
def test_taking_the_fast_path_gives_the_same_events(payloads, data):
    frames = [data_frame(data.draw(st.integers(1, 2)), payload) for payload in payloads]
    stream = b"".join([*frames, reset_frame(2)])
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    ends = [sum(map(len, frames[: n + 1])) for n in range(len(frames))]
    cuts = sorted({*cuts, *(data.draw(st.sampled_from([[], ends])))})
    short, long = flowing(), flowing()
    events: dict[int, bytes] = {1: b"", 2: b""}
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        chunk = stream[start:end]
        stream_id = receive(short, chunk)
        if stream_id:
            events[stream_id] += chunk[HEADER_BYTES:]
        else:
            for event in short.receive_data(chunk):
                if isinstance(event, DataReceived):
                    events[event.stream_id] += event.data
    expected: dict[int, bytes] = {1: b"", 2: b""}
    for event in feed(long, stream):
        if isinstance(event, DataReceived):
            expected[event.stream_id] += event.data
    assert events == expected
    assert short.granted_bytes == long.granted_bytes
    assert [short.granted(i) for i in (1, 2)] == [long.granted(i) for i in (1, 2)]


FRAME_BYTES = HEADER_BYTES + MAX_DATA_BYTES


def buffer_of(payload: bytes) -> memoryview:
    """The payload in pieces, with room for a header in front of each, and more room behind."""
    pieces = [payload[start : start + MAX_DATA_BYTES] for start in range(0, len(payload), MAX_DATA_BYTES)]
    room = b"\xff" * HEADER_BYTES
    return memoryview(bytearray(b"".join(room + piece for piece in pieces) + bytes(FRAME_BYTES)))


def send_now(connection: Connection, stream_id: int, payload: bytes) -> bytes:
    return bytes(connection.send_data_now(stream_id, len(payload), buffer_of(payload)))


def rich(credit: int = 8 * FRAME_BYTES) -> Connection:
    """A listener side with stream 1, which may send that much."""
    listener = Connection(hello("listener", window_bytes=1 << 20), PORTS)
    feed(listener, wire.encode_hello(hello("target", window_bytes=1 << 20)))
    listener.open_stream(8080, ORIGIN, CREDIT)
    feed(listener, wire.encode_accept(1, credit))
    take(listener)
    return listener


@pytest.mark.parametrize("length", [1, 300, *(n * MAX_DATA_BYTES + d for n in (1, 2) for d in (-1, 0, 1))])
def test_what_is_sent_at_once_is_what_would_be_queued(length):
    now, queued = rich(), rich()
    payload = bytes(range(251)) * 300
    payload = payload[:length]
    sent = send_now(now, 1, payload)
    for start in range(0, length, MAX_DATA_BYTES):
        queued.send_data(1, payload[start : start + MAX_DATA_BYTES])
    assert sent == take(queued)
    assert now.send_limit_now(1, 8) == queued.send_limit_now(1, 8)
    assert take(now) == b""


def test_as_much_may_be_sent_at_once_as_may_be_queued():
    connection = flowing()
    assert connection.send_limit_now(1, 1) == connection.send_limit(1) > 0
    feed(connection, wire.encode_credit(1, 32_768))
    assert connection.send_limit_now(1, 1) == connection.send_limit(1) == MAX_DATA_BYTES
    assert connection.send_limit_now(3, 1) == 0


@pytest.mark.parametrize("frames", [1, 2, 8])
@given(credit=st.integers(2048, 9 * FRAME_BYTES))
def test_the_limit_of_several_frames_is_all_that_the_credit_is_good_for(frames, credit):
    now, queued = rich(credit), rich(credit)
    could = 0
    for _ in range(frames):
        if limit := queued.send_limit(1):
            queued.send_data(1, bytes(limit))
        could += limit
    assert now.send_limit_now(1, frames) == could
    send_now(now, 1, bytes(could))
    assert now.send_limit(1) == queued.send_limit(1)


def test_credit_that_is_used_up_leaves_no_room():
    listener = rich(2048)
    send_now(listener, 1, bytes(2048 - FRAME_COST_BYTES))
    assert listener.send_limit_now(1, 8) == listener.send_limit_now(1, 1) == listener.send_limit(1) == 0


def test_nothing_overtakes_what_is_queued():
    connection = flowing()
    connection.send_data(2, b"first")
    assert connection.send_limit_now(1, 1) == 0
    with pytest.raises(LocalProtocolError, match="5 bytes cannot be sent at once on stream 1"):
        send_now(connection, 1, b"later")


@pytest.mark.parametrize(("stream_id", "length"), [(1, 0), (1, CREDIT), (3, 1)])
def test_what_may_not_be_sent_is_refused(stream_id, length):
    with pytest.raises(LocalProtocolError, match="cannot be sent at once"):
        send_now(flowing(), stream_id, bytes(length))


def test_nothing_is_sent_after_eof():
    connection = flowing()
    connection.send_eof(1)
    take(connection)
    assert connection.send_limit_now(1, 1) == 0
