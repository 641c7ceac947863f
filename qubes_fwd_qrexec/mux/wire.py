# SPDX-License-Identifier: GPL-2.0-or-later
"""The layout of every frame; offsets never leave this file. SPEC.md says the same in words.

Encoders take valid values and return a complete frame. Decoders take the payload of a frame whose header
passed `check_header`, and raise RemoteProtocolError if its values are invalid.
"""

from collections.abc import Callable
from enum import IntEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from struct import Struct
from typing import Final, NamedTuple, TypeVar

from qubes_fwd_qrexec.common.errors import LocalProtocolError, RemoteProtocolError
from qubes_fwd_qrexec.common.values import IPAddress, unmapped

from .limits import (
    MAX_DATA_BYTES,
    MAX_DATAGRAM_BYTES,
    MAX_FIRST_BYTES,
    MAX_HELLO_BYTES,
    MAX_SEGMENTS,
    SEGMENT_BYTES,
    VERSION,
)
from .messages import FlowCode, Goaway, GoawayCode, Hello, Origin, ProxyVersion, ResetCode

Buffer = bytes | bytearray | memoryview
# Making one takes as long as all else that is done for an OPEN here, and the same ones come again.
_ADDRESSES_MAX = 1024
_T = TypeVar("_T")


class FrameType(IntEnum):
    """The first byte of a frame."""

    HELLO = 1
    OPEN = 2
    ACCEPT = 3
    DATA = 4
    CREDIT = 5
    EOF = 6
    RESET = 7
    PING = 8
    PONG = 9
    GOAWAY = 10
    RECALL = 11
    RETURN = 12
    FLOW = 13
    DATAGRAMS = 14
    END = 15
    LOST = 16


class OpenRequest(NamedTuple):
    """The payload of OPEN: the credit of the target side, the port, who connected, the PROXY header that
    tells the server, and the first bytes of the stream (not in version 1)."""

    credit: int
    port: int
    origin: Origin
    proxy: ProxyVersion
    first: bytes = b""


class FlowRequest(NamedTuple):
    """The payload of FLOW: the port, who sent to what, and the PROXY header in front of each datagram."""

    port: int
    origin: Origin
    proxy: ProxyVersion


MAGIC: Final = b"qfwd-mux"
MAGIC_OF_DATAGRAMS: Final = b"qfwd-udp"

# The header, with type and flags as one number: as flags are 0, a legal one is the type times 256, and one
# comparison for each frame checks both.
HEADER: Final = Struct(">HHI")
_VERSIONS: Final = Struct(">8sHH")
_HELLO_REST: Final = Struct(">III16s")
_HELLO_BYTES: Final = _VERSIONS.size + _HELLO_REST.size
_OPEN: Final = Struct(">IH16sH16sHB")
_U32: Final = Struct(">I")
_GOAWAY: Final = Struct(">IHH")
_FLOW: Final = Struct(">H16sH16sHB")
_DATAGRAMS: Final = Struct(">HHIH")
_SEGMENT: Final = Struct(">H")
_LOST: Final = Struct(">QQ")

DATA_KIND: Final = FrameType.DATA << 8
END_BYTES: Final = HEADER.size + _U32.size
LOST_BYTES: Final = HEADER.size + _LOST.size

DATAGRAMS_KIND: Final = FrameType.DATAGRAMS << 8

Shapes = dict[int, tuple[int, int, bool]]
"""For each type, as the header has it: the least and the greatest length, and whether the frame belongs to a
stream or flow."""

_SHARED_SHAPES: Final[Shapes] = {
    FrameType.HELLO << 8: (_HELLO_BYTES, MAX_HELLO_BYTES, False),
    FrameType.PING << 8: (8, 8, False),
    FrameType.PONG << 8: (8, 8, False),
    FrameType.GOAWAY << 8: (_GOAWAY.size, _GOAWAY.size, False),
}
STREAM_SHAPES: Final[Shapes] = _SHARED_SHAPES | {
    FrameType.OPEN << 8: (_OPEN.size, _OPEN.size + MAX_FIRST_BYTES, True),
    FrameType.ACCEPT << 8: (_U32.size, _U32.size, True),
    FrameType.DATA << 8: (1, MAX_DATA_BYTES, True),
    FrameType.CREDIT << 8: (_U32.size, _U32.size, True),
    FrameType.EOF << 8: (0, 0, True),
    FrameType.RESET << 8: (_U32.size, _U32.size, True),
    FrameType.RECALL << 8: (_U32.size, _U32.size, True),
    FrameType.RETURN << 8: (_U32.size, _U32.size, True),
}
"""The frames of a call with streams."""

FLOW_SHAPES: Final[Shapes] = _SHARED_SHAPES | {
    FrameType.FLOW << 8: (_FLOW.size, _FLOW.size, True),
    FrameType.DATAGRAMS << 8: (SEGMENT_BYTES, SEGMENT_BYTES + MAX_DATAGRAM_BYTES, True),
    FrameType.END << 8: (_U32.size, _U32.size, True),
    FrameType.LOST << 8: (_LOST.size, _LOST.size, False),
}
"""The frames of a datagram call."""


