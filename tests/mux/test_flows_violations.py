# SPDX-License-Identifier: GPL-2.0-or-later
"""Every frame that a peer may not send in a datagram call ends it, with a GOAWAY that says so."""

import pytest

from qubes_fwd_qrexec.common.errors import LocalProtocolError, RemoteProtocolError
from qubes_fwd_qrexec.mux import FlowCode, FlowEnded, LostReported, PongReceived, ProxyVersion, wire
from qubes_fwd_qrexec.mux.messages import GoawayCode

from . import helpers
from .flow_helpers import (
    datagrams,
    datagrams_frame,
    end_frame,
    flow_frame,
    fresh,
    hello,
    listener_with_flow,
    ready,
    target_with_flow,
)
from .helpers import data_frame, feed, goaway_frame, open_frame, raw_frame, refuses, reset_frame, told

STREAM_FRAMES = [
    (open_frame(2), 2),
    (wire.encode_accept(1, 4096), 3),
    (data_frame(1), 4),
    (wire.encode_credit(1, 1024), 5),
    (wire.encode_eof(1), 6),
    (reset_frame(1), 7),
    (wire.encode_recall(1, 2048), 11),
    (wire.encode_return(1, 0), 12),
]
FLOW_FRAMES = [
    (flow_frame(1), 13),
    (datagrams_frame(1), 14),
    (end_frame(1), 15),
    (wire.encode_lost(1, 1), 16),
]


@pytest.mark.parametrize("make", [target_with_flow, listener_with_flow])
@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (raw_frame(0), "unknown frame type 0"),
        (raw_frame(17, payload=b"x"), "unknown frame type 17"),
        (raw_frame(14, 1, b"\0\0x", flags=1), "flags of a frame are 0x01"),
        (raw_frame(15, 1, bytes(4), flags=128), "flags of a frame are 0x80"),
        (raw_frame(14, 1, b""), "DATAGRAMS of 0 bytes"),
        (raw_frame(14, 1, b"\0"), "DATAGRAMS of 1 bytes"),
        (raw_frame(14, 1, bytes(65510)), "DATAGRAMS of 65510 bytes instead of 2 to 65509"),
        (raw_frame(14, 0, b"\0\0x"), "DATAGRAMS on stream 0"),
        (raw_frame(15, 0, bytes(4)), "END on stream 0"),
        (raw_frame(15, 1, bytes(3)), "END of 3 bytes"),
        (datagrams_frame(2), "DATAGRAMS on flow 2, which was never opened"),
        (datagrams_frame(0xFFFF_FFFF), "which was never opened"),
        (end_frame(2), "END on flow 2, which was never opened"),
        (datagrams_frame(1, b"", 1), "0 bytes in segments of 1"),
        (datagrams_frame(1, b"a", 1), "1 bytes in segments of 1"),
        (datagrams_frame(1, b"aa", 2), "2 bytes in segments of 2"),
        (datagrams_frame(1, bytes(65), 1), "65 bytes in segments of 1"),
        (datagrams_frame(1, bytes(1000), 15), "1000 bytes in segments of 15"),
        (datagrams_frame(1, bytes(65507), 65535), "65507 bytes in segments of 65535"),
        (end_frame(1) + datagrams_frame(1, b"aa", 2), "2 bytes in segments of 2"),
        (raw_frame(15, 1, bytes(4)), "unknown END code 0"),
        (raw_frame(15, 1, b"\0\0\0\x01"), "unknown END code 1"),
        (raw_frame(15, 1, b"\0\0\0\x03"), "unknown END code 3"),
        (raw_frame(15, 1, b"\0\0\0\x0b"), "unknown END code 11"),
        (end_frame(1) + raw_frame(15, 1, b"\xff\xff\xff\xff"), "unknown END code 4294967295"),
        (wire.encode_pong(b"12345678"), "a PONG that answers no PING"),
        (wire.encode_ping(b"12345678") * 2, "a PING before the PONG"),
        (goaway_frame(2, GoawayCode.DONE, True), "GOAWAY with the last flow 2"),
        (goaway_frame(1, GoawayCode.SHUTDOWN) * 2, "a second GOAWAY"),
        (
            goaway_frame(1, GoawayCode.SHUTDOWN) + goaway_frame(0, GoawayCode.DONE, True),
            "GOAWAY with the last flow 0",
        ),
        (raw_frame(10, 0, bytes.fromhex("00000001 0001 0001")), "unknown GOAWAY code 1"),
        (goaway_frame(1, GoawayCode.DONE, True) + wire.encode_ping(b"12345678"), "PING after the final"),
        (goaway_frame(1, GoawayCode.DONE, True) + datagrams_frame(1), "DATAGRAMS after the final"),
        (goaway_frame(1, GoawayCode.DONE, True) + end_frame(1), "END after the final"),
        *((frame, f"unknown frame type {number}") for frame, number in STREAM_FRAMES),
    ],
)
def test_what_neither_side_may_send_ends_the_mux(make, data, problem):
    refuses(make(), data, problem)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (flow_frame(1), "FLOW of flow 1 after flow 1"),
        (flow_frame(3), "FLOW of flow 3 after flow 1"),
        (end_frame(1) + flow_frame(1), "FLOW of flow 1 after flow 1"),
        (flow_frame(2, port=22), "FLOW to port 22"),
        (flow_frame(2, port=5299), "FLOW to port 5299"),
        (flow_frame(2, port=5303), "FLOW to port 5303"),
        (flow_frame(2, proxy=ProxyVersion.V1), "PROXY header of version 1"),
        (flow_frame(2)[:-1] + b"\x03", "unknown PROXY version 3"),
        (raw_frame(13, 2, bytes(38)), "FLOW of 38 bytes"),
        (raw_frame(13, 2, bytes(40)), "FLOW of 40 bytes"),
        (raw_frame(13, 0, bytes(39)), "FLOW on stream 0"),
        (wire.encode_lost(0, 0), "LOST from the listener side"),
        (goaway_frame(0, GoawayCode.SHUTDOWN), "GOAWAY with the last flow 0"),
        (goaway_frame(1, GoawayCode.SHUTDOWN) + flow_frame(2), "FLOW after the listener side said GOAWAY"),
    ],
)
def test_what_a_listener_side_may_not_send_ends_the_mux(data, problem):
    refuses(target_with_flow(), data, problem)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (flow_frame(2), "FLOW from the target side"),
        (raw_frame(16, 1, bytes(16)), "LOST on stream 1"),
        (raw_frame(16, 0, bytes(15)), "LOST of 15 bytes"),
        (wire.encode_lost(2, 2) + wire.encode_lost(1, 2), "LOST of 1 and 2 datagrams after"),
        (wire.encode_lost(2, 2) + wire.encode_lost(3, 1), "LOST of 3 and 1 datagrams after"),
    ],
)
def test_what_a_target_side_may_not_send_ends_the_mux(data, problem):
    refuses(listener_with_flow(), data, problem)


