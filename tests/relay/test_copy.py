# SPDX-License-Identifier: GPL-2.0-or-later
import contextlib
import os
import random
import socket
import time
from collections.abc import Iterator

import pytest
from helpers import BOUND_S, is_ready, no_fds_left, nobody, tcp_pair, unix_pair
from hypothesis import given, settings
from hypothesis import strategies as st
from relay_bench import Bench, Pair, receive_all, turn_until

from qubes_fwd_qrexec.relay.copy import (
    BUFFER_BYTES,
    Copy,
    CopyEnd,
    Relay,
    abort,
    half_close,
    undelivered_bytes,
)
from qubes_fwd_qrexec.relay.loop import READ, Loop


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    pair = getattr(request, "param", tcp_pair)
    bench = Bench(pair, pair)
    yield bench
    bench.close()


EACH_KIND = pytest.mark.parametrize("bench", [tcp_pair, unix_pair], indirect=True)


@EACH_KIND
def test_bytes_arrive_and_the_end_is_reported_but_not_passed_on(bench: Bench) -> None:
    bench.far_source.send(b"hello")
    half_close(bench.far_source)
    assert bench.turn_until_end() is CopyEnd.EOF
    assert bench.far_sink.recv(100) == b"hello"
    with pytest.raises(BlockingIOError):
        bench.far_sink.recv(100)
    assert bench.copy.moved == 5
    assert bench.copy.on_end is None


@EACH_KIND
def test_an_end_behind_a_stall_waits_until_the_sink_has_everything(bench: Bench) -> None:
    bench.stall()
    half_close(bench.far_source)
    bench.turn()
    assert not bench.ends
    got = 0
    while not bench.ends:
        with contextlib.suppress(BlockingIOError):
            got += len(bench.far_sink.recv(1 << 20))
        bench.turn(1)
    assert bench.ends == [CopyEnd.EOF]
    half_close(bench.sink)
    assert got + len(receive_all(bench.far_sink)) == bench.copy.moved


@EACH_KIND
def test_a_sink_that_takes_little_at_a_time_gets_every_byte_once(bench: Bench) -> None:
    sent, got, position = random.Random(1).randbytes(120_000), bytearray(), 0
    bench.sink.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    bench.far_sink.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4608)
    partly = 0
    while not bench.ends:
        if position == len(sent):
            half_close(bench.far_source)
        else:
            with contextlib.suppress(BlockingIOError):
                position += bench.far_source.send(sent[position : position + BUFFER_BYTES])
        held = len(bench.copy.pending)
        bench.turn(1)
        partly += 0 < len(bench.copy.pending) < held
        with contextlib.suppress(BlockingIOError):
            got += bench.far_sink.recv(20_000)
    half_close(bench.sink)
    assert bytes(got) + receive_all(bench.far_sink) == sent
    assert partly  # what was held back went in more than one piece


def test_an_abort_is_reported_after_the_bytes_before_it(bench: Bench) -> None:
    bench.far_source.send(b"last words")
    abort(bench.far_source)
    assert bench.turn_until_end() is CopyEnd.SOURCE_RESET
    assert bench.far_sink.recv(100) == b"last words"


def test_an_abort_behind_a_stall_is_an_abort_after_it(bench: Bench) -> None:
    bench.stall()
    abort(bench.far_source)
    bench.turn()
    assert not bench.ends
    while not bench.ends:
        with contextlib.suppress(BlockingIOError):
            bench.far_sink.recv(1 << 20)
        bench.turn(1)
    assert bench.ends == [CopyEnd.SOURCE_RESET]


@EACH_KIND
def test_a_sink_that_is_closed_ends_an_idle_copy(bench: Bench) -> None:
    if bench.far_sink.family == socket.AF_INET:
        abort(bench.far_sink)
    else:
        bench.far_sink.close()
    assert bench.turn_until_end() is CopyEnd.SINK_BROKEN


@EACH_KIND
def test_a_sink_that_is_closed_ends_a_stalled_copy(bench: Bench) -> None:
    bench.stall()
    abort(bench.far_sink)
    assert bench.turn_until_end() is CopyEnd.SINK_BROKEN


class Both:
    """A TCP connection whose one end the loop reads and writes."""

    def __init__(self) -> None:
        self.far, self.near = tcp_pair()
        self.far_in, self.near_in = unix_pair()
        self.near_out, self.far_out = unix_pair()
        self.loop = Loop()
        self.relay = Relay(self.loop)
        self.events: list[tuple[str, CopyEnd]] = []
        self.relay.start(Copy(self.near_in, self.near), lambda how: self.events.append(("to", how)))
        self.relay.start(Copy(self.near, self.near_out), lambda how: self.events.append(("from", how)))

    def turn_until(self, count: int) -> dict[str, CopyEnd]:
        turn_until(self.loop, lambda: len(self.events) >= count)
        return dict(self.events)


