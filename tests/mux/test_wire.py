# SPDX-License-Identifier: GPL-2.0-or-later
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qubes_fwd_qrexec.common.errors import RemoteProtocolError
from qubes_fwd_qrexec.mux import wire
from qubes_fwd_qrexec.mux.limits import (
    MAX_FIRST_BYTES,
    MAX_LEASE_S,
    MAX_STREAMS,
    MAX_WINDOW_BYTES,
    MIN_WINDOW_BYTES,
)
from qubes_fwd_qrexec.mux.messages import Goaway, GoawayCode, Hello, Origin, ProxyVersion, ResetCode
from qubes_fwd_qrexec.mux.wire import FrameType

from .helpers import ORIGIN, hello

u32 = st.integers(0, 0xFFFF_FFFF)
ports = st.integers(0, 65_535)
ids = st.integers(1, 0xFFFF_FFFF)
origins = st.builds(Origin, st.ip_addresses(), ports, st.ip_addresses(), ports)
windows = st.integers(MIN_WINDOW_BYTES, MAX_WINDOW_BYTES)
nonces = st.binary(min_size=16, max_size=16)
hellos = st.builds(Hello, windows, nonces) | st.builds(
    Hello, windows, nonces, st.integers(1, MAX_STREAMS), st.integers(1, MAX_LEASE_S)
)


def header(frame):
    return wire.HEADER.unpack_from(frame)


@settings(derandomize=True)
@given(hellos)
def test_a_hello_reads_back(value):
    frame = wire.encode_hello(value)
    assert wire.check_header(*header(frame)) is FrameType.HELLO
    assert wire.decode_hello(frame[8:]) == value
    assert wire.decode_versions(frame[8:]) == (1, 2)


@settings(derandomize=True)
@given(ids, u32, ports, origins, st.sampled_from(ProxyVersion), st.binary(max_size=MAX_FIRST_BYTES))
def test_an_open_reads_back(stream_id, credit, port, origin, proxy, first):
    request = wire.OpenRequest(credit, port, origin, proxy, first)
    frame = wire.encode_open(stream_id, request)
    assert wire.check_header(*header(frame)) is FrameType.OPEN
    assert header(frame)[2] == stream_id
    assert wire.decode_open(frame[8:]) == request


@settings(derandomize=True)
@given(ids, u32)
def test_accept_and_credit_read_back(stream_id, number):
    for encode, frame_type in (
        (wire.encode_accept, FrameType.ACCEPT),
        (wire.encode_credit, FrameType.CREDIT),
    ):
        frame = encode(stream_id, number)
        assert wire.check_header(*header(frame)) is frame_type
        assert wire.decode_number(frame[8:]) == number


@pytest.mark.parametrize("code", ResetCode)
def test_a_reset_reads_back(code):
    frame = wire.encode_reset(5, code)
    assert wire.check_header(*header(frame)) is FrameType.RESET
    assert wire.decode_reset(frame[8:]) is code


@pytest.mark.parametrize("code", GoawayCode)
def test_a_goaway_reads_back(code):
    frame = wire.encode_goaway(Goaway(9, code, is_final=True))
    assert wire.check_header(*header(frame)) is FrameType.GOAWAY
    assert wire.decode_goaway(frame[8:]) == Goaway(9, code, is_final=True)


def test_frames_without_values_have_their_type():
    assert wire.check_header(*header(wire.encode_eof(3))) is FrameType.EOF
    assert wire.check_header(*header(wire.encode_ping(b"12345678"))) is FrameType.PING
    assert wire.check_header(*header(wire.encode_pong(b"12345678"))) is FrameType.PONG
    assert wire.check_header(*header(wire.data_header(3, 32768))) is FrameType.DATA


