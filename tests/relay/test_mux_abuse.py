# SPDX-License-Identifier: GPL-2.0-or-later
"""The attacks of docs/behaviours.md, 50 to 52 on the driver: the bounds of the protocol hold in it too.

tests/mux/test_attacks.py plays them against the protocol alone.
"""

import contextlib
import gc
import tracemalloc
from collections.abc import Callable

import pytest
from mux_bench import ORIGIN, PORTS, Joined, MuxBench

from qubes_fwd_qrexec.mux import ProxyVersion, ResetCode, abuse, wire
from qubes_fwd_qrexec.mux.limits import FRAME_COST_BYTES

# More than any bound below allows.
_ATTEMPTS = 40_000


def attack(bench: MuxBench, make_frame: Callable[[int], bytes]) -> int:
    """Frames of a listener side that never reads; how many were sent before the mux call was over."""
    bench.near.abandon()
    sent = 0
    while sent < _ATTEMPTS and not bench.far_owner.is_over:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            bench.near_call.sendall(make_frame(sent))
            sent += 1
        bench.turn(2)
        assert bench.far.backlog.bytes_queued <= bench.far.connection.control_bound_bytes + 4096
    return sent


def test_pings_of_a_peer_that_does_not_read_end_the_mux_call() -> None:
    with MuxBench(max_streams=1) as bench:
        assert attack(bench, lambda number: wire.encode_ping(number.to_bytes(8, "big"))) < _ATTEMPTS
        assert bench.far_owner.problem == "a PING before the PONG to the last one was sent"


def test_streams_that_are_refused_to_a_peer_that_does_not_read_end_the_mux_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each OPEN and RESET is answered, and the answers wait; ticks pass, so that none is held back."""
    monkeypatch.setattr(abuse, "RAPID_RESETS_PER_TICK", _ATTEMPTS)

    with MuxBench(max_streams=1) as bench:
        bench.far.connection.control_bound_bytes = 2000

        def make_frame(number: int) -> bytes:
            request = wire.OpenRequest(4096, PORTS.start, ORIGIN, ProxyVersion.OFF)
            stream_id = number + 1
            return wire.encode_open(stream_id, request) + wire.encode_reset(stream_id, ResetCode.ABORTED)

        assert attack(bench, make_frame) < _ATTEMPTS
        assert bench.far_owner.problem == "the peer sends and does not read"


def test_answers_that_were_held_back_are_written_by_the_tick_though_nothing_else_moves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """docs/behaviours.md, 50: else a listener side that has all its slots in them would wait for ever."""
    monkeypatch.setattr(abuse, "RAPID_RESETS_PER_TICK", 3)
    with MuxBench(max_streams=6) as bench:
        for _ in range(6):
            client, leg = bench.open()
            bench.turn()
            leg.abort_from_here()
            bench.turn()
            client.close()
        assert bench.near.open_room == 3
        bench.tick(1)
        bench.until(lambda: bench.near.open_room == 6)


def test_frames_of_one_byte_occupy_no_more_than_the_credit_they_cost() -> None:
    """docs/behaviours.md, 18 and 51. Frames of two streams alternate, so that none are joined."""
    with MuxBench() as bench:
        streams = [bench.join(), bench.join()]
        for stream in streams:
            fill(stream)
        legs = [stream.far for stream in streams]
        count = min(bench.far.connection.granted(leg.stream_id) for leg in legs) // (FRAME_COST_BYTES + 1)
        frames = b"".join(wire.data_header(leg.stream_id, 1) + b"x" for _ in range(count) for leg in legs)
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            view = memoryview(frames)
            while view:
                with contextlib.suppress(BlockingIOError):
                    view = view[bench.near_call.send(view[:32768]) :]
                bench.turn(1)
            bench.turn()
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
        assert [leg.received for leg in legs] == [count, count]
        assert grown <= 2 * count * (FRAME_COST_BYTES + 1)


def fill(stream: Joined) -> None:
    """Make the far leg keep what arrives."""
    with contextlib.suppress(BlockingIOError):
        while True:
            stream.far.sock.send(bytes(65536))
