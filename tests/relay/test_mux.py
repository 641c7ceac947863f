# SPDX-License-Identifier: GPL-2.0-or-later
"""One mux call: its beginning, its timers, and how it ends."""

import errno
import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import tcp_pair, unix_pair
from mux_bench import PORTS, MuxBench

from qubes_fwd_qrexec.mux import Connection, GoawayCode, Hello, ResetCode, wire
from qubes_fwd_qrexec.relay import leg as leg_module
from qubes_fwd_qrexec.relay import mux as mux_module
from qubes_fwd_qrexec.relay.budget import Budget
from qubes_fwd_qrexec.relay.copy import half_close
from qubes_fwd_qrexec.relay.leg_end import LegEnd
from qubes_fwd_qrexec.relay.loop import READ


def test_both_say_hello_and_streams_may_be_opened(bench: MuxBench) -> None:
    assert bench.near.open_room == 1000
    assert bench.far.open_room == 0


def test_a_mux_call_without_hello_ends() -> None:
    """docs/behaviours.md, 26."""
    with MuxBench(is_far_there=False) as bench:
        bench.tick(29)
        assert not bench.near_owner.is_over
        bench.tick(1)
        assert bench.near_owner.problem == "no HELLO within 30 s"
        assert bench.near.open_room == 0


def test_half_a_frame_and_silence_for_minutes_ends_the_mux_call(bench: MuxBench) -> None:
    """docs/behaviours.md, 48; a frame that goes on, however slowly, does not."""
    bench.far_call.send(b"\x04\x00")
    bench.turn()
    bench.tick(299)
    bench.far_call.send(b"\x00")
    bench.turn()
    bench.tick(299)
    assert not bench.near_owner.is_over
    bench.tick(1)
    assert bench.near_owner.problem == "half a frame, and nothing more for 300 s"


def test_a_peer_that_reads_nothing_for_minutes_ends_the_mux_call(bench: MuxBench) -> None:
    streams = [bench.join() for _ in range(20)]
    bench.loop.change(bench.far_call.fileno(), 0)
    for stream in streams:
        bench.stall(stream.client)
    bench.tick(299)
    assert not bench.near_owner.is_over
    assert not bench.near.backlog.is_empty
    assert bench.wake_ups() == 0
    bench.tick(1)
    assert bench.near_owner.problem == "the other end has read nothing for 300 s"
    assert bench.is_aborted(stream.client)


def test_a_peer_that_pauses_for_a_minute_under_traffic_harms_no_stream(bench: MuxBench) -> None:
    bulk, idle = [bench.join() for _ in range(8)], bench.join()
    bench.loop.change(bench.far_call.fileno(), 0)
    sent = [bench.stall(stream.client) for stream in bulk]
    bench.tick(60)
    bench.loop.change(bench.far_call.fileno(), READ)
    for stream, size in zip(bulk, sent, strict=True):
        assert bench.read(stream.server, size) == bytes(size)
    idle.client.send(b"x")
    assert bench.read(idle.server, 1) == b"x"


def test_time_in_which_this_process_was_stopped_counts_as_nobodys_silence() -> None:
    """Neither for half a frame nor for what is not read: it has looked once in all that time."""
    with MuxBench(half_close_s=600, idle_s=3600) as bench:
        idle, half_closed = bench.join(), bench.join()
        half_close(half_closed.client)
        bench.until(lambda: half_closed.far.has_eof)
        bench.stall(idle.client)
        bench.far_call.send(b"\x04\x00")
        for _ in range(10):
            bench.clock.advance(5000)
            bench.turn(1)
        for _ in range(5):
            bench.clock.advance(1)
            bench.turn(1)
        assert not bench.near_owner.is_over
        assert not bench.far_owner.is_over
        assert {leg.ended for stream in (idle, half_closed) for leg in (stream.near, stream.far)} == {None}


def test_an_idle_mux_call_does_not_count_as_a_peer_that_does_not_read(bench: MuxBench) -> None:
    bench.tick(40)
    stream = bench.join()
    bench.tick(1)
    stream.client.send(b"x")
    assert bench.read(stream.server, 1) == b"x"


def test_drained_it_ends_with_its_last_stream_and_takes_no_more(bench: MuxBench) -> None:
    stream = bench.join()
    bench.far.drain(GoawayCode.LEASE_OVER)
    bench.until(lambda: bench.near_owner.drained)
    assert bench.near_owner.drained == [GoawayCode.LEASE_OVER]
    assert bench.near.open_room == 0
    stream.client.send(b"still here")
    assert bench.read(stream.server, 10) == b"still here"
    half_close(stream.client)
    half_close(stream.server)
    bench.until(lambda: bench.near_owner.is_over and bench.far_owner.is_over)
    assert bench.near_owner.problem is bench.far_owner.problem is None
    assert set(stream.ends.values()) == {LegEnd.DONE}


