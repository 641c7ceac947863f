# SPDX-License-Identifier: GPL-2.0-or-later
"""What waits for the call is bounded, and every stream gets a turn."""

import contextlib
import errno
import select
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from helpers import is_ready, no_fds_left, unix_pair
from mux_bench import BOUND_S, ORIGIN, PORTS, Joined, MuxBench

from qubes_fwd_qrexec.mux import FRAME_COST_BYTES, MIN_CREDIT_BYTES, Connection, Hello, wire
from qubes_fwd_qrexec.relay.backlog import MAX_BYTES, Backlog
from qubes_fwd_qrexec.relay.copy import abort, half_close
from qubes_fwd_qrexec.relay.loop import READ, Loop

MIB = 1 << 20
WINDOW_BYTES = 65536


@pytest.fixture
def bench() -> Iterator[MuxBench]:
    with no_fds_left(), MuxBench() as bench:
        yield bench


class Alone:
    """A backlog with no mux call around it: ``far`` is where its frames come out."""

    def __init__(self, kind: type[socket.socket] = socket.socket) -> None:
        self.loop = Loop()
        sink, self.far = unix_pair()
        self.sink = kind(fileno=sink.detach())
        self.connection = Connection(Hello(WINDOW_BYTES, bytes(16)), PORTS)
        self.hear(wire.encode_hello(Hello(WINDOW_BYTES, bytes(16), max_streams=1000, lease_s=1)))
        self.stream_id = self.connection.open_stream(PORTS.start, ORIGIN, WINDOW_BYTES)
        self.hear(wire.encode_accept(self.stream_id, WINDOW_BYTES))
        self.connection.data_to_send()
        self.told: list[str] = []
        self.backlog = Backlog(
            self.loop,
            self.connection,
            self.sink,
            lambda: self.told.append("ready"),
            lambda: self.told.append("broken"),
            lambda: self.told.append("failed"),
        )

    def close(self) -> None:
        self.backlog.let_go()
        self.loop.close()
        self.sink.close()
        self.far.close()

    def hear(self, frame: bytes) -> None:
        """The peer says so."""
        list(self.connection.receive_data(frame))

    def say(self, data: bytes) -> None:
        """Queue bytes of the stream, for which the peer gives credit again when that is worth a frame."""
        self.connection.send_data(self.stream_id, data)
        if (cost := len(data) + FRAME_COST_BYTES) >= MIN_CREDIT_BYTES:
            self.hear(wire.encode_credit(self.stream_id, cost))

    def fill(self) -> int:
        """Queue more than the sink takes; how much that is."""
        size = 0
        while self.backlog.is_empty:
            for payload in range(100):
                self.say(struct.pack(">I", payload) * 2000)
            size += self.connection.bytes_queued
            self.backlog.send()
        return size


@pytest.fixture
def alone() -> Iterator[Alone]:
    alone = Alone()
    yield alone
    alone.close()


def test_everything_goes_out_in_order_however_much_one_write_takes(alone: Alone) -> None:
    size = alone.fill()
    got = bytearray()
    while len(got) < size:
        got += alone.far.recv(12_345)
        alone.loop.run_once(0)
        if alone.told:
            alone.told.clear()
            alone.backlog.send()
    assert alone.backlog.is_empty
    frames = [got[start + 8 :][:8000] for start in range(0, size, 8008)]
    assert frames == [struct.pack(">I", number % 100) * 2000 for number in range(len(frames))]
    alone.loop.run_once(0)
    assert not alone.told  # with nothing to say, the kernel is not asked


def test_a_sink_that_takes_nothing_is_counted_in_ticks(alone: Alone) -> None:
    alone.backlog.tick()
    assert alone.backlog.stuck_ticks == 0
    alone.fill()
    for ticks in (1, 2, 3):
        alone.backlog.tick()
        assert alone.backlog.stuck_ticks == ticks
    alone.far.recv(MIB)
    alone.backlog.send()
    assert alone.backlog.stuck_ticks == 0


def test_a_broken_sink_is_reported_once_and_drops_what_is_queued(alone: Alone) -> None:
    alone.fill()
    alone.far.close()
    alone.backlog.send()
    assert alone.told == ["broken"]
    assert alone.backlog.is_empty
    alone.say(b"x" * 100)
    alone.backlog.send()
    assert alone.backlog.bytes_queued == 0
    alone.loop.run_once(0)
    assert alone.told == ["broken"]


def test_a_sink_that_breaks_while_nothing_is_sent_is_noticed(alone: Alone) -> None:
    alone.backlog.send()
    alone.far.close()
    alone.loop.run_once(0)
    assert alone.told == ["broken"]
    alone.loop.run_once(0)
    assert alone.told == ["broken"]


