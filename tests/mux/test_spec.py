# SPDX-License-Identifier: GPL-2.0-or-later
"""The examples and tables of SPEC.md against the code, both ways."""

import json
import re
from ipaddress import ip_address
from pathlib import Path

import pytest

from qubes_fwd_qrexec import mux
from qubes_fwd_qrexec.mux import (
    Connection,
    DatagramsReceived,
    DataReceived,
    EofReceived,
    FlowConnection,
    FlowEnded,
    Hello,
    Origin,
    limits,
    wire,
)
from qubes_fwd_qrexec.mux.messages import (
    REFUSAL_WHILE_DRAINING,
    FlowCode,
    Goaway,
    GoawayCode,
    ProxyVersion,
    ResetCode,
    Role,
)
from qubes_fwd_qrexec.mux.reader import FrameReader
from qubes_fwd_qrexec.mux.wire import FrameType

from .helpers import ORIGIN, feed, take

FLOW_FRAMES = {FrameType.FLOW, FrameType.DATAGRAMS, FrameType.END, FrameType.LOST}
SPEC = (Path(mux.__file__).parent / "SPEC.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```example (\w+) (\{[^\n]*\})\n(.*?)^```$", SPEC, re.MULTILINE | re.DOTALL)


CONVERSATIONS = re.findall(r"^```conversation\n(.*?)^```$", SPEC, re.MULTILINE | re.DOTALL)
NONCES = [
    bytes.fromhex("00112233445566778899aabbccddeeff"),
    bytes.fromhex("ffeeddccbbaa99887766554433221100"),
]


def origin_of(values):
    return Origin(
        ip_address(values["client"]),
        values["client_port"],
        ip_address(values["exposed"]),
        values["exposed_port"],
    )


def encode(frame_type, values):
    stream_id = values.get("stream", values.get("flow", 0))
    match frame_type:
        case FrameType.HELLO:
            return wire.encode_hello(Hello(**(values | {"nonce": bytes.fromhex(values["nonce"])})))
        case FrameType.OPEN:
            proxy = ProxyVersion(values["proxy"])
            first = bytes.fromhex(values.get("first", ""))
            request = wire.OpenRequest(values["credit"], values["port"], origin_of(values), proxy, first)
            return wire.encode_open(stream_id, request)
        case FrameType.ACCEPT:
            return wire.encode_accept(stream_id, values["credit"])
        case FrameType.DATA:
            data = bytes.fromhex(values["data"])
            return wire.data_header(stream_id, len(data)) + data
        case FrameType.RECALL:
            return wire.encode_recall(stream_id, values["keep"])
        case FrameType.RETURN:
            return wire.encode_return(stream_id, values["amount"])
        case FrameType.CREDIT:
            return wire.encode_credit(stream_id, values["increment"])
        case FrameType.EOF:
            return wire.encode_eof(stream_id)
        case FrameType.RESET:
            return wire.encode_reset(stream_id, ResetCode(values["code"]))
        case FrameType.PING:
            return wire.encode_ping(bytes.fromhex(values["payload"]))
        case FrameType.PONG:
            return wire.encode_pong(bytes.fromhex(values["payload"]))
        case FrameType.GOAWAY:
            return wire.encode_goaway(
                Goaway(values["last_id"], GoawayCode(values["code"]), values["is_final"])
            )
        case FrameType.FLOW:
            proxy = ProxyVersion(values["proxy"])
            return wire.encode_flow(stream_id, wire.FlowRequest(values["port"], origin_of(values), proxy))
        case FrameType.DATAGRAMS:
            data = bytes.fromhex(values["data"])
            return wire.datagrams_header(stream_id, values["segment"], len(data)) + data
        case FrameType.END:
            return wire.encode_end(stream_id, FlowCode(values["code"]))
        case FrameType.LOST:
            return wire.encode_lost(values["to_server"], values["to_listener"])


def decode_origin(origin):
    return {
        "client": str(origin.client),
        "client_port": origin.client_port,
        "exposed": str(origin.exposed),
        "exposed_port": origin.exposed_port,
    }


