# SPDX-License-Identifier: GPL-2.0-or-later
"""Every frame that a peer may not send ends the mux, with a GOAWAY that says so."""

import pytest

from qubes_fwd_qrexec.common.errors import LocalProtocolError, RemoteProtocolError
from qubes_fwd_qrexec.mux import CreditReceived, DataReceived, EofReceived, PongReceived, ResetReceived, wire
from qubes_fwd_qrexec.mux.messages import GoawayCode, ResetCode

from .helpers import (
    CREDIT,
    WINDOW,
    data_frame,
    feed,
    goaway_frame,
    listener_with_stream,
    open_frame,
    raw_frame,
    ready,
    refuses,
    reset_frame,
    take,
    target_with_stream,
    told,
)

EOF = wire.encode_eof(1)
ACCEPT = wire.encode_accept(1, CREDIT)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (raw_frame(0), "unknown frame type 0"),
        (raw_frame(13, payload=b"x"), "unknown frame type 13"),
        (raw_frame(4, 1, b"x", flags=1), "flags"),
        (raw_frame(4, 1, b""), "DATA of 0 bytes"),
        (raw_frame(4, 1, bytes(32769)), "DATA of 32769 bytes"),
        (raw_frame(6, 0), "EOF on stream 0"),
        (open_frame(3), "OPEN of stream 3 after stream 1"),
        (open_frame(1), "OPEN of stream 1 after stream 1"),
        (open_frame(2, port=22), "OPEN to port 22"),
        (open_frame(2, port=8083), "OPEN to port 8083"),
        (open_frame(2, credit=1), "initial credit of 1 "),
        (open_frame(2, credit=2047), "initial credit of 2047 "),
        (open_frame(2, credit=WINDOW + 1), "initial credit of 65537 "),
        (open_frame(2)[:-1] + b"\x03", "unknown PROXY version 3"),
        (ACCEPT, "ACCEPT from the listener side"),
        (data_frame(2), "DATA on stream 2, which was never opened"),
        (wire.encode_credit(2, 1024), "CREDIT on stream 2, which was never opened"),
        (reset_frame(2), "RESET on stream 2, which was never opened"),
        (wire.encode_credit(1, 0), "CREDIT of 0 bytes"),
        (wire.encode_credit(1, 1023), "CREDIT of 1023 bytes"),
        (wire.encode_credit(1, WINDOW - CREDIT + 1), "past the window"),
        (data_frame(1, bytes(CREDIT - 63)), "DATA goes 1 bytes past the credit"),
        (EOF + data_frame(1), "DATA came on a stream"),
        (EOF + EOF, "EOF came on a stream"),
        (reset_frame(1) + data_frame(1), "DATA came on a stream"),
        (reset_frame(1) + reset_frame(1), "RESET came on a stream"),
        (raw_frame(7, 1, bytes(4)), "unknown RESET code 0"),
        (wire.encode_pong(b"12345678"), "a PONG that answers no PING"),
        (wire.encode_ping(b"12345678") * 2, "a PING before the PONG"),
        (goaway_frame(0, GoawayCode.SHUTDOWN), "GOAWAY with the last stream 0"),
        (goaway_frame(2, GoawayCode.DONE, True), "GOAWAY with the last stream 2"),
        (goaway_frame(1, GoawayCode.SHUTDOWN) + open_frame(2), "OPEN after the listener side said GOAWAY"),
        (goaway_frame(1, GoawayCode.SHUTDOWN) * 2, "a second GOAWAY"),
        (raw_frame(10, 0, bytes.fromhex("00000001 0001 0001")), "unknown GOAWAY code 1"),
        (goaway_frame(1, GoawayCode.DONE, True) + wire.encode_ping(b"12345678"), "PING after the final"),
        (goaway_frame(1, GoawayCode.DONE, True) + data_frame(1), "DATA after the final"),
    ],
)
def test_what_a_listener_side_may_not_send_ends_the_mux(data, problem):
    refuses(target_with_stream(), data, problem)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (data_frame(1), "DATA came on a stream that is PENDING"),
        (wire.encode_credit(1, 1024), "CREDIT came on a stream that is PENDING"),
        (EOF, "EOF came on a stream that is PENDING"),
    ],
)
def test_nothing_but_a_reset_comes_before_accept(data, problem):
    refuses(target_with_stream(is_accepted=False), data, problem)
    refuses(listener_with_stream(is_accepted=False), data, problem)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (open_frame(2), "OPEN from the target side"),
        (ACCEPT, "ACCEPT came on a stream"),
        (wire.encode_accept(2, CREDIT), "ACCEPT on stream 2, which was never opened"),
        (goaway_frame(2, GoawayCode.LEASE_OVER), "GOAWAY with the last stream 2"),
        (
            goaway_frame(1, GoawayCode.LEASE_OVER) + goaway_frame(0, GoawayCode.DONE, True),
            "GOAWAY with the last stream 0",
        ),
    ],
)
def test_what_a_target_side_may_not_send_ends_the_mux(data, problem):
    refuses(listener_with_stream(), data, problem)


def test_an_accept_with_a_credit_that_cannot_be_is_refused():
    refuses(listener_with_stream(is_accepted=False), wire.encode_accept(1, 5), "initial credit of 5 ")


