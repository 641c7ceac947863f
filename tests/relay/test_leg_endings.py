# SPDX-License-Identifier: GPL-2.0-or-later
"""How one stream ends between two real connections: ends of file, aborts, and what comes before them."""

import contextlib
import errno
import select
import socket
import struct

import pytest
from endings import MIB, pattern
from mux_bench import BOUND_S, Joined, MuxBench

from qubes_fwd_qrexec.relay.budget import FLOOR_BYTES, INITIAL_BYTES, Budget
from qubes_fwd_qrexec.relay.copy import abort, half_close
from qubes_fwd_qrexec.relay.leg_end import LegEnd


def test_both_ends_of_file_are_a_clean_end_and_all_is_given_back(bench: MuxBench, stream: Joined) -> None:
    half_close(stream.client)
    assert bench.read_to_end(stream.server) == (b"", "EOF")
    stream.server.send(b"still here")
    half_close(stream.server)
    assert bench.read_to_end(stream.client) == (b"still here", "EOF")
    bench.until(lambda: len(stream.ends) == 2)
    assert set(stream.ends.values()) == {LegEnd.DONE}
    assert not bench.near.legs
    assert not bench.far.legs
    assert bench.far.connection.open_streams == 0


def test_the_window_of_a_direction_that_ended_is_for_others(bench: MuxBench, stream: Joined) -> None:
    before = bench.far_budget.shared_left
    assert stream.far.window.size > FLOOR_BYTES
    half_close(stream.client)
    bench.until(lambda: stream.far.has_eof)
    assert bench.far_budget.shared_left == before + INITIAL_BYTES - FLOOR_BYTES
    assert stream.far.window.size == FLOOR_BYTES
    stream.server.send(b"x")
    half_close(stream.server)
    bench.until(lambda: not bench.far.legs)
    assert bench.far_budget.shared_left == Budget().shared_left


@pytest.mark.parametrize("is_client", [True, False])
def test_an_abort_is_an_abort_at_the_other_end(bench: MuxBench, stream: Joined, is_client: bool) -> None:
    aborting, other = (stream.client, stream.server) if is_client else (stream.server, stream.client)
    aborting.send(b"last words")
    abort(aborting)
    assert bench.read_to_end(other) == (b"last words", "RST")
    assert stream.ends == {
        "near": LegEnd.LOCAL_RESET if is_client else LegEnd.REMOTE_RESET,
        "far": LegEnd.REMOTE_RESET if is_client else LegEnd.LOCAL_RESET,
    }


def test_an_abort_after_the_peers_end_of_file(bench: MuxBench, stream: Joined) -> None:
    half_close(stream.client)
    assert bench.read_to_end(stream.server) == (b"", "EOF")
    abort(stream.server)
    assert bench.is_aborted(stream.client)


def test_an_abort_after_ones_own_end_of_file(bench: MuxBench, stream: Joined) -> None:
    half_close(stream.client)
    bench.until(lambda: stream.far.has_eof)
    abort(stream.client)
    bench.until(lambda: len(stream.ends) == 2)
    assert stream.ends["near"] is LegEnd.LOCAL_RESET
    assert stream.ends["far"] is LegEnd.REMOTE_RESET


def test_what_was_received_before_an_abort_is_delivered_first(bench: MuxBench, stream: Joined) -> None:
    """docs/behaviours.md, 12, with a client that reads late but in time."""
    sent = pattern(200_000)
    assert stream.server.send(sent) == len(sent)
    bench.until(lambda: stream.near.received == len(sent))
    abort(stream.server)
    bench.until(lambda: stream.near.ended is not None)
    assert bench.read_to_end(stream.client) == (sent, "RST")


def test_an_abort_does_not_wait_for_ever_for_a_client_that_reads_nothing(
    bench: MuxBench, stream: Joined
) -> None:
    """docs/behaviours.md, 12: within a second."""
    bench.stall(stream.server)
    bench.is_time_still = True
    stream.far.abort_from_here()
    bench.until(lambda: stream.near.ended)
    for _ in range(7):
        bench.clock.advance(0.1)
        bench.turn()
    assert "near" not in stream.ends
    bench.clock.advance(0.2)
    bench.until(lambda: "near" in stream.ends)


