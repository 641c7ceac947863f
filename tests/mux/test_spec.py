# SPDX-License-Identifier: GPL-2.0-or-later
"""The examples and tables of SPEC.md against the code, both ways."""

import json
import re
from ipaddress import ip_address
from pathlib import Path

import pytest

from qubes_fwd_qrexec import mux
from qubes_fwd_qrexec.mux import Connection, DataReceived, EofReceived, Hello, Origin, limits, wire
from qubes_fwd_qrexec.mux.messages import (
    REFUSAL_WHILE_DRAINING,
    Goaway,
    GoawayCode,
    ProxyVersion,
    ResetCode,
    Role,
)
from qubes_fwd_qrexec.mux.reader import FrameReader
from qubes_fwd_qrexec.mux.wire import FrameType

from .helpers import ORIGIN, feed, take

SPEC = (Path(mux.__file__).parent / "SPEC.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```example (\w+) (\{[^\n]*\})\n(.*?)^```$", SPEC, re.MULTILINE | re.DOTALL)


def encode(frame_type, values):
    stream_id = values.get("stream", 0)
    match frame_type:
        case FrameType.HELLO:
            return wire.encode_hello(Hello(**(values | {"nonce": bytes.fromhex(values["nonce"])})))
        case FrameType.OPEN:
            origin = Origin(
                ip_address(values["client"]),
                values["client_port"],
                ip_address(values["exposed"]),
                values["exposed_port"],
            )
            proxy = ProxyVersion(values["proxy"])
            request = wire.OpenRequest(values["credit"], values["port"], origin, proxy)
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


def decode(frame):
    """The values of one frame, as the examples write them."""
    [(number, stream_id, payload)] = FrameReader().frames(frame)
    frame_type = FrameType(number)
    values = {"stream": stream_id} if stream_id else {}
    match frame_type:
        case FrameType.HELLO:
            hello = wire.decode_hello(payload)
            values |= {"window_bytes": hello.window_bytes, "nonce": hello.nonce.hex()}
            if hello.role is Role.TARGET:
                values |= {"max_streams": hello.max_streams, "lease_s": hello.lease_s}
        case FrameType.OPEN:
            credit, port, origin, proxy = wire.decode_open(payload)
            values |= {"credit": credit, "port": port}
            values |= {"client": str(origin.client), "client_port": origin.client_port}
            values |= {"exposed": str(origin.exposed), "exposed_port": origin.exposed_port}
            values["proxy"] = proxy
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
    return frame_type, values


@pytest.mark.parametrize(("name", "text", "hexes"), EXAMPLES)
def test_an_example_is_what_the_code_writes_and_reads(name, text, hexes):
    values = json.loads(text)
    frame = bytes.fromhex(hexes)
    assert encode(FrameType[name], values).hex() == frame.hex()
    assert decode(frame) == (FrameType[name], values)


def test_there_is_an_example_of_every_frame():
    assert {name for name, _, _ in EXAMPLES} == set(FrameType.__members__)


@pytest.mark.parametrize("codes", [FrameType, ResetCode, GoawayCode, ProxyVersion])
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
        stream_id = 0 if stream == "0" else 7
        kind = int(number) << 8
        for length in (int(least), int(most or least)):
            assert wire.check_header(kind, length, stream_id) is FrameType[name]


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
    ):
        assert re.search(rf"\b{number}\b", SPEC), number
    assert f"its payload plus {limits.FRAME_COST_BYTES} bytes" in SPEC


def test_the_conversation_is_what_two_connections_say():
    text = re.search(r"^```conversation\n(.*?)^```$", SPEC, re.MULTILINE | re.DOTALL).group(1)
    lines = [(line[0], bytes.fromhex(line[2:])) for line in text.splitlines()]
    nonces = [
        bytes.fromhex("00112233445566778899aabbccddeeff"),
        bytes.fromhex("ffeeddccbbaa99887766554433221100"),
    ]
    listener = Connection(Hello(65536, nonces[0]), range(8080, 8081))
    target = Connection(Hello(65536, nonces[1], max_streams=100, lease_s=300), range(8080, 8081))
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
    events = []
    for (side, expected), act in zip(lines, acts, strict=True):
        act()
        here, there = (listener, target) if side == "L" else (target, listener)
        written = take(here)
        assert written.hex() == expected.hex()
        events += feed(there, written)
    assert DataReceived(1, b"hi") in events
    assert events.count(EofReceived(1)) == 2
    target.receive_eof()
    assert listener.open_streams == target.open_streams == 0
