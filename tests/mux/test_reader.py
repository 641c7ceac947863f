# SPDX-License-Identifier: GPL-2.0-or-later
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_fwd_qrexec.common.errors import RemoteProtocolError
from qubes_fwd_qrexec.mux import wire
from qubes_fwd_qrexec.mux.limits import HEADER_BYTES, MAX_DATA_BYTES, MAX_DATAGRAM_BYTES, SEGMENT_BYTES
from qubes_fwd_qrexec.mux.reader import FrameReader
from qubes_fwd_qrexec.mux.wire import FrameType

from .flow_helpers import datagrams_frame, end_frame
from .helpers import data_frame

FRAMES = [
    (FrameType.DATA, 1, b"x"),
    (FrameType.EOF, 1, b""),
    (FrameType.PING, 0, b"12345678"),
    (FrameType.DATA, 2, b"y" * 300),
]
STREAM = data_frame(1) + wire.encode_eof(1) + wire.encode_ping(b"12345678") + data_frame(2, b"y" * 300)


def read(chunks):
    reader = FrameReader()
    frames = [frame for chunk in chunks for frame in reader.frames(chunk)]
    assert not reader.has_partial_frame
    return frames


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_frames_come_out_of_any_kind_of_buffer_as_views_of_it(kind):
    chunk = kind(STREAM)
    frames = read([chunk])
    assert frames == FRAMES
    assert all(payload.obj is (STREAM if kind is memoryview else chunk) for _, _, payload in frames)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_cut_at_any_byte_changes_nothing(kind):
    for cut in range(len(STREAM) + 1):
        assert read([kind(STREAM[:cut]), kind(STREAM[cut:])]) == FRAMES


def test_byte_by_byte_changes_nothing():
    assert read([STREAM[i : i + 1] for i in range(len(STREAM))]) == FRAMES


@settings(derandomize=True)
@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_any_cuts_change_nothing(cuts):
    edges = [0, *sorted(cuts), len(STREAM)]
    assert read([STREAM[a:b] for a, b in pairwise(edges)]) == FRAMES


OF_FLOWS = datagrams_frame(1) + end_frame(1) + wire.encode_lost(1, 2) + datagrams_frame(2, b"y" * 300, 5)


def reader_of_flows():
    return FrameReader(wire.FLOW_SHAPES, wire.DATAGRAMS_KIND)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_payloads_of_a_datagram_call_are_views_of_their_chunk(kind):
    chunk = kind(OF_FLOWS)
    frames = list(reader_of_flows().frames(chunk))
    assert [(FrameType(number), flow_id, bytes(payload)) for number, flow_id, payload in frames] == [
        (FrameType.DATAGRAMS, 1, b"\0\0x"),
        (FrameType.END, 1, b"\0\0\0\x0a"),
        (FrameType.LOST, 0, wire.encode_lost(1, 2)[8:]),
        (FrameType.DATAGRAMS, 2, b"\0\x05" + b"y" * 300),
    ]
    for _, _, payload in frames:
        assert isinstance(payload, memoryview)
        assert payload.obj is (OF_FLOWS if kind is memoryview else chunk)


def copied(frames):
    return [(number, stream_id, bytes(payload)) for number, stream_id, payload in frames]


@pytest.mark.parametrize("make", [FrameReader, reader_of_flows])
def test_a_payload_that_came_in_pieces_is_no_view_of_them(make):
    stream = STREAM if make is FrameReader else OF_FLOWS
    for cut in range(1, len(stream)):
        reader, first = make(), bytearray(stream[:cut])
        frames = copied(reader.frames(first))
        first[:] = b"\xff" * cut
        assert frames + copied(reader.frames(stream[cut:])) == copied(make().frames(stream))


def test_at_most_one_frame_of_datagrams_is_buffered():
    reader = reader_of_flows()
    frame = datagrams_frame(1, bytes(MAX_DATAGRAM_BYTES))
    assert list(reader.frames(frame[:-1])) == []
    assert len(reader.partial) == HEADER_BYTES + SEGMENT_BYTES + MAX_DATAGRAM_BYTES - 1
    assert len(list(reader.frames(frame[-1:] + frame))) == 2
    assert len(reader.partial) == 0


def test_it_knows_that_a_frame_has_begun():
    reader = FrameReader()
    assert list(reader.frames(data_frame(1)[:3])) == []
    assert reader.has_partial_frame
    assert list(reader.frames(data_frame(1)[3:])) == [(FrameType.DATA, 1, b"x")]
    assert not reader.has_partial_frame


@pytest.mark.parametrize("first", [0, 1, 7])
def test_a_wrong_header_is_an_error_before_its_payload_arrives(first):
    reader = FrameReader()
    header = b"\x04\x00\xff\xff\x00\x00\x00\x01"
    list(reader.frames(header[:first]))
    with pytest.raises(RemoteProtocolError, match="DATA of 65535 bytes"):
        list(reader.frames(header[first:]))


def test_at_most_one_frame_is_buffered():
    reader = FrameReader()
    frame = data_frame(1, bytes(MAX_DATA_BYTES))
    assert list(reader.frames(frame[:-1])) == []
    assert len(reader.partial) == HEADER_BYTES + MAX_DATA_BYTES - 1
    assert len(list(reader.frames(frame[-1:] + frame))) == 2
    assert len(reader.partial) == 0
