# SPDX-License-Identifier: GPL-2.0-or-later
"""What streams were lent and do not use comes back to those who can use it, in both directions."""

import contextlib
import select
import socket
import time
from collections.abc import Iterator

import pytest
from endings import MIB
from mux_bench import BOUND_S, Joined, MuxBench, pending_bytes

from qubes_fwd_qrexec.relay.budget import FLOOR_BYTES, INITIAL_BYTES, WINDOW_MAX_BYTES, Budget
from qubes_fwd_qrexec.relay.leg_end import LegEnd
from qubes_fwd_qrexec.relay.window import Window

# So small that a few dozen streams are lent more than half of it.
_IDLE = 100
_BUDGET_BYTES = 33 * MIB
_STREAMS_MAX = 128


@pytest.fixture
def bench() -> Iterator[MuxBench]:
    """Every stream is a fast one: no time passes."""
    near, far = Budget(_BUDGET_BYTES, _STREAMS_MAX), Budget(_BUDGET_BYTES, _STREAMS_MAX)
    with MuxBench(near_budget=near, far_budget=far) as bench:
        bench.is_time_still = True
        yield bench


class Way:
    """One direction through a stream: where bytes go in and come out, and the window that they use."""

    def __init__(self, bench: MuxBench, stream: Joined, *, is_up: bool) -> None:
        self._bench = bench
        self.source = stream.client if is_up else stream.server
        self.sink = stream.server if is_up else stream.client
        self.leg = stream.far if is_up else stream.near

    @property
    def window(self) -> Window:
        return self.leg.window

    def carry(self, size: int) -> None:
        """As fast as it goes."""
        left, got = size, 0
        deadline = time.monotonic() + BOUND_S
        while got < size:
            assert time.monotonic() < deadline, "it stands still"
            if left:
                with contextlib.suppress(BlockingIOError):
                    left -= self.source.send(bytes(min(left, 65536)))
            self._bench.loop.run_once(0)
            with contextlib.suppress(BlockingIOError):
                got += len(self.sink.recv(65536))

    def fill(self) -> None:
        """Send until nothing is taken any more, while nothing is read."""
        while True:
            try:
                self.source.send(bytes(65536))
            except BlockingIOError:
                if not self._bench.turn() and not select.select([], [self.source], [], 0)[1]:
                    return


BOTH_WAYS = pytest.mark.parametrize("is_up", [True, False], ids=["up", "down"])


def grow(bench: MuxBench, way: Way) -> int:
    """The window that one stream gets by carrying a lot."""
    way.carry(2 * MIB)
    return way.window.size


@BOTH_WAYS
def test_a_bulk_stream_beside_many_that_were_fast_once_has_a_window_as_if_alone(
    bench: MuxBench, is_up: bool
) -> None:
    alone = grow(bench, Way(bench, bench.join(), is_up=is_up))
    assert alone == WINDOW_MAX_BYTES
    idle = [Way(bench, bench.join(), is_up=is_up) for _ in range(_IDLE)]
    for way in idle:
        way.carry(MIB // 2)
    bulk = Way(bench, bench.join(), is_up=is_up)
    assert grow(bench, bulk) < alone, "there was to be little left"
    bench.tick(2)
    assert {way.window.size for way in idle} == {FLOOR_BYTES}
    assert grow(bench, bulk) == alone
    for way in idle:
        way.carry(MIB // 8)


@BOTH_WAYS
def test_what_streams_begin_with_comes_back_though_they_moved_nothing(is_up: bool) -> None:
    small = _STREAMS_MAX * FLOOR_BYTES + MIB
    with MuxBench(near_budget=Budget(small, _STREAMS_MAX), far_budget=Budget(small, _STREAMS_MAX)) as bench:
        bench.is_time_still = True
        ways = [Way(bench, bench.join(), is_up=is_up) for _ in range(_IDLE)]
        budget = bench.far_budget if is_up else bench.near_budget
        assert budget.shared_left < 7 * MIB // 8
        bench.tick(2)
        assert {way.window.size for way in ways} == {FLOOR_BYTES}
        assert budget.shared_left == MIB


@BOTH_WAYS
def test_streams_that_are_not_read_leave_something_for_the_next(bench: MuxBench, is_up: bool) -> None:
    """They keep what they hold, but each took less than the one before."""
    for _ in range(_IDLE):
        way = Way(bench, bench.join(), is_up=is_up)
        way.carry(MIB // 2)
        way.fill()
        assert pending_bytes(way.leg) > FLOOR_BYTES
    bench.tick(2)
    assert grow(bench, Way(bench, bench.join(), is_up=is_up)) >= 2 * INITIAL_BYTES


@BOTH_WAYS
def test_a_stream_that_is_busy_keeps_what_it_has(bench: MuxBench, is_up: bool) -> None:
    idle = [Way(bench, bench.join(), is_up=is_up) for _ in range(_IDLE)]
    for way in idle:
        way.carry(MIB // 2)
    busy = idle.pop()
    before = busy.window.size
    assert before > FLOOR_BYTES
    for _ in range(3):
        busy.carry(MIB)
        bench.tick(1)
    assert busy.window.size >= before
    assert {way.window.size for way in idle} == {FLOOR_BYTES}


def test_while_there_is_enough_nobody_is_asked(bench: MuxBench) -> None:
    way = Way(bench, bench.join(), is_up=True)
    before = grow(bench, way)
    bench.tick(5)
    assert way.window.size == before


def test_a_stream_that_ended_or_was_aborted_is_not_asked_and_all_comes_back(bench: MuxBench) -> None:
    streams = [bench.join() for _ in range(_IDLE)]
    for stream in streams:
        Way(bench, stream, is_up=True).carry(MIB // 2)
    for number, stream in enumerate(streams):
        if number % 3 == 1:
            stream.client.shutdown(socket.SHUT_WR)
        elif number % 3 == 2:
            stream.client.close()
    bench.tick(3)
    assert not bench.near.is_over
    assert not bench.far.is_over
    for stream in streams:
        stream.close()
    bench.until(lambda: not bench.near.legs and not bench.far.legs)
    for budget in (bench.near_budget, bench.far_budget):
        assert budget.shared_left == Budget(_BUDGET_BYTES, _STREAMS_MAX).shared_left


def test_where_the_kernel_holds_too_much_it_is_streams_that_stand_still_that_are_cut(
    bench: MuxBench,
) -> None:
    bench.far_budget.sockets.held_max = bench.near_budget.sockets.held_max = MIB
    others = [Way(bench, bench.join(), is_up=True) for _ in range(4)]
    stalled = [bench.join() for _ in range(6)]
    for stream in stalled:
        bench.stall(stream.client)
    sockets = bench.far_budget.sockets
    for _ in range(3):
        bench.tick(1)
        for way in others:
            way.carry(100)
    cut = [stream for stream in stalled if stream.far.ended is not None]
    assert 0 < len(cut) < len(stalled)
    assert {stream.ends["far"] for stream in cut} == {LegEnd.LOCAL_RESET}
    assert sockets.held <= MIB
    assert {way.leg.ended for way in others} == {None}