def check_header(kind: int, length: int, stream_id: int, shapes: Shapes = STREAM_SHAPES) -> FrameType:
    """The type of a frame, from the three numbers of its header. ``shapes``: the frames of this kind of call.

    Raises RemoteProtocolError."""
    shape = shapes.get(kind)
    if shape is None:
        if kind & 0xFF and kind & 0xFF00 in shapes:
            raise RemoteProtocolError(f"the flags of a frame are {kind & 0xFF:#04x} instead of 0")
        raise RemoteProtocolError(f"unknown frame type {kind >> 8}")
    frame_type = FrameType(kind >> 8)
    least, most, has_stream = shape
    if not least <= length <= most:
        raise RemoteProtocolError(f"{frame_type.name} of {length} bytes instead of {least} to {most}")
    if has_stream != (stream_id != 0):
        raise RemoteProtocolError(f"{frame_type.name} on stream {stream_id}")
    return frame_type


def encode_hello(hello: Hello) -> bytes:
    magic = MAGIC_OF_DATAGRAMS if hello.is_of_datagrams else MAGIC
    versions = _VERSIONS.pack(magic, hello.min_version, hello.max_version)
    rest = _HELLO_REST.pack(hello.window_bytes, hello.max_streams, hello.lease_s, hello.nonce)
    return frame(FrameType.HELLO, 0, versions + rest)


def decode_versions(untrusted_payload: Buffer, wanted_magic: bytes = MAGIC) -> tuple[int, int]:
    """The lowest and highest version of a HELLO, whose layout up to there never changes."""
    magic, min_version, max_version = _VERSIONS.unpack_from(untrusted_payload)
    if magic != wanted_magic:
        raise RemoteProtocolError(f"the HELLO begins with {magic!a} instead of {wanted_magic!a}")
    return min_version, max_version


def decode_hello(untrusted_payload: Buffer, wanted_magic: bytes = MAGIC) -> Hello:
    """A HELLO longer than ours is an error, too, unless the peer speaks a later version."""
    min_version, max_version = decode_versions(untrusted_payload, wanted_magic)
    window, streams, lease_s, nonce = _HELLO_REST.unpack_from(untrusted_payload, _VERSIONS.size)
    if (window == 0) != (wanted_magic == MAGIC_OF_DATAGRAMS):
        raise RemoteProtocolError(f"the window must be 0 in a datagram call, and only there; it is {window}")
    if len(untrusted_payload) > _HELLO_BYTES and max_version <= VERSION:
        raise RemoteProtocolError(f"HELLO of {len(untrusted_payload)} bytes instead of {_HELLO_BYTES}")
    return _from_peer(
        lambda: Hello(
            window_bytes=window,
            nonce=nonce,
            max_streams=streams,
            lease_s=lease_s,
            min_version=min_version,
            max_version=max_version,
        )
    )


def encode_open(stream_id: int, request: OpenRequest) -> bytes:
    payload = _OPEN.pack(request.credit, request.port, *_pack_origin(request.origin), request.proxy)
    return frame(FrameType.OPEN, stream_id, payload + request.first)


def decode_open(untrusted_payload: Buffer) -> OpenRequest:
    credit, port, client, client_port, exposed, exposed_port, number = _OPEN.unpack_from(untrusted_payload)
    origin = Origin(_address(client), client_port, _address(exposed), exposed_port)
    first = bytes(untrusted_payload[_OPEN.size :])
    return OpenRequest(credit, port, origin, _proxy_version(number), first)


def encode_accept(stream_id: int, credit: int) -> bytes:
    return frame(FrameType.ACCEPT, stream_id, _U32.pack(credit))


def encode_credit(stream_id: int, increment: int) -> bytes:
    return frame(FrameType.CREDIT, stream_id, _U32.pack(increment))


def encode_recall(stream_id: int, keep: int) -> bytes:
    return frame(FrameType.RECALL, stream_id, _U32.pack(keep))


def encode_return(stream_id: int, amount: int) -> bytes:
    return frame(FrameType.RETURN, stream_id, _U32.pack(amount))


def encode_reset(stream_id: int, code: ResetCode) -> bytes:
    return frame(FrameType.RESET, stream_id, _U32.pack(code))


def decode_number(untrusted_payload: Buffer) -> int:
    """The one number of ACCEPT, CREDIT, RECALL and RETURN, in bytes of credit."""
    number: int = _U32.unpack(untrusted_payload)[0]
    return number


def decode_reset(untrusted_payload: Buffer) -> ResetCode:
    number = decode_number(untrusted_payload)
    try:
        return ResetCode(number)
    except ValueError as error:
        raise RemoteProtocolError(f"unknown RESET code {number}") from error


def encode_eof(stream_id: int) -> bytes:
    return frame(FrameType.EOF, stream_id, b"")