def abort_while_last_bytes_wait(bench: MuxBench, stream: Joined) -> None:
    """The client aborts, the server has read nothing, and time stands still."""
    bench.stall(stream.client)
    bench.is_time_still = True
    stream.near.abort_from_here()
    bench.until(lambda: stream.far.ended)


def assert_last_bytes_come(bench: MuxBench, stream: Joined) -> None:
    bench.is_time_still = False
    got, how = bench.read_to_end(stream.server)
    assert (len(got), how) == (stream.far.received, "RST")


def test_last_bytes_reach_a_server_that_goes_on_sending(bench: MuxBench, stream: Joined) -> None:
    """docs/behaviours.md, 12. Nobody reads what it sends, and that must not fill our receive buffer:
    docs/facts.md, L4."""
    abort_while_last_bytes_wait(bench, stream)
    left = 4 * MIB

    def all_taken() -> bool:
        nonlocal left
        with contextlib.suppress(BlockingIOError):
            left -= stream.server.send(bytes(min(left, 65536)))
        return not left

    bench.until(all_taken)
    assert_last_bytes_come(bench, stream)


def test_last_bytes_reach_a_server_that_has_ended(bench: MuxBench, stream: Joined) -> None:
    abort_while_last_bytes_wait(bench, stream)
    half_close(stream.server)
    bench.until(lambda: bench.wake_ups() == 0)
    assert_last_bytes_come(bench, stream)


def test_a_client_that_leaves_ends_the_wait_for_its_last_bytes(bench: MuxBench, stream: Joined) -> None:
    bench.stall(stream.server)
    bench.is_time_still = True
    stream.far.abort_from_here()
    bench.until(lambda: stream.near.ended is LegEnd.REMOTE_RESET)
    assert not stream.ends.get("near")
    abort(stream.client)
    bench.until(lambda: stream.ends.get("near") is LegEnd.REMOTE_RESET)


def test_last_bytes_reach_a_server_when_the_kernel_has_all_of_them(bench: MuxBench, stream: Joined) -> None:
    bench.is_time_still = True
    stream.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stream.server.send(pattern(100_000))
    bench.until(lambda: stream.near.received == 100_000)
    stream.far.abort_from_here()
    bench.until(lambda: stream.near.ended is LegEnd.REMOTE_RESET)
    assert stream.near.pending is None
    bench.turn()
    assert not stream.ends.get("near")
    abort(stream.client)
    bench.until(lambda: stream.ends.get("near") is LegEnd.REMOTE_RESET)


def wait_for_news_of_its_end(sock: socket.socket) -> None:
    """Wait until the kernel knows that the socket's peer is gone."""
    poll = select.poll()
    poll.register(sock, 0)
    assert poll.poll(BOUND_S * 1000)


def break_far(bench: MuxBench, stream: Joined) -> int:
    """The server's abort is met by a write, while its bytes wait for credit; how many had left by then."""
    bench.turn(20)
    sent_before = stream.far.sent
    while not stream.far.is_broken:
        assert stream.far.ended is None
        stream.client.send(b"x" * 10)
        bench.turn()
    return sent_before


def test_what_a_server_sent_before_its_abort_is_not_lost_by_a_failed_write(
    bench: MuxBench, stream: Joined
) -> None:
    bench.stall(stream.server)
    abort(stream.server)
    unread = len(stream.far.sock.recv(4 * MIB, socket.MSG_PEEK))
    sent_before = break_far(bench, stream)
    got, how = bench.read_to_end(stream.client)
    assert (len(got), how) == (sent_before + unread, "RST")
    bench.until(lambda: len(stream.ends) == 2)
    assert stream.ends["far"] is LegEnd.LOCAL_RESET


def test_what_waits_behind_a_failed_write_waits_no_longer_than_behind_an_abort(
    bench: MuxBench, stream: Joined
) -> None:
    bench.stall(stream.server)
    bench.is_time_still = True
    abort(stream.server)
    break_far(bench, stream)
    bench.until(lambda: not stream.far.is_watched)
    bench.clock.advance(9.9)
    bench.turn()
    assert "far" not in stream.ends
    bench.clock.advance(0.1)
    bench.until(lambda: stream.ends.get("far") is LegEnd.LOCAL_RESET)