@pytest.mark.parametrize("end", ["near", "far"])
def test_drained_without_a_stream_it_ends_at_once(bench: MuxBench, end: str) -> None:
    getattr(bench, end).drain(GoawayCode.SHUTDOWN)
    bench.until(lambda: bench.near_owner.is_over and bench.far_owner.is_over)
    assert bench.near_owner.problem is bench.far_owner.problem is None


def test_both_may_drain_at_once(bench: MuxBench) -> None:
    bench.near.drain(GoawayCode.SHUTDOWN)
    bench.far.drain(GoawayCode.LEASE_OVER)
    bench.until(lambda: bench.near_owner.is_over and bench.far_owner.is_over)
    assert bench.near_owner.problem is bench.far_owner.problem is None


def test_an_open_that_crosses_the_goaway_is_refused_and_may_be_tried_elsewhere(bench: MuxBench) -> None:
    client, leg = bench.open()
    bench.far.drain(GoawayCode.LEASE_OVER)
    with client, leg.sock:
        bench.until(lambda: bench.near_owner.refusals)
        assert bench.near_owner.refusals == [(leg, ResetCode.SHUTDOWN)]  # it was not refused, but never seen
        bench.until(lambda: bench.near_owner.is_over)
    assert not bench.far_owner.requested


def test_an_open_that_crosses_a_draining_goaway_is_refused(bench: MuxBench) -> None:
    bench.join()
    client, leg = bench.open()
    bench.far.drain(GoawayCode.LEASE_OVER)
    with client, leg.sock:
        bench.until(lambda: bench.near_owner.refusals)
        assert bench.near_owner.refusals == [(leg, ResetCode.LEASE_OVER)]
    assert len(bench.far_owner.requested) == 1


def test_closed_every_stream_is_an_abort_at_both_ends(bench: MuxBench) -> None:
    streams = [bench.join() for _ in range(3)]
    bench.far.close(GoawayCode.REVOKED)
    bench.until(lambda: bench.near_owner.is_over and bench.far_owner.is_over)
    assert bench.near_owner.problem == "dom0 has ended it"
    assert bench.far_owner.problem is None
    for stream in streams:
        assert bench.is_aborted(stream.client)
        assert bench.is_aborted(stream.server)
    assert bench.is_all_back


def test_closed_towards_a_peer_that_reads_nothing_it_ends_soon(bench: MuxBench) -> None:
    streams = [bench.join() for _ in range(20)]
    bench.loop.change(bench.far_call.fileno(), 0)
    for stream in streams:
        bench.stall(stream.client)
    assert not bench.near.backlog.is_empty
    bench.is_time_still = True
    bench.near.close()
    bench.turn()
    assert not bench.near_owner.is_over
    bench.clock.advance(1.0)
    bench.until(lambda: bench.near_owner.is_over)
    assert bench.near_owner.problem is None


def test_a_lost_call_is_an_abort_of_every_stream(bench: MuxBench) -> None:
    """docs/behaviours.md, 27: within no time at all by the loop's own clock."""
    bench.is_time_still = True
    streams = [bench.join() for _ in range(3)]
    asked, waiting = bench.open()
    for sock in (bench.far_call, bench.far_sink):
        sock.shutdown(socket.SHUT_RDWR)
    for stream in streams:
        assert bench.is_aborted(stream.client)
        assert bench.is_aborted(stream.server)
    assert bench.is_aborted(asked)
    assert waiting.ended is LegEnd.REMOTE_RESET
    assert bench.near_owner.problem == "the byte stream ended without a final GOAWAY"
    assert bench.is_all_back
    asked.close()