@pytest.mark.parametrize(("data", "number"), FLOW_FRAMES)
def test_frames_of_flows_end_a_call_with_streams(data, number):
    refuses(helpers.ready("target"), data, f"unknown frame type {number}")
    refuses(helpers.ready("listener"), data, f"unknown frame type {number}")


def test_flows_past_the_limit_end_the_mux():
    target = ready("target")
    assert len(feed(target, b"".join(map(flow_frame, range(1, 9))))) == 8
    refuses(target, flow_frame(9), "past the limit of 8 flows")


def test_a_flow_that_waits_for_its_end_to_be_written_counts():
    target = ready("target")
    feed(target, b"".join(map(flow_frame, range(1, 9))))
    target.end_flow(1, FlowCode.REFUSED)
    refuses(target, flow_frame(9), "past the limit of 8 flows")


@pytest.mark.parametrize("side", ["listener", "target"])
@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"Welcome to Debian\n", "unknown frame type 87"),
        (raw_frame(1, payload=bytes(40)), "the HELLO begins with"),
        (wire.encode_ping(b"12345678"), "PING before HELLO"),
        (goaway_frame(0, GoawayCode.DONE, True), "GOAWAY before HELLO"),
        (flow_frame(1), "FLOW before HELLO"),
        (datagrams_frame(1), "DATAGRAMS before HELLO"),
        (end_frame(1), "END before HELLO"),
        (wire.encode_lost(1, 1), "LOST before HELLO"),
    ],
)
def test_hello_comes_first(side, data, problem):
    refuses(fresh(side), data, problem)