def test_a_server_that_had_ended_before_it_took_nothing_more_ends_cleanly_for_the_client(
    bench: MuxBench, stream: Joined
) -> None:
    """FIN and then RST: the FIN is the truth about what it sent."""
    bench.stall(stream.client)  # so that the far end has what fails to be written
    sent = pattern(100_000)
    near_socket = stream.near.sock
    near_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    stream.server.send(sent)
    stream.server.close()
    got, how = bench.read_to_end(stream.client)
    assert how == "RST" or (got, how) == (sent, "EOF")
    bench.until(lambda: len(stream.ends) == 2)
    assert stream.ends["far"] is LegEnd.LOCAL_RESET


def test_an_end_of_file_behind_a_failed_write_is_believed_only_after_a_fin(
    bench: MuxBench, stream: Joined
) -> None:
    stream.far.broken(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    half_close(stream.server)
    assert bench.read_to_end(stream.client) == (b"", "EOF")
    bench.until(lambda: len(stream.ends) == 2)
    assert stream.ends == {"near": LegEnd.REMOTE_RESET, "far": LegEnd.LOCAL_RESET}


def test_a_write_that_fails_after_the_local_fin_is_an_abort_at_once(bench: MuxBench, stream: Joined) -> None:
    half_close(stream.server)
    assert bench.read_to_end(stream.client) == (b"", "EOF")
    stream.far.broken(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert stream.ends["far"] is LegEnd.LOCAL_RESET
    assert bench.loop.bugs.count == 0


def test_both_have_ended_and_a_byte_is_lost_is_no_clean_end(bench: MuxBench, stream: Joined) -> None:
    half_close(stream.client)
    bench.until(lambda: stream.far.has_eof)
    stream.far.broken(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    half_close(stream.server)
    assert bench.is_aborted(stream.client)


def test_what_comes_for_a_broken_connection_is_dropped(bench: MuxBench, stream: Joined) -> None:
    bench.stall(stream.server)
    abort(stream.server)
    wait_for_news_of_its_end(stream.far.sock)
    stream.far.deliver([b"x"])
    assert stream.far.is_broken
    stream.far.deliver([b"y"])
    assert stream.far.pending is None
    stream.near.abort_from_here()
    bench.until(lambda: len(stream.ends) == 2)


def test_a_lost_stream_whose_socket_is_broken_ends_at_once(bench: MuxBench, stream: Joined) -> None:
    bench.stall(stream.server)
    abort(stream.server)
    wait_for_news_of_its_end(stream.far.sock)
    stream.far.deliver([b"x"])
    stream.far.abort_from_there()
    assert stream.ends["far"] is LegEnd.REMOTE_RESET


def test_a_write_that_fails_late_is_an_abort(bench: MuxBench, stream: Joined) -> None:
    bench.stall(stream.client)
    assert stream.far.pending
    abort(stream.server)
    bench.until(lambda: len(stream.ends) == 2)
    assert stream.ends == {"near": LegEnd.REMOTE_RESET, "far": LegEnd.LOCAL_RESET}


def test_a_write_that_fails_after_the_local_end_of_file_is_an_abort(bench: MuxBench, stream: Joined) -> None:
    stream.server.close()  # all was read, so this is a FIN; what comes now is answered by RST
    assert bench.read_to_end(stream.client) == (b"", "EOF")
    stream.client.send(b"x")
    bench.until(lambda: len(stream.ends) == 2)
    assert stream.ends["far"] is LegEnd.LOCAL_RESET


def test_ends_of_file_wait_behind_what_is_not_taken_yet(bench: MuxBench, stream: Joined) -> None:
    sent = bench.stall(stream.client)
    half_close(stream.client)
    got, how = bench.read_to_end(stream.server)
    assert (len(got), how) == (sent, "EOF")


def test_every_close_is_an_abort_unless_both_directions_are_over(bench: MuxBench, stream: Joined) -> None:
    """Also the kernel's, when the process dies."""
    for leg in (stream.near, stream.far):
        linger = leg.sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
        assert struct.unpack("ii", linger) == (1, 0)