def test_what_waits_for_the_call_is_bounded_whatever_the_number_of_streams(bench: MuxBench) -> None:
    streams = [bench.join() for _ in range(20)]
    bench.loop.change(bench.far_call.fileno(), 0)
    for stream in streams:
        bench.stall(stream.client)
    assert bench.near.backlog.bytes_queued <= MAX_BYTES + 40_000
    assert len(bench.near.backlog.waiting) == len({*bench.near.backlog.waiting}) <= 20
    assert bench.wake_ups() == 0
    abort(streams[0].client)
    streams[0].near.abort_from_here()
    assert streams[0].near not in bench.near.backlog.waiting


def turns_of(bench: MuxBench, stream: Joined, beside: Sequence[Joined] = ()) -> int:
    """In how many turns a byte of the client is given to the server; in each, ``beside`` have bulk to move.

    From when the kernel has brought it here until it is given to the kernel there.
    """
    stream.client.send(b"x")
    before = stream.far.received
    assert select.select([stream.near.sock], [], [], BOUND_S)[0]
    turns = 0
    while stream.far.received == before:
        assert turns < 200
        for bulk in beside:
            move(bulk)
        bench.loop.run_once(0)
        turns += 1
    assert bench.read(stream.server, 1) == b"x"
    return turns


def test_a_small_stream_beside_many_bulk_ones_has_its_turn(bench: MuxBench) -> None:
    """docs/behaviours.md, 20, counted in turns: no clock, and no other load, comes into it."""
    bulk = [bench.join() for _ in range(16)]
    small = bench.join()
    bench.stall(*(stream.client for stream in bulk))
    took = sorted(turns_of(bench, small, bulk) for _ in range(50))
    assert took[25] <= 6
    # It may come when what is queued is at its bound: then each of the others has one turn before it.
    assert took[-1] <= 40


def test_a_stream_beside_63_that_stall_takes_as_many_turns_as_alone(bench: MuxBench) -> None:
    """docs/behaviours.md, 19. A turn is no longer either: of those that stall there is no news."""
    small = bench.join()
    alone = [turns_of(bench, small) for _ in range(20)]
    bench.stall(*(bench.join().client for _ in range(63)))
    assert [turns_of(bench, small) for _ in range(20)] == alone
    assert bench.wake_ups() == 0


def move(stream: Joined) -> None:
    """Bulk from the client to the server, as much as there is room for."""
    with contextlib.suppress(BlockingIOError):
        stream.server.recv(MIB)
    with contextlib.suppress(BlockingIOError):
        stream.client.send(bytes(65536))


def test_bulk_streams_share_the_call(bench: MuxBench) -> None:
    streams = [bench.join() for _ in range(8)]
    got = [0] * len(streams)
    while max(got) < 8 * MIB:
        for number, stream in enumerate(streams):
            with contextlib.suppress(BlockingIOError):
                stream.client.send(bytes(65536))
            with contextlib.suppress(BlockingIOError):
                got[number] += len(stream.server.recv(MIB))
        bench.loop.run_once(0)
    assert min(got) * 3 > max(got)


def test_bulk_of_servers_that_have_closed_both_ways_keeps_its_turns(bench: MuxBench) -> None:
    """The kernel says HUP of them, so their sockets are not watched while they wait for their turn."""
    streams = [bench.join() for _ in range(8)]
    for stream in streams:
        half_close(stream.client)
    bench.until(lambda: all(stream.far.has_eof for stream in streams))
    to_send, to_come = (dict.fromkeys(streams, MIB) for _ in range(2))

    def all_has_come() -> bool:
        for stream in streams:
            with contextlib.suppress(BlockingIOError):
                if to_send[stream]:
                    to_send[stream] -= stream.server.send(bytes(to_send[stream]))
                    if not to_send[stream]:
                        half_close(stream.server)
            with contextlib.suppress(BlockingIOError):
                to_come[stream] -= len(stream.client.recv(MIB))
        return not any(to_come.values())

    bench.until(all_has_come)
    for stream in streams:
        assert bench.read_to_end(stream.client) == (b"", "EOF")


def test_a_stream_that_waits_is_remembered_once_and_forgotten_with_its_end(bench: MuxBench) -> None:
    bench.near_sink.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)  # not all fit in there
    streams = [bench.join() for _ in range(30)]
    bench.loop.change(bench.far_call.fileno(), 0)
    for stream in streams:
        bench.stall(stream.client)
    assert bench.near.backlog.bytes_queued > 0
    waiting = list(bench.near.backlog.waiting)
    assert waiting
    for leg in waiting:
        leg.resume()  # credit came
    bench.turn()
    assert list(bench.near.backlog.waiting) == waiting
    for leg in waiting:
        leg.abort_from_here()
    assert not bench.near.backlog.waiting


