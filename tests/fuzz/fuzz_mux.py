# SPDX-License-Identifier: GPL-2.0-or-later
"""Fuzz one end of a mux with a peer's bytes, guided by coverage. Not part of pytest; needs atheris.

    python tests/fuzz/fuzz_mux.py SECONDS [libFuzzer options, corpus folders]

The first bytes of an input say which end of which kind of call is fuzzed, whether the peer's HELLO is given,
how the caller answers events, and whether the rest is the bytes themselves or a recipe for frames with right
headers, which chance alone hardly finds. Whatever comes: events or RemoteProtocolError, never more held than
was granted, never more flows than slots, and the same events when the same bytes come one by one. Exit status
0: nothing was found.
"""

import sys
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

with atheris.instrument_imports(include=["qubes_fwd_qrexec"]):
    from qubes_fwd_qrexec.common.errors import RemoteProtocolError
    from qubes_fwd_qrexec.mux import (
        Connection,
        DatagramsReceived,
        DataReceived,
        FlowCode,
        FlowConnection,
        FlowRequested,
        Hello,
        HelloReceived,
        OpenReceived,
        Origin,
        ProxyVersion,
        ResetReceived,
        Role,
        wire,
    )
    from qubes_fwd_qrexec.mux.messages import GoawayCode

PORTS = range(8080, 8083)
WINDOW = 8192
MAX_STREAMS = 4
HELLOS = (Hello(WINDOW, b"l" * 16), Hello(WINDOW, b"t" * 16, max_streams=MAX_STREAMS, lease_s=300))
FLOW_HELLOS = (Hello(0, b"l" * 16), Hello(0, b"t" * 16, max_streams=MAX_STREAMS, lease_s=300))
ORIGIN = Origin(ip_address("192.0.2.1"), 40000, ip_address("2001:db8::1"), 80)


class Caller:
    """An end whose caller answers events in a way that the input chose."""

    def __init__(self, connection: Any, habits: int) -> None:
        self.connection = connection
        self.habits = habits
        self.events: list[object] = []

    def feed(self, chunk: bytes) -> str | None:
        """The text of the peer's fault, if this was one."""
        try:
            for event in self.connection.receive_data(chunk):
                self.events.append(event)
                self.answer(event)
                self.check()
                if self.habits & 32 and len(self.events) == 6:
                    self.connection.drain(GoawayCode.LEASE_OVER)
                if self.habits & 64 and len(self.events) == 9:
                    self.connection.close()
        except RemoteProtocolError as error:
            return str(error)
        return None

    def answer(self, event: object) -> None:
        raise NotImplementedError

    def check(self) -> None:
        raise NotImplementedError


class StreamCaller(Caller):
    def __init__(self, side: int, habits: int) -> None:
        super().__init__(Connection(HELLOS[side], PORTS), habits)

    def check(self) -> None:
        if self.connection.granted_bytes < 0:
            raise RuntimeError("more came than was granted")

    def answer(self, event: object) -> None:
        connection, habits = self.connection, self.habits
        if isinstance(event, HelloReceived) and connection.open_room:
            for credit in (WINDOW, 2048, 0):
                connection.open_stream(8081, ORIGIN, credit)
            if habits & 1:
                connection.reset_stream(2)
        elif isinstance(event, OpenReceived):
            if habits & 2 and event.stream_id % 2:
                connection.reset_stream(event.stream_id)
            else:
                connection.accept_stream(event.stream_id, 2048 if habits & 4 else WINDOW)
        elif isinstance(event, DataReceived):
            if habits & 8:
                connection.grant(event.stream_id, event.cost)
            else:
                connection.recall(event.stream_id, 2048)
            limit = connection.send_limit(event.stream_id)
            if limit:
                connection.send_data(event.stream_id, event.data[:limit])
                if habits & 16:
                    connection.send_eof(event.stream_id)
        elif isinstance(event, ResetReceived):
            connection.reset_stream(event.stream_id)