@pytest.fixture
def both() -> Iterator[Both]:
    both = Both()
    yield both
    both.loop.close()
    for sock in (both.far, both.near, both.far_in, both.near_in, both.near_out, both.far_out):
        sock.close()


def test_an_abort_met_by_a_write_first_is_still_an_abort_to_the_reader(both: Both) -> None:
    both.far.send(b"last words")
    abort(both.far)
    # Both are ready now. To make the write come first, as it may, the loop's own parts are called.
    endpoint = both.relay._endpoint(both.near)
    assert endpoint.writer is not None
    assert endpoint.reader is not None
    assert both.relay._send(endpoint.writer, b"x") == -1
    assert endpoint.was_reset
    assert both.turn_until(2) == {"to": CopyEnd.SINK_BROKEN, "from": CopyEnd.SOURCE_RESET}
    assert both.far_out.recv(100) == b"last words"


def test_an_abort_after_a_clean_end_keeps_the_end_clean(both: Both) -> None:
    both.far.send(b"last words")
    half_close(both.far)
    abort(both.far)
    endpoint = both.relay._endpoint(both.near)
    assert endpoint.writer is not None
    assert both.relay._send(endpoint.writer, b"x") == -1
    assert not endpoint.was_reset
    assert both.turn_until(2) == {"to": CopyEnd.SINK_BROKEN, "from": CopyEnd.EOF}
    assert both.far_out.recv(100) == b"last words"


def test_an_abort_ends_both_directions(both: Both) -> None:
    abort(both.far)
    assert both.turn_until(2) == {"to": CopyEnd.SINK_BROKEN, "from": CopyEnd.SOURCE_RESET}


def test_one_direction_goes_on_after_the_end_of_the_other(both: Both) -> None:
    half_close(both.far)
    assert both.turn_until(1) == {"from": CopyEnd.EOF}
    both.far_in.send(b"still here")
    half_close(both.far_in)
    assert both.turn_until(2) == {"from": CopyEnd.EOF, "to": CopyEnd.EOF}
    assert both.far.recv(100) == b"still here"


def test_a_socket_may_be_copied_to_itself() -> None:
    bench = Bench(unix_pair, unix_pair)
    near, far = unix_pair()
    ends: list[CopyEnd] = []
    bench.relay.start(Copy(near, near), ends.append)
    far.send(b"echo")
    half_close(far)
    turn_until(bench.loop, lambda: ends)
    assert ends == [CopyEnd.EOF]
    assert far.recv(100) == b"echo"
    near.close()
    far.close()
    bench.close()


@pytest.mark.usefixtures("bugs_are_wanted")
def test_a_bug_ends_its_own_copy_and_the_loop_goes_on() -> None:
    class Faulty(socket.socket):
        def send(self, *_: object) -> int:
            raise ZeroDivisionError("a bug")

    def faulty_pair() -> tuple[socket.socket, socket.socket]:
        one, other = unix_pair()
        return Faulty(fileno=one.detach()), other

    bench = Bench(unix_pair, faulty_pair)
    bench.far_source.send(b"x")
    assert bench.turn_until_end() is CopyEnd.BUG
    assert not bench.loop.watched
    assert bench.loop.bugs.count == 1
    bench.close()


@EACH_KIND
def test_a_stalled_copy_is_silent(bench: Bench) -> None:
    bench.stall()
    assert bench.wake_ups() == 0


@EACH_KIND
def test_a_stalled_copy_whose_source_hung_up_is_silent(bench: Bench) -> None:
    bench.stall()
    abort(bench.far_source)
    assert bench.wake_ups() == 0
    assert not bench.ends


def test_a_half_closed_connection_causes_no_wake_ups(both: Both) -> None:
    half_close(both.far)
    both.turn_until(1)
    both.loop.run_once(0)
    assert not is_ready(both.loop)


@EACH_KIND
def test_a_stalled_copy_holds_no_more_than_its_buffer(bench: Bench) -> None:
    bench.stall()
    assert len(bench.copy.pending) <= BUFFER_BYTES


def test_a_stopped_copy_frees_its_sockets_silently(bench: Bench) -> None:
    bench.relay.stop(bench.copy)
    bench.relay.stop(bench.copy)
    assert not bench.loop.watched
    bench.far_source.send(b"x")
    half_close(bench.far_source)
    bench.turn()
    assert not bench.ends
    again = Copy(bench.source, bench.sink)
    bench.relay.start(again, bench.ends.append)
    assert bench.turn_until_end() is CopyEnd.EOF


def test_two_readers_of_one_socket_are_refused_and_leave_nothing(bench: Bench) -> None:
    one, other = unix_pair()
    with one, other:
        with pytest.raises(ValueError, match="one copy"):
            bench.relay.start(Copy(bench.source, one), bench.ends.append)
        with pytest.raises(ValueError, match="one copy"):
            bench.relay.start(Copy(one, bench.sink), bench.ends.append)
        assert bench.loop.watched == {bench.source.fileno(), bench.sink.fileno()}


