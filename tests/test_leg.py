# SPDX-License-Identifier: GPL-2.0-or-later
"""One stream between two real connections: bytes, endings, stalls and windows."""

import errno
import random
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from endings import pattern
from helpers import no_fds_left, unix_pair
from mux_bench import Joined, TunnelBench

from qubes_fwd_qrexec import leg as leg_module
from qubes_fwd_qrexec.budget import FLOOR_BYTES, INITIAL_BYTES, WINDOW_MAX_BYTES, Budget
from qubes_fwd_qrexec.leg import Leg, LegEnd
from qubes_fwd_qrexec.loop import READ
from qubes_fwd_qrexec.relay import abort, half_close
from qubes_fwd_qrexec.tunnel import ResetCode

MIB = 1 << 20


@pytest.fixture
def bench() -> Iterator[TunnelBench]:
    with no_fds_left(), TunnelBench() as bench:
        yield bench


@pytest.fixture
def stream(bench: TunnelBench) -> Joined:
    return bench.join()


def is_aborted(bench: TunnelBench, sock: socket.socket) -> bool:
    return bench.read_to_end(sock)[1] == "RST"


def pending_bytes(leg: Leg) -> int:
    return sum(cost for _, cost in leg._pending or ())


def check_window(bench: TunnelBench, leg: Leg) -> None:
    """A window is what the peer may still send, what waits here, and what is not granted again yet."""
    granted = leg._mux.connection.granted(leg.stream_id)
    assert leg._window == granted + pending_bytes(leg) + leg._owed
    assert FLOOR_BYTES <= leg._window <= WINDOW_MAX_BYTES


# Bytes


def test_bytes_go_both_ways(bench: TunnelBench, stream: Joined) -> None:
    stream.client.send(b"request")
    assert bench.read(stream.server, 7) == b"request"
    stream.server.send(b"answer")
    assert bench.read(stream.client, 6) == b"answer"
    assert (stream.near.sent, stream.near.received) == (7, 6)
    assert (stream.far.sent, stream.far.received) == (6, 7)


@pytest.mark.parametrize("size", [1, 32767, 32768, 32769, 4 * MIB + 1])
def test_every_byte_arrives_and_windows_add_up(bench: TunnelBench, stream: Joined, size: int) -> None:
    data, got, sent = pattern(size), bytearray(), 0
    half = False
    while len(got) < size:
        sent += send_some(stream.client, data[sent : sent + 70_000]) if sent < size else 0
        if sent == size and not half:
            half_close(stream.client)
            half = True
        bench.loop.run_once(0)
        got += receive_some(stream.server, 50_000)
        if not stream.far.has_eof:
            check_window(bench, stream.far)
    assert got == data
    assert bench.read_to_end(stream.server) == (b"", "EOF")


def send_some(sock: socket.socket, data: bytes) -> int:
    try:
        return sock.send(data)
    except BlockingIOError:
        return 0


def receive_some(sock: socket.socket, size: int) -> bytes:
    try:
        return sock.recv(size)
    except BlockingIOError:
        return b""


# Endings


def test_both_ends_of_file_are_a_clean_end_and_all_is_given_back(bench: TunnelBench, stream: Joined) -> None:
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


def test_the_window_of_a_direction_that_ended_is_for_others(bench: TunnelBench, stream: Joined) -> None:
    before = bench.far_budget.shared_left
    assert stream.far._window > FLOOR_BYTES
    half_close(stream.client)
    bench.until(lambda: stream.far.has_eof)
    assert bench.far_budget.shared_left == before + INITIAL_BYTES - FLOOR_BYTES
    assert stream.far._window == FLOOR_BYTES
    stream.server.send(b"x")
    half_close(stream.server)
    bench.until(lambda: not bench.far.legs)
    assert bench.far_budget.shared_left == Budget().shared_left