def test_an_echo_is_not_taken_for_a_peer():
    for side in ("listener", "target"):
        refuses(fresh(side), wire.encode_hello(hello(side)), f"both ends say .* {side} side")


@pytest.mark.parametrize(("side", "peer"), [("listener", "target"), ("target", "listener")])
def test_the_two_kinds_of_call_are_not_mistaken_for_each_other(side, peer):
    of_streams, of_flows = helpers.hello(peer), hello(peer)
    problem = "begins with b'qfwd-mux' instead of b'qfwd-udp'"
    refuses(fresh(side), wire.encode_hello(of_streams), problem)
    problem = "begins with b'qfwd-udp' instead of b'qfwd-mux'"
    refuses(helpers.fresh(side), wire.encode_hello(of_flows), problem)


@pytest.mark.parametrize("window", [1, 2048, 65536])
def test_a_window_in_a_datagram_call_ends_it(window):
    frame = wire.encode_hello(hello("target"))
    frame = frame[:20] + window.to_bytes(4, "big") + frame[24:]
    refuses(
        fresh("listener"), frame, f"the window must be 0 in a datagram call, and only there; it is {window}"
    )


def test_a_second_hello_is_refused():
    refuses(ready("target"), wire.encode_hello(hello("listener")), "a second HELLO")


def test_no_version_in_common_is_a_clear_error():
    peer = wire.encode_hello(hello("target", min_version=3, max_version=9))
    problem = "speaks versions 3 to 9 of the mux protocol, this end 1 to 2"
    refuses(fresh("listener"), peer, problem, GoawayCode.NO_COMMON_VERSION)


def test_a_peer_of_a_later_version_is_understood():
    frame = wire.encode_hello(hello("target", max_version=7))
    listener = fresh("listener")
    [event] = feed(listener, raw_frame(1, 0, frame[8:] + b"something new"))
    assert (event.hello, listener.version) == (hello("target", max_version=7), 2)


def test_a_pong_must_carry_the_pings_payload():
    listener = ready("listener")
    listener.ping(b"12345678")
    assert feed(listener, wire.encode_pong(b"12345678")) == [PongReceived(b"12345678")]
    listener.ping(b"12345678")
    refuses(listener, wire.encode_pong(b"12345679"), "a PONG that answers no PING")


@pytest.mark.parametrize("make", [target_with_flow, listener_with_flow])
def test_frames_on_a_flow_that_is_over_are_dropped(make):
    connection = make()
    assert feed(connection, end_frame(1, FlowCode.SHUTDOWN)) == [FlowEnded(1, FlowCode.SHUTDOWN)]
    late = datagrams_frame(1, b"aabbc", 2) + end_frame(1) + datagrams_frame(1)
    assert feed(connection, late) == []
    assert connection.late_datagrams == 4
    assert connection.bytes_queued == 0
    assert connection.is_ready


def test_what_was_lost_is_an_event_when_it_grew():
    listener = ready("listener")
    lost = wire.encode_lost(0, 0) + wire.encode_lost(2, 0) + wire.encode_lost(2, 0) + wire.encode_lost(2, 3)
    assert feed(listener, lost) == [LostReported(2, 0), LostReported(2, 3)]


def test_what_the_caller_does_for_one_event_counts_for_the_next():
    target = target_with_flow()
    seen = []
    for event in told(target.receive_data(datagrams_frame(1, b"first") + datagrams_frame(1, b"second"))):
        seen.append(event)
        target.end_flow(1, FlowCode.REFUSED)
    assert seen == [datagrams(1, b"first")]
    assert target.late_datagrams == 1


def test_events_before_a_violation_are_returned():
    events = target_with_flow().receive_data(datagrams_frame(1) + b"\xff" * 8)
    assert next(events) == datagrams(1)
    with pytest.raises(RemoteProtocolError, match="unknown frame type 255"):
        next(events)


def test_events_that_were_not_taken_are_a_bug_of_the_caller():
    target = target_with_flow()
    target.receive_data(datagrams_frame(1))
    with pytest.raises(LocalProtocolError, match="not all taken"):
        target.receive_data(datagrams_frame(1))