def encode_ping(payload: bytes) -> bytes:
    return frame(FrameType.PING, 0, payload)


def encode_pong(payload: bytes) -> bytes:
    return frame(FrameType.PONG, 0, payload)


def encode_goaway(goaway: Goaway) -> bytes:
    return frame(FrameType.GOAWAY, 0, _GOAWAY.pack(goaway.last_id, goaway.code, goaway.is_final))


def decode_goaway(untrusted_payload: Buffer) -> Goaway:
    last_id, number, final = _GOAWAY.unpack(untrusted_payload)
    if final > 1:
        raise RemoteProtocolError(f"the final field of a GOAWAY is {final} instead of 0 or 1")
    try:
        code = GoawayCode(number)
    except ValueError as error:
        raise RemoteProtocolError(f"unknown GOAWAY code {number}") from error
    return _from_peer(lambda: Goaway(last_id, code, bool(final)))


def encode_flow(flow_id: int, request: FlowRequest) -> bytes:
    payload = _FLOW.pack(request.port, *_pack_origin(request.origin), request.proxy)
    return frame(FrameType.FLOW, flow_id, payload)


def decode_flow(untrusted_payload: Buffer) -> FlowRequest:
    port, client, client_port, exposed, exposed_port, number = _FLOW.unpack(untrusted_payload)
    proxy = _proxy_version(number)
    if proxy is ProxyVersion.V1:
        raise RemoteProtocolError("a FLOW with a PROXY header of version 1, which is for TCP alone")
    return FlowRequest(port, Origin(_address(client), client_port, _address(exposed), exposed_port), proxy)


def encode_end(flow_id: int, code: FlowCode) -> bytes:
    return frame(FrameType.END, flow_id, _U32.pack(code))


def decode_end(untrusted_payload: Buffer) -> FlowCode:
    number = decode_number(untrusted_payload)
    try:
        return FlowCode(number)
    except ValueError as error:
        raise RemoteProtocolError(f"unknown END code {number}") from error


def encode_lost(to_server: int, to_listener: int) -> bytes:
    return frame(FrameType.LOST, 0, _LOST.pack(to_server, to_listener))


def decode_lost(untrusted_payload: Buffer) -> tuple[int, int]:
    """How many datagrams the target side has dropped: towards the server, and towards the listener side."""
    to_server, to_listener = _LOST.unpack(untrusted_payload)
    return to_server, to_listener


def datagrams_header(flow_id: int, segment: int, length: int) -> bytes:
    """The header of DATAGRAMS with the segment behind it; ``length``: that of the datagrams alone."""
    return _DATAGRAMS.pack(DATAGRAMS_KIND, SEGMENT_BYTES + length, flow_id, segment)


def decode_datagrams(untrusted_payload: memoryview) -> tuple[int, memoryview]:
    """The segment, and a view of the datagrams behind it."""
    (segment,) = _SEGMENT.unpack_from(untrusted_payload)
    data = untrusted_payload[SEGMENT_BYTES:]
    if segment and not is_segment_of(segment, len(data)):
        raise RemoteProtocolError(f"{len(data)} bytes in segments of {segment}")
    return segment, data


def is_segment_of(segment: int, length: int) -> bool:
    """Whether ``length`` bytes are one datagram (segment 0), or 2 to MAX_SEGMENTS of that many bytes each, of
    which the last may be shorter."""
    return not segment or segment < length <= segment * MAX_SEGMENTS


def datagrams_in(segment: int, length: int) -> int:
    """How many datagrams ``length`` bytes are; the segment fits them, see `is_segment_of`."""
    return -(-length // segment) if segment else 1


def data_header(stream_id: int, length: int) -> bytes:
    """The header alone: a large payload of DATA is not copied behind it."""
    return HEADER.pack(DATA_KIND, length, stream_id)


def frame(frame_type: FrameType, stream_id: int, payload: bytes) -> bytes:
    return HEADER.pack(frame_type << 8, len(payload), stream_id) + payload


def _pack_origin(origin: Origin) -> tuple[bytes, int, bytes, int]:
    return (
        _pack_address(origin.client),
        origin.client_port,
        _pack_address(origin.exposed),
        origin.exposed_port,
    )


def _proxy_version(number: int) -> ProxyVersion:
    try:
        return ProxyVersion(number)
    except ValueError as error:
        raise RemoteProtocolError(f"unknown PROXY version {number}") from error


@lru_cache(_ADDRESSES_MAX)
def _address(packed: bytes) -> IPAddress:
    return unmapped(IPv6Address(packed))


def _pack_address(address: IPAddress) -> bytes:
    if isinstance(address, IPv4Address):
        return b"\0" * 10 + b"\xff\xff" + address.packed
    return address.packed


def _from_peer(make: Callable[[], _T]) -> _T:
    try:
        return make()
    except LocalProtocolError as error:
        raise RemoteProtocolError(f"the peer sent an invalid value: {error}") from error