class FlowCaller(Caller):
    def __init__(self, side: int, habits: int) -> None:
        super().__init__(FlowConnection(FLOW_HELLOS[side], PORTS), habits)

    def check(self) -> None:
        if self.connection.slots_taken > MAX_STREAMS:
            raise RuntimeError("there are more flows than slots")

    def answer(self, event: object) -> None:
        connection, habits = self.connection, self.habits
        if isinstance(event, HelloReceived) and connection.open_room:
            for proxy in (ProxyVersion.OFF, ProxyVersion.V2, ProxyVersion.OFF):
                connection.open_flow(8081, ORIGIN, proxy)
            if habits & 1:
                connection.end_flow(2, FlowCode.DONE)
        elif isinstance(event, FlowRequested):
            if habits & 2 and event.flow_id % 2:
                connection.end_flow(event.flow_id, FlowCode.REFUSED)
        elif isinstance(event, DatagramsReceived):
            connection.send_datagrams(event.flow_id, bytes(event.data), event.segment)
            if habits & 4 and connection.role is Role.TARGET:
                connection.report_lost(len(self.events), 0)
            if habits & 16:
                connection.end_flow(event.flow_id, FlowCode.DONE)
        if habits & 8:
            connection.tick()


LENGTHS = {1: 40, 2: 43, 3: 4, 5: 4, 6: 0, 7: 4, 8: 8, 9: 8, 10: 8, 11: 4, 12: 4, 13: 39, 15: 4, 16: 16}


def framed(recipe: bytes) -> bytes:
    """Frames with the type, stream and length that a byte each asks for. Payloads are the bytes that follow,
    filled up on the left for numbers, so that small ones are likely; OPEN and FLOW are right but for their
    first byte."""
    frames = bytearray()
    while len(recipe) >= 3:
        kind, stream_id, size = recipe[0] % 17, recipe[1] % 8, recipe[2]
        length = LENGTHS.get(kind, size % 48 + 1 if size < 240 else size * 8)
        taken = min(length, size % 5)
        untrusted_payload = recipe[3 : 3 + taken].rjust(length, b"\0")
        if kind == 2 and size < 240:
            credit = (0, 2048, WINDOW, 77)[size % 4]
            proxy, first = ProxyVersion(size // 4 % 3), recipe[3 : 3 + taken]
            request = wire.OpenRequest(credit, 8080 + size % 3, ORIGIN, proxy, first)
            untrusted_payload = wire.encode_open(1, request)[8:]
        elif kind == 13 and size < 240:
            flow = wire.FlowRequest(8080 + size % 3, ORIGIN, ProxyVersion(size // 4 % 3))
            untrusted_payload = wire.encode_flow(1, flow)[8:]
        elif kind == 14 and size < 240 and length > 2:
            untrusted_payload = bytes([0, size % 8]) + untrusted_payload[2:]
        elif kind in (3, 5, 11, 12) and size < 240:
            untrusted_payload = (2048 * (size % 4)).to_bytes(4, "big")
        if kind in (1, 8, 9, 10, 16):
            stream_id = 0
        frames += bytes([kind, 0]) + length.to_bytes(2, "big") + stream_id.to_bytes(4, "big")
        frames += untrusted_payload
        recipe = recipe[3 + taken :]
    return bytes(frames)


def test_one_input(data: bytes) -> None:
    if len(data) < 2:
        return
    side, has_hello, is_of_flows, habits, rest = data[0] & 1, data[0] & 2, data[0] & 4, data[1], data[2:]
    if habits & 128:
        rest = framed(rest)
    if has_hello:
        rest = wire.encode_hello((FLOW_HELLOS if is_of_flows else HELLOS)[1 - side]) + rest
    make = FlowCaller if is_of_flows else StreamCaller
    whole, bytewise = make(side, habits), make(side, habits)
    problem = whole.feed(rest)
    again = None
    for number in rest:
        again = bytewise.feed(bytes([number]))
        if again is not None:
            break
    if (whole.events, problem) != (bytewise.events, again):
        raise RuntimeError("the same bytes one by one are something else")
    if b"".join(whole.connection.data_to_send()) != b"".join(bytewise.connection.data_to_send()):
        raise RuntimeError("the same bytes one by one are answered otherwise")
    if problem is not None and whole.connection.slots_taken:
        raise RuntimeError("a mux that failed holds something")
    if problem is not None and not is_of_flows and whole.connection.granted_bytes:
        raise RuntimeError("a mux that failed has granted something")


def main() -> None:
    if len(sys.argv) < 2 or not sys.argv[1].isascii() or not sys.argv[1].isdigit():
        sys.exit(f"usage: {sys.argv[0]} SECONDS [libFuzzer options, corpus folders]")
    options = [f"-max_total_time={sys.argv[1]}", "-timeout=5", "-max_len=4096", *sys.argv[2:]]
    atheris.Setup([sys.argv[0], *options], test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