@pytest.mark.parametrize("is_client", [True, False])
def test_an_abort_is_an_abort_at_the_other_end(bench: TunnelBench, stream: Joined, is_client: bool) -> None:
    aborting, other = (stream.client, stream.server) if is_client else (stream.server, stream.client)
    aborting.send(b"last words")
    abort(aborting)
    assert bench.read_to_end(other) == (b"last words", "RST")
    assert stream.ends == {
        "near": LegEnd.LOCAL_RESET if is_client else LegEnd.REMOTE_RESET,
        "far": LegEnd.REMOTE_RESET if is_client else LegEnd.LOCAL_RESET,
    }


def test_an_abort_after_the_peers_end_of_file(bench: TunnelBench, stream: Joined) -> None:
    half_close(stream.client)
    assert bench.read_to_end(stream.server) == (b"", "EOF")
    abort(stream.server)
    assert is_aborted(bench, stream.client)


def test_an_abort_after_ones_own_end_of_file(bench: TunnelBench, stream: Joined) -> None:
    half_close(stream.client)
    bench.until(lambda: stream.far.has_eof)
    abort(stream.client)
    bench.until(lambda: len(stream.ends) == 2)
    assert stream.ends["near"] is LegEnd.LOCAL_RESET
    assert stream.ends["far"] is LegEnd.REMOTE_RESET


def test_what_was_received_before_an_abort_is_delivered_first(bench: TunnelBench, stream: Joined) -> None:
    """relay-behaviours 12, with a client that reads late but in time."""
    sent = pattern(200_000)
    assert stream.server.send(sent) == len(sent)
    bench.until(lambda: stream.near.received == len(sent))
    abort(stream.server)
    bench.until(lambda: stream.near.ended is not None)
    assert bench.read_to_end(stream.client) == (sent, "RST")


def test_an_abort_does_not_wait_for_ever_for_a_client_that_reads_nothing(
    bench: TunnelBench, stream: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leg_module, "_LAST_WORDS_S", 0.05)
    bench.stall(stream.server)
    began = time.monotonic()
    stream.far.abort_from_here()
    bench.until(lambda: "near" in stream.ends)
    assert 0.05 <= time.monotonic() - began < 5


def test_a_client_that_leaves_ends_the_wait_for_its_last_bytes(bench: TunnelBench, stream: Joined) -> None:
    bench.stall(stream.server)
    stream.far.abort_from_here()
    bench.until(lambda: stream.near.ended is LegEnd.REMOTE_RESET)
    assert not stream.ends.get("near")
    abort(stream.client)
    bench.turn()
    assert stream.ends["near"] is LegEnd.REMOTE_RESET


def break_far(bench: TunnelBench, stream: Joined) -> int:
    """The server's abort is met by a write, while its bytes wait for credit; how many had left by then."""
    bench.turn(20)
    sent_before = stream.far.sent
    while not stream.far._broken_by:
        assert stream.far.ended is None
        stream.client.send(b"x" * 10)
        bench.turn()
    return sent_before


def test_what_a_server_sent_before_its_abort_is_not_lost_by_a_failed_write(
    bench: TunnelBench, stream: Joined
) -> None:
    bench.stall(stream.server)
    unread = len(stream.far.sock.recv(4 * MIB, socket.MSG_PEEK))
    abort(stream.server)
    sent_before = break_far(bench, stream)
    got, how = bench.read_to_end(stream.client)
    assert (len(got), how) == (sent_before + unread, "RST")
    bench.until(lambda: len(stream.ends) == 2)
    assert stream.ends["far"] is LegEnd.LOCAL_RESET


def test_what_waits_behind_a_failed_write_waits_no_longer_than_behind_an_abort(
    bench: TunnelBench, stream: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leg_module, "_STALLED_GONE_S", 1000)
    bench.stall(stream.server)
    monkeypatch.setattr(bench.far, "room", lambda _leg: 0)
    abort(stream.server)
    break_far(bench, stream)
    monkeypatch.setattr(leg_module, "_STALLED_GONE_S", 0)
    stream.far._watch(READ)
    bench.until(lambda: stream.ends.get("far") is LegEnd.LOCAL_RESET)


