# SPDX-License-Identifier: GPL-2.0-or-later
"""One stream between two real connections: bytes, stalls, and while it is only asked for."""

import errno
import socket

import pytest
from endings import MIB
from helpers import tcp_pair, unix_pair
from mux_bench import Joined, MuxBench, pending_bytes

from qubes_fwd_qrexec.mux import ResetCode
from qubes_fwd_qrexec.relay import leg as leg_module
from qubes_fwd_qrexec.relay.budget import WINDOW_MAX_BYTES, Budget
from qubes_fwd_qrexec.relay.copy import abort, half_close
from qubes_fwd_qrexec.relay.leg_end import LegEnd

# Bytes


def test_bytes_go_both_ways(bench: MuxBench, stream: Joined) -> None:
    stream.client.send(b"request")
    assert bench.read(stream.server, 7) == b"request"
    stream.server.send(b"answer")
    assert bench.read(stream.client, 6) == b"answer"
    assert (stream.near.sent, stream.near.received) == (7, 6)
    assert (stream.far.sent, stream.far.received) == (6, 7)


# While the stream is only asked for


def test_a_client_that_leaves_before_accept_resets_the_stream(bench: MuxBench) -> None:
    client, leg = bench.open()
    bench.until(lambda: bench.far_owner.requested)
    abort(client)
    bench.until(lambda: bench.far_owner.abandoned)
    assert leg.ended is LegEnd.LOCAL_RESET
    bench.until(lambda: not bench.near.connection.open_streams)
    assert bench.far.connection.open_streams == 0


def test_nothing_is_read_from_a_client_before_the_stream_is_accepted(bench: MuxBench) -> None:
    client, leg = bench.open()
    client.send(b"early")
    half_close(client)
    bench.until(lambda: bench.far_owner.requested)
    assert bench.wake_ups() == 0
    assert leg.sent == 0
    assert leg.sock.recv(100, socket.MSG_PEEK) == b"early"
    bench.near.abandon()
    assert leg.ended is LegEnd.REMOTE_RESET
    client.close()


def test_a_refused_stream_leaves_its_socket_as_it_was(bench: MuxBench) -> None:
    client, leg = bench.open()
    with client, leg.sock:
        client.send(b"early")
        bench.until(lambda: bench.far_owner.requested)
        bench.far.refuse(1, ResetCode.REFUSED)
        bench.until(lambda: bench.near_owner.refusals)
        assert bench.near_owner.refusals == [(leg, ResetCode.REFUSED)]
        assert leg.sock.recv(100) == b"early"
        assert (bench.near_budget.streams, bench.near_budget.shared_left) == (0, Budget().shared_left)
        leg.abort_from_here()  # from a cancellation that crossed it
        leg.abort_from_there()
        assert leg.sock.fileno() >= 0


def test_aborting_twice_is_the_same_as_once(bench: MuxBench, stream: Joined) -> None:
    stream.near.abort_from_here()
    stream.near.abort_from_here()
    stream.near.abort_from_there()
    bench.until(lambda: len(stream.ends) == 2)


# Stalls


def test_a_stalled_stream_holds_its_window_and_no_more_and_goes_on_when_it_can(
    bench: MuxBench, stream: Joined
) -> None:
    """docs/behaviours.md, 15."""
    sent = bench.stall(stream.client)
    assert 0 < pending_bytes(stream.far) <= stream.far.window.size <= WINDOW_MAX_BYTES
    assert bench.near.backlog.is_empty
    assert bench.wake_ups() == 0
    assert len(bench.read(stream.server, sent)) == sent
    stream.client.send(b"more")
    assert bench.read(stream.server, 4) == b"more"


def test_a_peer_that_is_gone_while_it_stalls_is_noticed(bench: MuxBench, stream: Joined) -> None:
    """docs/behaviours.md, 13."""
    bench.stall(stream.client)
    bench.is_time_still = True
    abort(stream.client)
    bench.until(lambda: not stream.near.is_watched)
    assert bench.wake_ups() == 0  # the kernel is not asked again and again
    bench.clock.advance(9.9)
    bench.turn()
    assert "near" not in stream.ends
    bench.clock.advance(0.1)
    bench.until(lambda: "near" in stream.ends)
    bench.is_time_still = False
    assert bench.is_aborted(stream.server)