def test_nobody_waits_behind_those_who_have_nothing_to_send_any_more() -> None:
    """No second passes, which would give another two their turn: all have it as fast as the loop turns."""
    with no_fds_left(), MuxBench() as bench:
        bench.is_time_still = True
        bench.near_sink.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)  # not all fit in there
        streams = [bench.join() for _ in range(30)]
        bench.loop.change(bench.far_call.fileno(), 0)
        for stream in streams:
            bench.stall(stream.client)
        waiting = list(bench.near.backlog.waiting)
        assert len(waiting) > 4
        for leg in waiting:
            with contextlib.suppress(BlockingIOError):
                while leg.sock.recv(MIB):
                    pass
        bench.loop.change(bench.far_call.fileno(), READ)
        bench.until(lambda: not bench.near.backlog.waiting)


class Stream:
    """Of ``alone``, when it may send: what it was told it may."""

    def __init__(self, alone: Alone, *, is_bulk: bool) -> None:
        self.stream_id = alone.stream_id
        self.is_bulk = is_bulk
        self.limits: list[int] = []
        self._backlog = alone.backlog

    def resume(self) -> None:
        self.limits.append(self._backlog.room_now(self))

    def fail(self) -> None:
        raise AssertionError("there was a bug")


def test_bulk_waits_for_a_call_that_takes_nothing_and_what_is_small_does_not(alone: Alone) -> None:
    bulk, small = Stream(alone, is_bulk=True), Stream(alone, is_bulk=False)
    assert alone.backlog.room(bulk) == alone.backlog.room(small) > 0
    while alone.backlog.is_empty:
        alone.say(bytes(8000))
        alone.backlog.send()
    assert alone.backlog.room_now(bulk) == alone.backlog.room(bulk) == 0
    assert alone.backlog.room(small) > 0
    assert list(alone.backlog.waiting) == [bulk]
    alone.backlog.give_turns()
    assert not bulk.limits
    while not alone.backlog.is_empty:
        alone.far.recv(MIB)
        alone.backlog.send()
    alone.backlog.give_turns()
    assert len(bulk.limits) == 1
    assert bulk.limits[0] > alone.connection.send_limit(bulk.stream_id)  # several frames
    assert not alone.backlog.waiting


def test_bulk_waits_behind_what_waits_already(alone: Alone) -> None:
    first, second = Stream(alone, is_bulk=True), Stream(alone, is_bulk=True)
    alone.backlog.waiting[first] = None
    assert alone.backlog.room_now(second) == alone.backlog.room(second) == 0
    assert list(alone.backlog.waiting) == [first, second]
    alone.backlog.give_turns()
    assert first.limits[0] > 0
    assert not second.limits
    assert alone.backlog.room(first) == 0  # it has had its turn
    assert list(alone.backlog.waiting) == [second, first]
    alone.loop.run_once(0)
    assert alone.told == ["ready"]  # and the next one has his, whatever the first one does


class Slow(socket.socket):
    """Takes three bytes of a single buffer."""

    def send(self, data: Any, *flags: int) -> int:
        return super().send(data[:3], *flags)


def test_a_frame_of_which_the_call_takes_a_part_at_once_is_finished_and_nothing_waits_then() -> None:
    alone = Alone(Slow)
    try:
        frame = wire.data_header(1, 5) + b"hello"
        alone.backlog.send_now(memoryview(frame))
        assert alone.far.recv(100) == frame
        assert alone.backlog.bytes_queued == 0
        alone.backlog.tick()
        assert alone.backlog.stuck_ticks == 0
    finally:
        alone.close()


class Short(socket.socket):
    """The kernel has no memory for what it is sent, ``times`` times."""

    left = 0

    def send(self, *arguments: Any) -> int:
        self._run_short()
        return super().send(*arguments)

    def sendmsg(self, *arguments: Any) -> int:
        self._run_short()
        return super().sendmsg(*arguments)

    def _run_short(self) -> None:
        if self.left:
            self.left -= 1
            raise OSError(errno.ENOBUFS, "No buffer space available")


@pytest.mark.parametrize("is_at_once", [False, True])
def test_a_shortage_of_memory_ends_no_call_and_is_waited_out(is_at_once: bool) -> None:
    alone = Alone(Short)
    try:
        assert isinstance(alone.sink, Short)
        alone.sink.left = 3
        frame = wire.data_header(1, 5) + b"hello"
        if is_at_once:
            alone.backlog.send_now(memoryview(frame))
        else:
            alone.say(b"hello")
            alone.backlog.send()
        for _ in range(4):
            assert not is_ready(alone.loop)  # nor does it spin meanwhile
            alone.backlog.tick()
        assert alone.far.recv(100) == frame
        assert alone.told == []
        assert alone.backlog.is_empty
    finally:
        alone.close()