def decode(frame):
    """The values of one frame, as the examples write them."""
    frame_type = FrameType(frame[0])
    is_of_flows = frame_type in FLOW_FRAMES
    reader = FrameReader(wire.FLOW_SHAPES, wire.DATAGRAMS_KIND) if is_of_flows else FrameReader()
    [(number, stream_id, view)] = reader.frames(frame)
    payload = bytes(view)
    assert number == frame_type
    values = {"flow" if is_of_flows else "stream": stream_id} if stream_id else {}
    match frame_type:
        case FrameType.HELLO:
            is_of_datagrams = payload.startswith(wire.MAGIC_OF_DATAGRAMS)
            hello = wire.decode_hello(payload, wire.MAGIC_OF_DATAGRAMS if is_of_datagrams else wire.MAGIC)
            values |= {"window_bytes": hello.window_bytes, "nonce": hello.nonce.hex()}
            if hello.role is Role.TARGET:
                values |= {"max_streams": hello.max_streams, "lease_s": hello.lease_s}
        case FrameType.OPEN:
            credit, port, origin, proxy, first = wire.decode_open(payload)
            values |= {"credit": credit, "port": port, "proxy": proxy} | decode_origin(origin)
            values |= {"first": first.hex()} if first else {}
        case FrameType.ACCEPT:
            values["credit"] = wire.decode_number(payload)
        case FrameType.DATA:
            values["data"] = payload.hex()
        case FrameType.RECALL:
            values["keep"] = wire.decode_number(payload)
        case FrameType.RETURN:
            values["amount"] = wire.decode_number(payload)
        case FrameType.CREDIT:
            values["increment"] = wire.decode_number(payload)
        case FrameType.RESET:
            values["code"] = wire.decode_reset(payload)
        case FrameType.PING | FrameType.PONG:
            values["payload"] = payload.hex()
        case FrameType.GOAWAY:
            goaway = wire.decode_goaway(payload)
            values |= {"last_id": goaway.last_id, "code": goaway.code, "is_final": goaway.is_final}
        case FrameType.FLOW:
            port, origin, proxy = wire.decode_flow(payload)
            values |= {"port": port, "proxy": proxy} | decode_origin(origin)
        case FrameType.DATAGRAMS:
            values["segment"], data = wire.decode_datagrams(memoryview(payload))
            values["data"] = data.hex()
        case FrameType.END:
            values["code"] = wire.decode_end(payload)
        case FrameType.LOST:
            values["to_server"], values["to_listener"] = wire.decode_lost(payload)
    return frame_type, values


@pytest.mark.parametrize(("name", "text", "hexes"), EXAMPLES)
def test_an_example_is_what_the_code_writes_and_reads(name, text, hexes):
    values = json.loads(text)
    frame = bytes.fromhex(hexes)
    assert encode(FrameType[name], values).hex() == frame.hex()
    assert decode(frame) == (FrameType[name], values)


def test_there_is_an_example_of_every_frame():
    assert {name for name, _, _ in EXAMPLES} == set(FrameType.__members__)


@pytest.mark.parametrize("codes", [FrameType, ResetCode, GoawayCode, ProxyVersion, FlowCode])
def test_every_number_and_name_is_in_a_table(codes):
    for code in codes:
        assert re.search(rf"^\| {code.value} \| {code.name} \|", SPEC, re.MULTILINE), code


def test_the_table_says_which_codes_may_drain():
    said = set(re.findall(r"^\| \d+ \| (\w+) \| yes \|", SPEC, re.MULTILINE))
    assert said == {code.name for code in REFUSAL_WHILE_DRAINING}


def test_the_lengths_in_the_table_are_those_that_are_checked():
    rows = re.findall(r"^\| (\d+) \| ([A-Z]+) \| (\d+)(?: to (\d+))?[^|]*\| (0|id) \|", SPEC, re.MULTILINE)
    assert [FrameType[name] for _, name, _, _, _ in rows] == list(FrameType)
    for number, name, least, most, stream in rows:
        shapes = wire.FLOW_SHAPES if FrameType[name] in FLOW_FRAMES else wire.STREAM_SHAPES
        stream_id = 0 if stream == "0" else 7
        kind = int(number) << 8
        for length in (int(least), int(most or least)):
            assert wire.check_header(kind, length, stream_id, shapes) is FrameType[name]