def test_a_peer_that_was_gone_while_it_stalled_is_passed_on_to_the_last_byte(
    bench: MuxBench, stream: Joined
) -> None:
    bench.stall(stream.client)
    bench.is_time_still = True
    on_its_way = stream.near.sent
    abort(stream.client)
    unread = len(stream.near.sock.recv(4 * MIB, socket.MSG_PEEK))
    bench.until(lambda: not stream.near.is_watched)
    got, how = bench.read_to_end(stream.server)
    assert (len(got), how) == (on_its_way + unread, "RST")
    assert bench.loop.timers_left == len(bench.muxes)  # for their ticks


def test_both_ends_of_file_and_stalled_is_no_abort_and_no_busy_loop(
    bench: MuxBench, stream: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HUP is what the kernel says after both FINs, too; the bytes before the client's wait for credit."""
    half_close(stream.server)
    assert bench.read_to_end(stream.client) == (b"", "EOF")
    assert stream.near.is_half_closed
    with monkeypatch.context() as patch:
        patch.setattr(bench.near.backlog, "room", lambda _leg: 0)
        stream.client.send(b"waits for credit")
        half_close(stream.client)
        bench.until(lambda: not stream.near.is_watched)
        assert bench.wake_ups() == 0
        bench.clock.advance(20.0)
        bench.turn()
        assert not stream.ends
    stream.near.resume()
    assert bench.read_to_end(stream.server) == (b"waits for credit", "EOF")
    bench.until(lambda: len(stream.ends) == 2)
    assert set(stream.ends.values()) == {LegEnd.DONE}


def test_the_socket_buffer_of_a_stream_that_moves_much_grows(bench: MuxBench) -> None:
    client, near = bench.open()
    bench.until(lambda: bench.far_owner.requested)
    server, connected = tcp_pair()
    far = bench.far.accept(bench.far_owner.requested[0].stream_id, connected)
    assert far is not None
    with client, server:
        before = connected.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        for _ in range(16):
            client.send(bytes(16384))
            bench.read(server, 16384)
        assert connected.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) > before
        near.abort_from_here()
        bench.until(lambda: far.ended is not None)


def test_credit_for_what_has_ended_changes_nothing(bench: MuxBench, stream: Joined) -> None:
    half_close(stream.client)
    bench.until(lambda: stream.far.has_eof)
    stream.near.resume()
    assert bench.wake_ups() == 0


def test_a_peer_that_is_gone_has_another_ten_seconds_once_its_bytes_go_on(
    bench: MuxBench, stream: Joined
) -> None:
    bench.stall(stream.client)
    bench.is_time_still = True
    abort(stream.client)
    bench.until(lambda: not stream.near.is_watched)
    bench.clock.advance(9.9)
    sent = stream.near.sent
    while stream.near.sent == sent:
        bench.read(stream.server, 10_000)
        bench.turn()
    bench.until(lambda: not stream.near.is_watched)
    bench.clock.advance(9.9)
    bench.turn()
    assert "near" not in stream.ends
    bench.clock.advance(0.1)
    bench.until(lambda: "near" in stream.ends)


def test_an_idle_and_a_half_closed_stream_wake_nobody(bench: MuxBench, stream: Joined) -> None:
    assert bench.wake_ups() == 0
    half_close(stream.client)
    bench.until(lambda: stream.far.has_eof)
    bench.turn()
    assert bench.wake_ups() == 0
    bench.stall(stream.server)
    assert bench.wake_ups() == 0


def test_a_socket_that_the_kernel_cannot_watch_ends_only_its_stream(
    bench: MuxBench, stream: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "too many")

    with monkeypatch.context() as patch:
        patch.setattr(bench.loop, "watch_for", refuse)
        client, leg = bench.open()
    bench.until(lambda: leg.ended)
    assert bench.is_aborted(client)
    client.close()
    stream.client.send(b"x")
    assert bench.read(stream.server, 1) == b"x"


# Other sockets


def test_what_a_socket_has_not_sent_is_nothing_where_that_cannot_be_known() -> None:
    one, other = unix_pair()
    with one, other:
        one.send(b"x")
        assert leg_module.unsent_bytes(one) > 0
    with socket.socket() as listening:
        listening.listen()
        assert leg_module.unsent_bytes(listening) == 0
