# SPDX-License-Identifier: GPL-2.0-or-later
"""The layout of the frames that only datagram calls have."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_fwd_qrexec.common.errors import RemoteProtocolError
from qubes_fwd_qrexec.mux import wire
from qubes_fwd_qrexec.mux.limits import MAX_DATAGRAM_BYTES, MAX_LEASE_S, MAX_SEGMENTS, MAX_STREAMS
from qubes_fwd_qrexec.mux.messages import FlowCode, Hello, Origin, ProxyVersion
from qubes_fwd_qrexec.mux.wire import FLOW_SHAPES, MAGIC_OF_DATAGRAMS, FrameType

from .flow_helpers import ORIGIN, hello

u64 = st.integers(0, (1 << 64) - 1)
ports = st.integers(0, 65_535)
ids = st.integers(1, 0xFFFF_FFFF)
origins = st.builds(Origin, st.ip_addresses(), ports, st.ip_addresses(), ports)
nonces = st.binary(min_size=16, max_size=16)
hellos = st.builds(Hello, st.just(0), nonces) | st.builds(
    Hello, st.just(0), nonces, st.integers(1, MAX_STREAMS), st.integers(1, MAX_LEASE_S)
)


def type_of(frame):
    return wire.check_header(*wire.HEADER.unpack_from(frame), FLOW_SHAPES)


@settings(derandomize=True)
@given(hellos)
def test_a_hello_reads_back(value):
    frame = wire.encode_hello(value)
    assert type_of(frame) is FrameType.HELLO
    assert frame[8:16] == MAGIC_OF_DATAGRAMS
    assert wire.decode_hello(frame[8:], MAGIC_OF_DATAGRAMS) == value
    assert wire.decode_versions(frame[8:], MAGIC_OF_DATAGRAMS) == (1, 2)


@settings(derandomize=True)
@given(ids, ports, origins, st.sampled_from((ProxyVersion.OFF, ProxyVersion.V2)))
def test_a_flow_reads_back(flow_id, port, origin, proxy):
    request = wire.FlowRequest(port, origin, proxy)
    frame = wire.encode_flow(flow_id, request)
    assert type_of(frame) is FrameType.FLOW
    assert wire.HEADER.unpack_from(frame)[2] == flow_id
    assert wire.decode_flow(frame[8:]) == request


def test_an_ipv4_address_travels_mapped():
    frame = wire.encode_flow(1, wire.FlowRequest(53, ORIGIN, ProxyVersion.OFF))
    assert frame[10:26] == b"\0" * 10 + b"\xff\xff" + ORIGIN.client.packed
    assert frame[28:44] == b"\0" * 10 + b"\xff\xff" + ORIGIN.exposed.packed


@pytest.mark.parametrize("code", FlowCode)
def test_an_end_reads_back(code):
    frame = wire.encode_end(5, code)
    assert type_of(frame) is FrameType.END
    assert len(frame) == wire.END_BYTES
    assert wire.decode_end(frame[8:]) is code


@settings(derandomize=True)
@given(u64, u64)
def test_lost_reads_back(to_server, to_listener):
    frame = wire.encode_lost(to_server, to_listener)
    assert type_of(frame) is FrameType.LOST
    assert len(frame) == wire.LOST_BYTES
    assert wire.decode_lost(frame[8:]) == (to_server, to_listener)


@settings(derandomize=True)
@given(ids, st.integers(0, 1100), st.integers(0, MAX_DATAGRAM_BYTES))
def test_datagrams_read_back_if_their_segment_fits(flow_id, segment, length):
    header = wire.datagrams_header(flow_id, segment, length)
    assert type_of(header) is FrameType.DATAGRAMS
    assert wire.HEADER.unpack_from(header) == (wire.DATAGRAMS_KIND, length + 2, flow_id)
    parts = len(range(0, length, segment)) if segment else 1
    payload = memoryview(header[8:] + bytes(length))
    if not segment or 2 <= parts <= MAX_SEGMENTS:
        assert wire.decode_datagrams(payload) == (segment, bytes(length))
        assert wire.datagrams_in(segment, length) == parts
    else:
        with pytest.raises(RemoteProtocolError, match=f"{length} bytes in segments of {segment}"):
            wire.decode_datagrams(payload)


@pytest.mark.parametrize(
    ("kind", "length", "flow_id", "problem"),
    [
        (0x0400, 8, 1, "unknown frame type 4"),
        (0x1100, 8, 1, "unknown frame type 17"),
        (0x0E01, 8, 1, "flags of a frame are 0x01"),
        (0x0401, 8, 1, "unknown frame type 4"),
        (0x0D00, 38, 1, "FLOW of 38 bytes"),
        (0x0D00, 40, 1, "FLOW of 40 bytes"),
        (0x0D00, 39, 0, "FLOW on stream 0"),
        (0x0E00, 1, 1, "DATAGRAMS of 1 bytes"),
        (0x0E00, 65510, 1, "DATAGRAMS of 65510 bytes"),
        (0x0E00, 2, 0, "DATAGRAMS on stream 0"),
        (0x0F00, 3, 1, "END of 3 bytes"),
        (0x0F00, 5, 1, "END of 5 bytes"),
        (0x0F00, 4, 0, "END on stream 0"),
        (0x1000, 15, 0, "LOST of 15 bytes"),
        (0x1000, 17, 0, "LOST of 17 bytes"),
        (0x1000, 16, 1, "LOST on stream 1"),
    ],
)
def test_an_invalid_header_is_the_peers_fault(kind, length, flow_id, problem):
    with pytest.raises(RemoteProtocolError, match=problem):
        wire.check_header(kind, length, flow_id, FLOW_SHAPES)


@pytest.mark.parametrize("number", [0, 1, 3, 11, 0xFFFF_FFFF])
def test_an_unknown_end_code_is_the_peers_fault(number):
    with pytest.raises(RemoteProtocolError, match=f"unknown END code {number}"):
        wire.decode_end(number.to_bytes(4, "big"))


@pytest.mark.parametrize(
    ("number", "problem"), [(1, "version 1, which is for TCP"), (3, "unknown PROXY version 3")]
)
def test_a_proxy_header_that_is_none_of_udp_is_the_peers_fault(number, problem):
    payload = wire.encode_flow(1, wire.FlowRequest(80, ORIGIN, ProxyVersion.V2))[8:]
    with pytest.raises(RemoteProtocolError, match=problem):
        wire.decode_flow(payload[:-1] + bytes([number]))


def test_a_hello_whose_window_does_not_go_with_its_magic_is_the_peers_fault():
    of_flows = wire.encode_hello(hello("target"))[8:]
    with pytest.raises(RemoteProtocolError, match="window must be 0 in a datagram call"):
        wire.decode_hello(of_flows[:14] + b"\x08" + of_flows[15:], MAGIC_OF_DATAGRAMS)
    with pytest.raises(RemoteProtocolError, match="window must be 0 in a datagram call, and only there"):
        wire.decode_hello(wire.MAGIC + of_flows[8:])