def test_a_server_that_had_ended_before_it_took_nothing_more_ends_cleanly_for_the_client(
    bench: TunnelBench, stream: Joined
) -> None:
    """FIN and then RST: the first thing that was said is the truth about what it sent."""
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
    bench: TunnelBench, stream: Joined
) -> None:
    stream.far._broken_by = errno.EPIPE
    half_close(stream.server)
    assert bench.read_to_end(stream.client) == (b"", "EOF")
    bench.until(lambda: len(stream.ends) == 2)
    assert stream.ends == {"near": LegEnd.REMOTE_RESET, "far": LegEnd.LOCAL_RESET}


def test_both_have_ended_and_a_byte_is_lost_is_no_clean_end(bench: TunnelBench, stream: Joined) -> None:
    half_close(stream.client)
    bench.until(lambda: stream.far.has_eof)
    stream.far._broken_by = errno.EPIPE
    half_close(stream.server)
    assert is_aborted(bench, stream.client)


def test_a_full_socket_is_tried_again_when_it_is_ready(bench: TunnelBench, stream: Joined) -> None:
    bench.stall(stream.client)
    stream.far._push()
    assert stream.far._pending


def test_what_comes_for_a_broken_connection_is_dropped(bench: TunnelBench, stream: Joined) -> None:
    bench.stall(stream.server)
    abort(stream.server)
    stream.far.deliver(b"x")
    assert stream.far._broken_by
    stream.far.deliver(b"y")
    assert stream.far._pending is None
    stream.near.abort_from_here()
    bench.until(lambda: len(stream.ends) == 2)


def test_a_lost_stream_that_is_broken_here_has_no_last_words(bench: TunnelBench, stream: Joined) -> None:
    bench.stall(stream.server)
    abort(stream.server)
    stream.far.deliver(b"x")
    stream.far.abort_from_there()
    assert stream.ends["far"] is LegEnd.REMOTE_RESET


def test_a_write_that_fails_late_is_an_abort(bench: TunnelBench, stream: Joined) -> None:
    bench.stall(stream.client)
    assert stream.far._pending
    abort(stream.server)
    bench.until(lambda: len(stream.ends) == 2)
    assert stream.ends == {"near": LegEnd.REMOTE_RESET, "far": LegEnd.LOCAL_RESET}


def test_a_write_that_fails_after_the_local_end_of_file_is_an_abort(
    bench: TunnelBench, stream: Joined
) -> None:
    stream.server.close()  # all was read, so this is a FIN; what comes now is answered by RST
    assert bench.read_to_end(stream.client) == (b"", "EOF")
    stream.client.send(b"x")
    bench.until(lambda: len(stream.ends) == 2)
    assert stream.ends["far"] is LegEnd.LOCAL_RESET


def test_ends_of_file_wait_behind_what_is_not_taken_yet(bench: TunnelBench, stream: Joined) -> None:
    sent = bench.stall(stream.client)
    half_close(stream.client)
    got, how = bench.read_to_end(stream.server)
    assert (len(got), how) == (sent, "EOF")


def test_every_close_is_an_abort_unless_both_directions_are_over(bench: TunnelBench, stream: Joined) -> None:
    """Also the kernel's, when the process dies."""
    for leg in (stream.near, stream.far):
        linger = leg.sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)
        assert struct.unpack("ii", linger) == (1, 0)


# While the stream is only asked for


def test_a_client_that_leaves_before_the_stream_is_accepted_takes_it_back(bench: TunnelBench) -> None:
    client, leg = bench.open()
    bench.until(lambda: bench.far_owner.requested)
    abort(client)
    bench.until(lambda: bench.far_owner.abandoned)
    assert leg.ended is LegEnd.LOCAL_RESET
    bench.until(lambda: not bench.near.connection.open_streams)
    assert bench.far.connection.open_streams == 0


def test_nothing_is_read_from_a_client_before_the_stream_is_accepted(bench: TunnelBench) -> None:
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


