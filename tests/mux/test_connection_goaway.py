# SPDX-License-Identifier: GPL-2.0-or-later
"""The end of a connection: the lease, the final GOAWAY, and ids that are used up."""

import pytest

from qubes_fwd_qrexec.common.errors import LocalProtocolError, RemoteProtocolError
from qubes_fwd_qrexec.mux import AcceptReceived, DataReceived, EofReceived, GoawayReceived, ResetReceived
from qubes_fwd_qrexec.mux.limits import LAST_STREAM_ID
from qubes_fwd_qrexec.mux.messages import Goaway, GoawayCode, ResetCode
from qubes_fwd_qrexec.mux.wire import encode_accept, encode_goaway

from .helpers import CREDIT, ORIGIN, Pair


def test_the_lease_ends_new_streams_and_lets_live_ones_go_on():
    pair = Pair()
    pair.open()
    pair.target.drain(GoawayCode.LEASE_OVER)
    pair.target.drain(GoawayCode.SHUTDOWN)
    assert pair.settle()[0] == [GoawayReceived(Goaway(1, GoawayCode.LEASE_OVER, is_final=False))]
    assert pair.listener.open_room == 0
    assert pair.listener.is_draining
    pair.listener.send_data(1, b"still here")
    pair.listener.send_eof(1)
    assert pair.settle()[1] == [DataReceived(1, b"still here"), EofReceived(1)]
    assert not pair.target.is_drained
    pair.target.send_eof(1)
    pair.settle()
    assert pair.target.is_drained
    assert pair.listener.is_drained
    pair.target.close()
    assert pair.settle()[0] == [GoawayReceived(Goaway(1, GoawayCode.DONE, is_final=True))]
    pair.listener.receive_eof()


def test_an_open_that_crossed_the_lease_is_refused_without_a_word_to_the_caller():
    pair = Pair()
    pair.open()
    pair.target.drain(GoawayCode.LEASE_OVER)
    pair.listener.open_stream(8080, ORIGIN, CREDIT)
    at_listener, at_target = pair.settle()
    assert at_target == []
    assert at_listener == [
        GoawayReceived(Goaway(1, GoawayCode.LEASE_OVER, is_final=False)),
        ResetReceived(2, ResetCode.LEASE_OVER),
    ]
    pair.listener.reset_stream(2)
    pair.settle()
    assert pair.target.open_streams == 1


def test_a_stream_that_was_asked_for_before_the_lease_ended_may_still_be_accepted():
    pair = Pair()
    pair.listener.open_stream(8080, ORIGIN, CREDIT)
    pair.settle()
    pair.target.drain(GoawayCode.LEASE_OVER)
    pair.target.accept_stream(1, CREDIT)
    assert pair.settle()[0][1] == AcceptReceived(1)


def test_a_drain_needs_a_code_that_lets_streams_go_on():
    with pytest.raises(LocalProtocolError, match="DONE cannot begin a drain"):
        Pair().target.drain(GoawayCode.DONE)


def test_the_final_goaway_drops_all_streams_at_both_ends():
    pair = Pair()
    pair.open()
    pair.target.close(GoawayCode.REVOKED)
    pair.target.close()
    pair.target.drain(GoawayCode.LEASE_OVER)
    assert pair.target.open_streams == pair.target.granted_bytes == 0
    assert pair.target.is_over
    pair.listener.send_data(1, b"crossed")
    assert pair.settle() == ([GoawayReceived(Goaway(1, GoawayCode.REVOKED, is_final=True))], [])
    assert pair.listener.open_streams == pair.listener.granted_bytes == 0
    assert pair.listener.is_over
    assert not pair.listener.is_ready
    assert pair.listener.open_room == 0


def test_ids_are_used_up_once_and_for_all():
    pair = Pair()
    pair.listener._last_id = pair.target._last_id = LAST_STREAM_ID - 1
    assert pair.listener.open_room == 1
    assert not pair.listener.are_ids_used_up
    assert pair.open() == LAST_STREAM_ID
    assert pair.listener.are_ids_used_up
    assert pair.listener.open_room == 0
    pair.listener.drain(GoawayCode.IDS_USED_UP)
    goaway = Goaway(LAST_STREAM_ID, GoawayCode.IDS_USED_UP, is_final=False)
    assert pair.settle()[1] == [GoawayReceived(goaway)]


@pytest.mark.parametrize("is_final", [False, True])
def test_a_last_stream_below_one_that_was_accepted_ends_the_mux(is_final: bool):
    """What was processed would be asked for again elsewhere, and its bytes come without their beginning."""
    pair = Pair()
    pair.open()
    pair.open()
    pair.listener.open_stream(8080, ORIGIN, CREDIT)
    code = GoawayCode.SHUTDOWN
    with pytest.raises(RemoteProtocolError, match="GOAWAY with the last stream 1, which is impossible"):
        list(pair.listener.receive_data(encode_goaway(Goaway(1, code, is_final))))


def test_an_accept_of_a_stream_that_a_goaway_left_out_ends_the_mux():
    pair = Pair()
    pair.open()
    pair.listener.open_stream(8080, ORIGIN, CREDIT)
    goaway = encode_goaway(Goaway(1, GoawayCode.LEASE_OVER, is_final=False))
    with pytest.raises(RemoteProtocolError, match="ACCEPT of stream 2 after a GOAWAY that left it out"):
        list(pair.listener.receive_data(goaway + encode_accept(2, CREDIT)))