def test_a_socket_that_cannot_be_watched_is_refused_and_leaves_nothing(bench: Bench) -> None:
    one, other = unix_pair()
    with one, other, open("/dev/null", "rb") as file:
        watched = bench.loop.watched

        class NoSocket(socket.socket):
            def fileno(self) -> int:
                return file.fileno()

        fake = NoSocket()
        copy = Copy(one, fake)
        with pytest.raises(PermissionError):
            bench.relay.start(copy, bench.ends.append)
        assert bench.loop.watched == watched
        assert copy.on_end is None
        fake.close()


def test_old_events_of_a_number_do_not_reach_its_next_socket() -> None:
    """In one turn: a copy ends, its sink is closed, and a new copy gets the sink's number."""
    bench = Bench(unix_pair, unix_pair)
    sink_fd = bench.sink.fileno()
    one, other = unix_pair()
    ends: list[CopyEnd] = []

    def replace() -> None:
        bench.relay.stop(bench.copy)
        bench.sink.detach()
        os.dup2(one.fileno(), sink_fd)  # closes the old one
        bench.sink = socket.socket(fileno=sink_fd)
        bench.sink.setblocking(False)
        bench.copy = Copy(bench.source, bench.sink)
        bench.relay.start(bench.copy, ends.append)

    news_r, news_w = unix_pair()
    news_w.send(b"x")
    # The kernel tells first of what became ready first.
    bench.loop.watch(news_r.fileno(), READ, lambda _events: replace() if news_r.recv(1) else None, nobody)
    bench.far_sink.close()  # news for the sink: HUP
    bench.loop.run_once(1)
    assert bench.sink.fileno() == sink_fd
    assert not ends
    assert not bench.ends
    bench.far_source.send(b"to the new one")
    bench.loop.run_once(1)
    assert other.recv(100) == b"to the new one"
    bench.close()
    for sock in (one, other, news_r, news_w):
        sock.close()


def test_an_end_may_start_the_next_copy() -> None:
    with no_fds_left():
        bench = Bench(tcp_pair, tcp_pair)
        back: list[CopyEnd] = []
        bench.relay.stop(bench.copy)
        bench.relay.start(
            bench.copy,
            lambda how: bench.relay.start(Copy(bench.sink, bench.source), back.append),
        )
        half_close(bench.far_source)
        half_close(bench.far_sink)
        turn_until(bench.loop, lambda: back)
        assert back == [CopyEnd.EOF]
        bench.close()


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.lists(st.binary(min_size=1, max_size=5000), max_size=30),
    buffers=st.lists(st.sampled_from([2048, 8192, 131072]), min_size=4, max_size=4),
    stalls=st.lists(st.integers(0, 3), max_size=60),
    reads=st.lists(st.integers(1, 9000), min_size=1, max_size=20),
    kinds=st.tuples(st.sampled_from([tcp_pair, unix_pair]), st.sampled_from([tcp_pair, unix_pair])),
    is_aborted=st.booleans(),
)
def test_whatever_the_chunks_buffers_and_stalls_the_same_bytes_and_the_right_end(
    chunks: list[bytes],
    buffers: list[int],
    stalls: list[int],
    reads: list[int],
    kinds: tuple[Pair, Pair],
    is_aborted: bool,
) -> None:
    bench = Bench(*kinds)
    socks = (bench.far_source, bench.source, bench.sink, bench.far_sink)
    for sock, size in zip(socks, buffers, strict=True):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
    expected = b"".join(chunks)
    unsent, got, stall, sizes = list(chunks), b"", iter(stalls), 0
    is_over = False
    deadline = time.monotonic() + BOUND_S  # the kernel itself waits for a part of a second at times
    while not bench.ends:
        assert time.monotonic() < deadline
        if unsent:
            try:
                sent = bench.far_source.send(unsent[0])
                unsent[0] = unsent[0][sent:]
            except BlockingIOError:
                pass
            if not unsent[0]:
                unsent.pop(0)
        elif not is_over and (kinds[0] is unix_pair or not undelivered_bytes(bench.far_source)):
            is_over = True
            if is_aborted and kinds[0] is tcp_pair:
                abort(bench.far_source)
            else:
                half_close(bench.far_source)
        for _ in range(next(stall, 1)):
            bench.loop.run_once(0)
        if next(stall, 0) == 0:
            with contextlib.suppress(BlockingIOError):
                got += bench.far_sink.recv(reads[sizes % len(reads)])
            sizes += 1
    half_close(bench.sink)
    got += receive_all(bench.far_sink)
    assert got == expected
    aborted = is_aborted and kinds[0] is tcp_pair
    assert bench.ends == [CopyEnd.SOURCE_RESET if aborted else CopyEnd.EOF]
    bench.close()


# A sink whose reader will not read on, as the qrexec agent leaves it when a call is lost