def test_ten_thousand_streams_with_undelivered_bytes_are_polled_rarely(
    bench: MuxBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stalled client's leg is looked at eight times within its 0.8 s, and not 160 times."""
    looks = 0
    real = leg_module.unsent_bytes

    def counted(sock: socket.socket) -> int:
        nonlocal looks
        looks += 1
        return real(sock) or 1

    monkeypatch.setattr(leg_module, "unsent_bytes", counted)
    stream = bench.join()
    bench.far.close()
    bench.is_time_still = True
    bench.until(lambda: looks)
    for _ in range(170):
        bench.clock.advance(0.005)
        bench.turn(1)
    bench.until(lambda: "near" in stream.ends)
    assert looks <= 2 * 9


class Counting(socket.socket):
    """Counts its writes."""

    writes = 0

    def send(self, *arguments: Any) -> int:
        self.writes += 1
        return super().send(*arguments)

    def sendmsg(self, *arguments: Any) -> int:
        self.writes += 1
        return super().sendmsg(*arguments)


def test_frames_of_one_stream_that_come_in_a_row_are_one_write(bench: MuxBench) -> None:
    client, near = bench.open()
    other = bench.join()
    server, connected = tcp_pair()
    counting = Counting(fileno=connected.detach())
    counting.setblocking(False)
    assert bench.far.accept(near.stream_id, counting) is not None
    bench.until(lambda: near.is_joined)
    with client, server:
        # Written to the call beside the mux of this end, which would join what is one stream's.
        frame = wire.data_header(near.stream_id, 3) + b"abc"
        bench.near_call.send(frame + frame + wire.data_header(other.near.stream_id, 1) + b"x" + frame)
        assert bench.read(server, 9) == b"abc" * 3
        assert bench.read(other.server, 1) == b"x"
        assert counting.writes == 2


def mux_over(bench: MuxBench, source: socket.socket, sink: socket.socket) -> mux_module.Mux:
    """Another mux for the bench's owner."""
    connection = Connection(Hello(65536, bytes(16)), PORTS)
    return mux_module.Mux(bench.loop, connection, source, sink, Budget(), bench.near_owner)


def test_a_call_that_only_stops_taking_is_read_to_its_end_and_then_lost(bench: MuxBench) -> None:
    owner = bench.near_owner
    (source, far_source), (sink, far_sink) = unix_pair(), unix_pair()
    with source, far_source, sink:
        mux_over(bench, source, sink)
        far_sink.close()
        bench.turn()
        bench.clock.advance(0.9)
        bench.turn()
        assert not owner.is_over
        bench.until(lambda: owner.is_over)
        assert owner.problem == "the call takes nothing more"


class Troubled(socket.socket):
    """Raises a given error once, when it is read."""

    trouble: OSError | None = None

    def recv_into(self, *arguments: Any) -> int:
        trouble, self.trouble = self.trouble, None
        if trouble is not None:
            raise trouble
        return super().recv_into(*arguments)


@pytest.fixture
def troubled(bench: MuxBench) -> Iterator[Troubled]:
    """What another mux of the bench's owner reads, with something to read."""
    source, far = unix_pair()
    sink = bench.near_sink.dup()
    with Troubled(fileno=source.detach()) as source, far, sink:
        far.send(wire.encode_hello(Hello(65536, bytes(16), max_streams=1, lease_s=300)))
        bench.near_owner.is_ready = False
        mux = mux_over(bench, source, sink)
        yield source
        mux.abandon()


def test_an_error_of_the_call_is_named(bench: MuxBench, troubled: Troubled) -> None:
    troubled.trouble = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    bench.until(lambda: bench.near_owner.is_over)
    assert bench.near_owner.problem == "the call was lost: Connection reset by peer"


def test_a_spurious_wake_up_of_the_call_is_harmless(bench: MuxBench, troubled: Troubled) -> None:
    troubled.trouble = BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
    bench.until(lambda: bench.near_owner.is_ready)
    assert not bench.near_owner.is_over


def test_a_violation_ends_the_mux_call_with_its_reason_at_both_ends(bench: MuxBench) -> None:
    stream = bench.join()
    bench.far_call.send(b"\xff" * 8)
    bench.until(lambda: bench.near_owner.is_over)
    assert bench.near_owner.problem
    assert bench.near_owner.problem != "the byte stream ended without a final GOAWAY"
    bench.until(lambda: bench.far_owner.is_over)
    assert bench.far_owner.problem == "the other end closed the mux call: PROTOCOL_ERROR"
    assert bench.is_aborted(stream.client)
    assert bench.is_aborted(stream.server)


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 100])
def test_garbage_never_leaves_the_loop_as_an_exception(cut: int) -> None:
    with MuxBench(is_far_there=False) as bench:
        bench.far_call.send(random.Random(cut).randbytes(cut) or b"\0" * 8)
        bench.far_call.shutdown(socket.SHUT_WR)
        bench.until(lambda: bench.near_owner.is_over)
        assert bench.near_owner.problem


@pytest.mark.parametrize("number", [0, 1])
def test_a_call_that_cannot_be_watched_leaves_nothing(
    bench: MuxBench, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = bench.loop.watch

    def only_once(fd: int, *rest: object) -> None:
        if fd == (one, other)[number].fileno():
            raise OSError(errno.ENOSPC, "too many")
        real(fd, *rest)  # type: ignore[arg-type]

    one, other = socket.socketpair()
    with one, other:
        watched = bench.loop.watched
        monkeypatch.setattr(bench.loop, "watch", only_once)
        with pytest.raises(OSError, match="too many"):
            mux_module.Mux(
                bench.loop,
                Connection(Hello(65536, bytes(16)), PORTS),
                one,
                other,
                Budget(),
                bench.near_owner,
            )
        assert bench.loop.watched == watched


def test_abandoned_it_is_silent_and_leaves_the_call_alone(bench: MuxBench) -> None:
    stream = bench.join()
    bench.near.abandon()
    bench.near.abandon()
    assert not bench.near_owner.is_over
    assert bench.is_aborted(stream.client)
    assert bench.near_call.fileno() >= 0
    bench.turn()
