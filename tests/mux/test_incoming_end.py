# SPDX-License-Identifier: GPL-2.0-or-later
"""The end of what a peer sends: GOAWAY, the end of the bytes, and what comes after the final GOAWAY."""

import pytest

from qubes_fwd_qrexec.common.errors import RemoteProtocolError
from qubes_fwd_qrexec.mux import DataReceived, GoawayReceived, wire
from qubes_fwd_qrexec.mux.messages import Goaway, GoawayCode

from .helpers import data_frame, feed, fresh, goaway_frame, listener_with_stream, ready, target_with_stream


def test_a_goaway_is_an_event_and_a_final_one_ends_every_stream():
    listener = listener_with_stream()
    drain = Goaway(1, GoawayCode.LEASE_OVER, is_final=False)
    final = Goaway(1, GoawayCode.DONE, is_final=True)
    assert feed(listener, wire.encode_goaway(drain)) == [GoawayReceived(drain)]
    assert listener.open_streams == 1
    assert feed(listener, wire.encode_goaway(final)) == [GoawayReceived(final)]
    assert listener.open_streams == 0
    listener.receive_eof()


def test_the_target_side_may_not_have_processed_what_was_opened_last():
    listener = listener_with_stream(is_accepted=False)
    final = Goaway(0, GoawayCode.SHUTDOWN, is_final=True)
    assert feed(listener, wire.encode_goaway(final)) == [GoawayReceived(final)]


@pytest.mark.parametrize("make", [lambda: fresh("listener"), target_with_stream, listener_with_stream])
def test_the_end_of_the_bytes_without_a_final_goaway_is_an_abort(make):
    connection = make()
    with pytest.raises(RemoteProtocolError, match="ended without a final GOAWAY"):
        connection.receive_eof()
    with pytest.raises(RemoteProtocolError, match="ended without a final GOAWAY"):
        connection.receive_data(b"")
    assert connection.is_over
    assert connection.open_streams == 0


def test_the_end_of_the_bytes_in_a_frame_is_an_abort_even_after_the_final_goaway():
    listener = ready("listener")
    feed(listener, goaway_frame(0, GoawayCode.DONE, True) + b"\x08")
    with pytest.raises(RemoteProtocolError, match="ended without"):
        listener.receive_eof()


def test_after_our_final_goaway_all_that_comes_is_dropped():
    listener = listener_with_stream()
    events = listener.receive_data(data_frame(1) + data_frame(1) + b"\xff" * 8)
    assert next(events) == DataReceived(1, b"x")
    listener.close()
    assert list(events) == []
    assert feed(listener, b"\xff" * 8) == []
    listener.receive_eof()


def test_a_wrong_header_after_our_final_goaway_is_dropped_too():
    listener = listener_with_stream()
    events = listener.receive_data(data_frame(1) + b"\xff" * 8)
    next(events)
    listener.close()
    assert list(events) == []