@pytest.mark.parametrize(
    ("kind", "length", "stream_id", "problem"),
    [
        (0x0000, 0, 0, "unknown frame type 0"),
        (0x0D00, 8, 0, "unknown frame type 13"),
        (0xFF00, 8, 0, "unknown frame type 255"),
        (0xFF01, 8, 0, "unknown frame type 255"),
        (0x0401, 8, 1, "flags of a frame are 0x01"),
        (0x0880, 8, 0, "flags of a frame are 0x80"),
        (0x0400, 0, 1, "DATA of 0 bytes"),
        (0x0400, 32769, 1, "DATA of 32769 bytes"),
        (0x0400, 65535, 1, "DATA of 65535 bytes"),
        (0x0100, 39, 0, "HELLO of 39 bytes"),
        (0x0100, 257, 0, "HELLO of 257 bytes"),
        (0x0200, 42, 1, "OPEN of 42 bytes"),
        (0x0200, 2028, 1, "OPEN of 2028 bytes"),
        (0x0300, 3, 1, "ACCEPT of 3 bytes"),
        (0x0500, 5, 1, "CREDIT of 5 bytes"),
        (0x0600, 1, 1, "EOF of 1 bytes"),
        (0x0700, 0, 1, "RESET of 0 bytes"),
        (0x0800, 7, 0, "PING of 7 bytes"),
        (0x0900, 9, 0, "PONG of 9 bytes"),
        (0x0A00, 9, 0, "GOAWAY of 9 bytes"),
        (0x0100, 40, 1, "HELLO on stream 1"),
        (0x0200, 43, 0, "OPEN on stream 0"),
        (0x0300, 4, 0, "ACCEPT on stream 0"),
        (0x0400, 1, 0, "DATA on stream 0"),
        (0x0500, 4, 0, "CREDIT on stream 0"),
        (0x0600, 0, 0, "EOF on stream 0"),
        (0x0700, 4, 0, "RESET on stream 0"),
        (0x0800, 8, 2, "PING on stream 2"),
        (0x0900, 8, 2, "PONG on stream 2"),
        (0x0A00, 8, 2, "GOAWAY on stream 2"),
        (0x0B00, 4, 0, "RECALL on stream 0"),
        (0x0C00, 4, 0, "RETURN on stream 0"),
    ],
)
def test_an_invalid_header_is_the_peers_fault(kind, length, stream_id, problem):
    with pytest.raises(RemoteProtocolError, match=problem):
        wire.check_header(kind, length, stream_id)


def test_a_hello_without_the_magic_is_the_peers_fault():
    with pytest.raises(RemoteProtocolError, match="begins with b'bash: fw'"):
        wire.decode_hello(b"bash: fwd: command not found".ljust(40))


def test_a_longer_hello_is_right_only_from_a_later_version():
    later = wire.encode_hello(hello("target", max_version=3))[8:] + b"more"
    assert wire.decode_hello(later) == hello("target", max_version=3)
    with pytest.raises(RemoteProtocolError, match="HELLO of 44 bytes"):
        wire.decode_hello(wire.encode_hello(hello("target"))[8:] + b"more")


def test_a_hello_with_invalid_values_is_the_peers_fault():
    payload = wire.encode_hello(hello("target"))[8:]
    with pytest.raises(RemoteProtocolError, match="the window must be"):
        wire.decode_hello(payload[:12] + bytes(4) + payload[16:])


@pytest.mark.parametrize(
    ("payload", "problem"),
    [
        ("00000000 0006 0002", "final field of a GOAWAY is 2"),
        ("00000000 0001 0001", "unknown GOAWAY code 1"),
        ("00000000 000c 0000", "PROTOCOL_ERROR cannot begin a drain"),
    ],
)
def test_an_invalid_goaway_is_the_peers_fault(payload, problem):
    with pytest.raises(RemoteProtocolError, match=problem):
        wire.decode_goaway(bytes.fromhex(payload))


@pytest.mark.parametrize("number", [0, 10, 0xFFFF_FFFF])
def test_an_unknown_reset_code_is_the_peers_fault(number):
    with pytest.raises(RemoteProtocolError, match=f"unknown RESET code {number}"):
        wire.decode_reset(number.to_bytes(4, "big"))


@pytest.mark.parametrize("number", [3, 255])
def test_an_unknown_proxy_header_is_the_peers_fault(number):
    payload = wire.encode_open(1, wire.OpenRequest(0, 80, ORIGIN, ProxyVersion.V2))[8:]
    with pytest.raises(RemoteProtocolError, match=f"unknown PROXY version {number}"):
        wire.decode_open(payload[:-1] + bytes([number]))


def test_an_ipv4_address_travels_mapped():
    frame = wire.encode_open(1, wire.OpenRequest(0, 80, ORIGIN, ProxyVersion.OFF))
    assert frame[14:30] == b"\0" * 10 + b"\xff\xff" + ORIGIN.client.packed
