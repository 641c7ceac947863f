# SPDX-License-Identifier: GPL-2.0-or-later
"""The end of a mux call: what it does to streams that are over by then, and what cannot put it off."""

import select
import socket
import time

import pytest
from helpers import BOUND_S
from mux_peer import PeerBench

from qubes_fwd_qrexec.mux import GoawayCode, Role
from qubes_fwd_qrexec.relay.copy import half_close


def read_all(bench: PeerBench, sock: socket.socket) -> tuple[int, str]:
    """How much comes until the end, and what end that is; no time passes for the loop meanwhile."""
    received = 0
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    deadline = time.monotonic() + BOUND_S
    while time.monotonic() < deadline:
        bench.turn()
        select.select([sock], [], [], 0.01)
        try:
            count = len(sock.recv(65536))
        except BlockingIOError:
            continue
        except ConnectionResetError:
            return received, "RST"
        if not count:
            return received, "EOF"
        received += count
    return received, "nothing"


def ended_both_ways(bench: PeerBench) -> tuple[socket.socket, int]:
    """A stream of which both ends have sent all they had, though the local peer has not taken it yet."""
    stream_id = bench.open()
    sock = bench.socks[stream_id]
    half_close(sock)
    sent = 0
    while bench.mux.legs[stream_id].pending is None:
        while limit := bench.peer.send_limit(stream_id):
            bench.peer.send_data(stream_id, bytes(limit))
            sent += limit
        bench.exchange()
    bench.peer.send_eof(stream_id)
    bench.exchange()
    assert bench.peer.open_streams == 0
    assert stream_id in bench.mux.legs
    return sock, sent


@pytest.mark.parametrize("role", Role)
def test_a_slow_peer_gets_the_rest_of_a_stream_that_ended_well_before_its_call(role: Role) -> None:
    with PeerBench(role) as bench:
        sock, sent = ended_both_ways(bench)
        bench.peer.close(GoawayCode.DONE)
        bench.exchange()
        assert bench.owner.is_over
        bench.clock.advance(5.0)
        bench.turn(5)
        assert read_all(bench, sock) == (sent, "EOF")
        assert not bench.mux.legs


@pytest.mark.parametrize("role", Role)
def test_a_peer_that_takes_nothing_is_not_waited_for_for_ever(role: Role) -> None:
    with PeerBench(role) as bench:
        sock, sent = ended_both_ways(bench)
        bench.peer.close(GoawayCode.DONE)
        bench.exchange()
        bench.clock.advance(61.0)
        bench.turn(5)
        assert not bench.mux.legs
        received, end = read_all(bench, sock)
        assert (received < sent, end) == (True, "RST")


@pytest.mark.parametrize("code", [GoawayCode.REVOKED, GoawayCode.LEASE_OVER])
def test_what_dom0_ends_is_cut_all_the_same(code: GoawayCode) -> None:
    for role in Role:
        with PeerBench(role) as bench:
            sock, _ = ended_both_ways(bench)
            bench.peer.close(GoawayCode.DONE)
            bench.exchange()
            bench.mux.close(code)
            bench.clock.advance(1.0)
            bench.turn(5)
            assert not bench.mux.legs
            assert read_all(bench, sock)[1] == "RST"


def test_a_target_that_answers_no_reset_holds_no_call_that_drains() -> None:
    with PeerBench(Role.LISTENER) as bench:
        stream_id = bench.open()
        bench.mux.legs[stream_id].abort_from_here()
        bench.mux.drain(GoawayCode.SHUTDOWN)
        bench.turn(5)
        assert bench.mux.connection.open_streams == 0
        bench.hear()
        assert bench.peer.is_over
        bench.clock.advance(2.0)
        bench.turn(5)
        assert bench.owner.is_over
        assert bench.owner.problem is None