def test_streams_past_the_limit_end_the_mux():
    target = ready("target")
    opens = b"".join(map(open_frame, range(1, 9)))
    assert len(feed(target, opens)) == 8
    refuses(target, open_frame(9), "past the limit of 8 streams")


def test_more_opens_after_our_goaway_than_can_have_crossed_it_end_the_mux():
    target = ready("target")
    target.drain(GoawayCode.SHUTDOWN)
    for stream_id in range(1, 9):
        assert feed(target, open_frame(stream_id)) == []
        assert feed(target, reset_frame(stream_id)) == []
    refuses(target, open_frame(9), "OPEN after GOAWAY was seen")


def test_a_peer_that_sends_and_never_reads_ends_the_mux():
    target = ready("target")
    bound = target.control_bound_bytes
    for stream_id in range(1, bound // 12 + 2):
        assert target.bytes_queued <= bound
        feed(target, open_frame(stream_id) + reset_frame(stream_id))
        target.reset_stream(stream_id)
        target.tick()
    refuses(target, data_frame(1), "sends and does not read")


@pytest.mark.parametrize("frame", [data_frame(1), EOF, ACCEPT])
def test_nothing_but_credit_and_reset_comes_for_a_stream_that_is_over(frame):
    listener = listener_with_stream()
    listener.send_eof(1)
    assert feed(listener, EOF) == [EofReceived(1)]
    refuses(listener, frame, "on stream 1, which is over")


def test_the_checks_go_on_while_what_comes_is_dropped():
    listener = listener_with_stream(is_accepted=False)
    listener.reset_stream(1)
    crossed = ACCEPT + data_frame(1, b"dropped") + wire.encode_credit(1, 2048) + EOF
    assert feed(listener, crossed) == []
    refuses(listener, data_frame(1), "DATA came on a stream")
    listener = listener_with_stream()
    listener.reset_stream(1)
    refuses(listener, data_frame(1, bytes(CREDIT)), "past the credit")


def test_a_stream_that_said_eof_and_reset_is_over_with_the_peers_eof():
    listener = listener_with_stream()
    listener.send_eof(1)
    listener.reset_stream(1)
    assert listener.open_streams == 1
    assert feed(listener, EOF) == []
    assert listener.open_streams == 0


def test_a_stream_that_said_reset_alone_waits_for_the_answer_also_after_eof():
    listener = listener_with_stream()
    listener.reset_stream(1)
    assert feed(listener, EOF) == []
    assert listener.open_streams == 1
    assert feed(listener, reset_frame(1)) == []
    assert listener.open_streams == 0


def test_credit_after_our_eof_is_taken_without_an_event():
    listener = listener_with_stream()
    assert feed(listener, wire.encode_credit(1, 2048)) == [CreditReceived(1)]
    listener.send_eof(1)
    assert feed(listener, wire.encode_credit(1, 2048)) == []


def test_a_reset_after_eof_is_an_event():
    target = target_with_stream()
    events = feed(target, EOF + reset_frame(1, ResetCode.SHUTDOWN))
    assert events == [EofReceived(1), ResetReceived(1, ResetCode.SHUTDOWN)]


def test_a_pong_must_carry_the_pings_payload():
    listener = ready("listener")
    listener.ping(b"12345678")
    assert feed(listener, wire.encode_pong(b"12345678")) == [PongReceived(b"12345678")]
    listener.ping(b"12345678")
    refuses(listener, wire.encode_pong(b"12345679"), "a PONG that answers no PING")


def test_a_ping_is_answered_and_no_event():
    target = ready("target")
    for _ in range(3):
        assert feed(target, wire.encode_ping(b"12345678")) == []
        assert take(target) == wire.encode_pong(b"12345678")


def test_what_crossed_the_last_eof_is_dropped_once():
    target = target_with_stream()
    assert feed(target, EOF) == [EofReceived(1)]
    target.send_eof(1)
    assert feed(target, wire.encode_credit(1, 2048) + reset_frame(1)) == []
    refuses(target, reset_frame(1), "RESET on stream 1, which is over")


def test_resets_that_cross_end_the_stream_without_an_event():
    target = target_with_stream()
    target.reset_stream(1)
    assert feed(target, reset_frame(1)) == []
    assert target.open_streams == 0


def test_a_refusal_has_its_reason():
    listener = listener_with_stream(is_accepted=False)
    assert feed(listener, reset_frame(1, ResetCode.TIMEOUT)) == [ResetReceived(1, ResetCode.TIMEOUT)]
    assert listener.open_streams == 1


def test_what_the_caller_does_for_one_event_counts_for_the_next():
    target = target_with_stream()
    seen = []
    for event in told(target.receive_data(data_frame(1, b"first") + data_frame(1, b"second"))):
        seen.append(event)
        target.reset_stream(1)
    assert seen == [DataReceived(1, b"first")]


def test_events_before_a_violation_are_returned():
    target = target_with_stream()
    events = target.receive_data(data_frame(1) + b"\xff" * 8)
    assert next(events) == DataReceived(1, b"x")
    with pytest.raises(RemoteProtocolError, match="unknown frame type 255"):
        next(events)


def test_events_that_were_not_taken_are_a_bug_of_the_caller():
    target = target_with_stream()
    target.receive_data(data_frame(1))
    with pytest.raises(LocalProtocolError, match="not all taken"):
        target.receive_data(data_frame(1))


def test_an_empty_chunk_is_nothing():
    assert feed(ready("target"), b"") == []