def test_a_refused_stream_leaves_its_socket_as_it_was(bench: TunnelBench) -> None:
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


def test_an_abort_twice_is_one(bench: TunnelBench, stream: Joined) -> None:
    stream.near.abort_from_here()
    stream.near.abort_from_here()
    stream.near.abort_from_there()
    bench.until(lambda: len(stream.ends) == 2)


# Stalls


def test_a_stalled_stream_holds_its_window_and_no_more_and_goes_on_when_it_can(
    bench: TunnelBench, stream: Joined
) -> None:
    """relay-behaviours 15."""
    sent = bench.stall(stream.client)
    assert 0 < pending_bytes(stream.far) <= stream.far._window <= WINDOW_MAX_BYTES
    assert bench.near.backlog.is_empty
    assert bench.wake_ups() == 0
    assert len(bench.read(stream.server, sent)) == sent
    stream.client.send(b"more")
    assert bench.read(stream.server, 4) == b"more"


def test_a_peer_that_is_gone_while_it_stalls_is_noticed(
    bench: TunnelBench, stream: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    """relay-behaviours 13."""
    monkeypatch.setattr(leg_module, "_STALLED_GONE_S", 0.05)
    bench.stall(stream.client)
    began = time.monotonic()
    abort(stream.client)
    bench.turn()
    assert bench.wake_ups() == 0  # the kernel is not asked again and again
    bench.until(lambda: "near" in stream.ends)
    assert 0.05 <= time.monotonic() - began < 5
    assert is_aborted(bench, stream.server)


def test_a_peer_that_was_gone_while_it_stalled_is_passed_on_to_the_last_byte(
    bench: TunnelBench, stream: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leg_module, "_STALLED_GONE_S", 1000)
    bench.stall(stream.client)
    unread = len(stream.near.sock.recv(4 * MIB, socket.MSG_PEEK))
    on_its_way = stream.near.sent
    abort(stream.client)
    bench.turn()
    got, how = bench.read_to_end(stream.server)
    assert (len(got), how) == (on_its_way + unread, "RST")
    assert stream.near._timer is None or stream.near._timer.callback is None


def test_both_ends_of_file_and_stalled_is_no_abort_and_no_busy_loop(
    bench: TunnelBench, stream: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HUP is what the kernel says after both FINs, too; the bytes before the client's wait for credit."""
    monkeypatch.setattr(leg_module, "_STALLED_GONE_S", 0.0)
    half_close(stream.server)
    assert bench.read_to_end(stream.client) == (b"", "EOF")
    assert stream.near.is_half_closed
    with monkeypatch.context() as patch:
        patch.setattr(bench.near, "room", lambda _leg: 0)
        stream.client.send(b"waits for credit")
        half_close(stream.client)
        bench.turn()
        assert stream.near._mask == leg_module._UNWATCHED
        assert bench.wake_ups() == 0
    stream.near.resume()
    assert bench.read_to_end(stream.server) == (b"waits for credit", "EOF")
    bench.until(lambda: len(stream.ends) == 2)
    assert set(stream.ends.values()) == {LegEnd.DONE}


def test_credit_for_what_has_ended_changes_nothing(bench: TunnelBench, stream: Joined) -> None:
    half_close(stream.client)
    bench.until(lambda: stream.far.has_eof)
    stream.near.resume()
    assert stream.near._mask == 0


def test_a_stall_timer_of_a_leg_that_goes_on_again_does_nothing(
    bench: TunnelBench, stream: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leg_module, "_STALLED_GONE_S", 0.0)
    bench.stall(stream.client)
    stream.near._watch(leg_module._UNWATCHED)
    stream.near._after(0.0, stream.near._abort_if_stalled)
    stream.near._watch(READ)
    bench.turn()
    assert stream.near.ended is None


def test_an_idle_and_a_half_closed_stream_wake_nobody(bench: TunnelBench, stream: Joined) -> None:
    assert bench.wake_ups() == 0
    half_close(stream.client)
    bench.until(lambda: stream.far.has_eof)
    bench.turn()
    assert bench.wake_ups() == 0
    bench.stall(stream.server)
    assert bench.wake_ups() == 0


def test_a_socket_that_the_kernel_cannot_watch_is_one_streams_trouble(
    bench: TunnelBench, stream: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "too many")

    with monkeypatch.context() as patch:
        patch.setattr(bench.loop, "watch", refuse)
        client, leg = bench.open()
    bench.until(lambda: leg.ended)
    assert is_aborted(bench, client)
    client.close()
    stream.client.send(b"x")
    assert bench.read(stream.server, 1) == b"x"


# Windows


def test_a_fast_stream_gets_a_large_window_and_a_slow_one_gives_it_back(
    bench: TunnelBench, stream: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leg_module, "_FAST_S", 1000.0)
    monkeypatch.setattr(leg_module, "_SLOW_S", 2000.0)
    carry(bench, stream, 4 * MIB)
    assert stream.far._window == WINDOW_MAX_BYTES
    assert bench.far_budget.shared_left == Budget().shared_left - (WINDOW_MAX_BYTES - FLOOR_BYTES)
    monkeypatch.setattr(leg_module, "_SLOW_S", -1.0)
    carry(bench, stream, 4 * MIB)
    assert stream.far._window == INITIAL_BYTES
    check_window(bench, stream.far)
    carry(bench, stream, MIB)


def carry(bench: TunnelBench, stream: Joined, size: int) -> None:
    """So much from the client to the server, as fast as it goes."""
    left, got = size, 0
    deadline = time.monotonic() + 10
    while got < size:
        assert time.monotonic() < deadline, "it stands still"
        left -= send_some(stream.client, bytes(min(left, 65536))) if left else 0
        bench.loop.run_once(0)
        got += len(receive_some(stream.server, 65536))


def test_a_tight_budget_takes_back_what_it_lent_even_from_the_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leg_module, "_FAST_S", 1000.0)
    monkeypatch.setattr(leg_module, "_SLOW_S", 2000.0)
    with TunnelBench(far_budget=Budget(4 * MIB, 16)) as bench:
        stream = bench.join()
        carry(bench, stream, 4 * MIB)
        assert stream.far._window == WINDOW_MAX_BYTES
        others = bench.far_budget.shared_left
        bench.far_budget.shared_left = 0
        carry(bench, stream, 4 * MIB)
        assert stream.far._window <= 4 * INITIAL_BYTES
        bench.far_budget.shared_left += others


@pytest.mark.parametrize("seed", range(5))
def test_no_stream_stands_still_however_its_window_changes(
    bench: TunnelBench, stream: Joined, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Fast and slow as chance has it, through socket buffers that take a little at a time."""
    chance = random.Random(seed)
    stream.far.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    for _ in range(40):
        monkeypatch.setattr(leg_module, "_FAST_S", chance.choice((-1.0, 1000.0)))
        monkeypatch.setattr(leg_module, "_SLOW_S", chance.choice((-1.0, 1000.0)))
        carry(bench, stream, chance.randrange(1, 300_000))
        check_window(bench, stream.far)
    assert bench.near.connection.send_limit(stream.near.stream_id) > 0


def test_the_floor_alone_suffices(monkeypatch: pytest.MonkeyPatch) -> None:
    with TunnelBench(far_budget=Budget(16 * FLOOR_BYTES, 16)) as bench:
        stream = bench.join()
        assert stream.far._window == FLOOR_BYTES
        carry(bench, stream, 300_000)
        assert stream.far._window == FLOOR_BYTES


# Other sockets


def test_what_a_socket_has_not_sent_is_nothing_where_that_cannot_be_known() -> None:
    one, other = unix_pair()
    with one, other:
        one.send(b"x")
        assert leg_module.unsent_bytes(one) > 0
    with socket.socket() as listening:
        listening.listen()
        assert leg_module.unsent_bytes(listening) == 0