def test_the_other_kinds_frames_are_in_neither_table():
    shared = {FrameType.HELLO, FrameType.PING, FrameType.PONG, FrameType.GOAWAY}
    assert {kind >> 8 for kind in wire.FLOW_SHAPES} == shared | FLOW_FRAMES
    assert {kind >> 8 for kind in wire.STREAM_SHAPES} == set(FrameType) - FLOW_FRAMES


def test_the_numbers_in_the_text_are_the_limits_of_the_code():
    for number in (
        limits.MAX_WINDOW_BYTES,
        limits.MIN_WINDOW_BYTES,
        limits.MIN_CREDIT_BYTES,
        limits.MAX_STREAMS,
        limits.MAX_LEASE_S,
        limits.LAST_STREAM_ID,
        limits.MAX_HELLO_BYTES,
        limits.HEADER_BYTES + limits.MAX_DATA_BYTES,
        limits.CONTROL_BYTES,
        limits.CONTROL_BYTES_PER_STREAM,
        limits.RAPID_RESETS_PER_TICK,
        limits.FLOWS_PER_TICK,
        limits.MAX_DATAGRAM_BYTES,
        limits.MAX_SEGMENTS,
        limits.HEADER_BYTES + limits.SEGMENT_BYTES + limits.MAX_DATAGRAM_BYTES,
        limits.CONTROL_BYTES_PER_FLOW,
    ):
        assert re.search(rf"\b{number}\b", SPEC), number
    assert f"its payload plus {limits.FRAME_COST_BYTES} bytes" in SPEC


def play(conversation, listener, target, acts):
    """Compare each line with what its side writes after its act; returns the events of both ends."""
    lines = [(line[0], bytes.fromhex(line[2:])) for line in conversation.splitlines()]
    events = []
    for (side, expected), act in zip(lines, acts, strict=True):
        act()
        here, there = (listener, target) if side == "L" else (target, listener)
        written = take(here)
        assert written.hex() == expected.hex()
        events += feed(there, written)
    return events


def test_the_conversation_is_what_two_connections_say():
    listener = Connection(Hello(65536, NONCES[0]), range(8080, 8081))
    target = Connection(Hello(65536, NONCES[1], max_streams=100, lease_s=300), range(8080, 8081))
    acts = [
        lambda: None,
        lambda: None,
        lambda: listener.open_stream(8080, ORIGIN, 16384),
        lambda: target.accept_stream(1, 16384),
        lambda: listener.send_data(1, b"hi"),
        lambda: listener.send_eof(1),
        lambda: (target.send_data(1, b"ok"), target.send_eof(1)),
        listener.close,
    ]
    events = play(CONVERSATIONS[0], listener, target, acts)
    assert DataReceived(1, b"hi") in events
    assert events.count(EofReceived(1)) == 2
    target.receive_eof()
    assert listener.open_streams == target.open_streams == 0


def test_the_conversation_of_a_datagram_call_is_what_two_connections_say():
    listener = FlowConnection(Hello(0, NONCES[0]), range(53, 54))
    target = FlowConnection(Hello(0, NONCES[1], max_streams=100, lease_s=300), range(53, 54))
    acts = [
        lambda: None,
        lambda: None,
        lambda: (listener.open_flow(53, ORIGIN), listener.send_datagrams(1, b"ask")),
        lambda: target.send_datagrams(1, b"onetwo", 3),
        lambda: listener.end_flow(1, FlowCode.DONE),
        listener.close,
    ]
    events = play(CONVERSATIONS[1], listener, target, acts)
    assert events.count(DatagramsReceived(1, 0, memoryview(b"ask"))) == 1
    assert events.count(DatagramsReceived(1, 3, memoryview(b"onetwo"))) == 1
    assert FlowEnded(1, FlowCode.DONE) in events
    target.receive_eof()
    assert listener.slots_taken == target.slots_taken == 0
