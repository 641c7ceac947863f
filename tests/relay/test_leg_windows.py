# SPDX-License-Identifier: GPL-2.0-or-later
"""The windows of one stream: how they grow and shrink, and that no byte waits for ever."""

import random
import socket
import time

import pytest
from endings import MIB, pattern
from mux_bench import BOUND_S, Joined, MuxBench, pending_bytes

from qubes_fwd_qrexec.mux import FRAME_COST_BYTES
from qubes_fwd_qrexec.relay.budget import FLOOR_BYTES, INITIAL_BYTES, WINDOW_MAX_BYTES, Budget
from qubes_fwd_qrexec.relay.copy import half_close
from qubes_fwd_qrexec.relay.leg import Leg


def check_window(bench: MuxBench, leg: Leg) -> None:
    """A window is what the peer may still send, what waits here, and what is not granted again yet."""
    granted = bench.far.connection.granted(leg.stream_id)
    assert leg.window.size == granted + pending_bytes(leg) + leg.window.owed
    assert FLOOR_BYTES <= leg.window.size <= WINDOW_MAX_BYTES


@pytest.mark.parametrize("size", [1, 32767, 32768, 32769, 4 * MIB + 1])
def test_every_byte_arrives_and_windows_add_up(bench: MuxBench, stream: Joined, size: int) -> None:
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


def test_a_fast_stream_gets_a_large_window_and_a_slow_one_gives_it_back(
    bench: MuxBench, stream: Joined
) -> None:
    carry(bench, stream, 4 * MIB)
    assert stream.far.window.size == WINDOW_MAX_BYTES
    assert bench.far_budget.shared_left == Budget().shared_left - (WINDOW_MAX_BYTES - FLOOR_BYTES)
    carry(bench, stream, 4 * MIB, turn_s=0.2)
    assert stream.far.window.size == INITIAL_BYTES
    check_window(bench, stream.far)
    carry(bench, stream, MIB)


def carry(bench: MuxBench, stream: Joined, size: int, turn_s: float = 0.0) -> None:
    """So much from the client to the server, while each turn takes so long."""
    left, got = size, 0
    deadline = time.monotonic() + BOUND_S
    while got < size:
        assert time.monotonic() < deadline, "it stands still"
        left -= send_some(stream.client, bytes(min(left, 65536))) if left else 0
        bench.clock.advance(turn_s)
        bench.loop.run_once(0)
        got += len(receive_some(stream.server, 65536))


def test_a_tight_budget_takes_back_what_it_lent_even_from_the_fast() -> None:
    with MuxBench(far_budget=Budget(32 * MIB, 16)) as bench:
        stream = bench.join()
        carry(bench, stream, 4 * MIB)
        assert stream.far.window.size == WINDOW_MAX_BYTES
        others = bench.far_budget.shared_left
        bench.far_budget.shared_left = 0
        carry(bench, stream, 4 * MIB)
        assert stream.far.window.size <= INITIAL_BYTES
        bench.far_budget.shared_left += others


@pytest.mark.parametrize("seed", range(5))
def test_no_stream_stands_still_however_its_window_changes(
    bench: MuxBench, stream: Joined, seed: int
) -> None:
    """Fast and slow as chance has it, through socket buffers that take a little at a time."""
    chance = random.Random(seed)
    stream.far.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    for _ in range(40):
        carry(bench, stream, chance.randrange(1, 300_000), turn_s=chance.choice((0.0, 0.05, 0.2)))
        check_window(bench, stream.far)
    assert bench.near.connection.send_limit(stream.near.stream_id) > 0


def test_the_floor_alone_suffices() -> None:
    with MuxBench(far_budget=Budget(16 * FLOOR_BYTES, 16)) as bench:
        stream = bench.join()
        assert stream.far.window.size == FLOOR_BYTES
        carry(bench, stream, 300_000)
        assert stream.far.window.size == FLOOR_BYTES


@pytest.mark.parametrize("left", [0, 1, 63, 64, 65, 66])
@pytest.mark.parametrize("is_late", [False, True], ids=["read at once", "read late"])
def test_no_credit_is_too_little_to_be_added_to(
    bench: MuxBench, stream: Joined, left: int, is_late: bool
) -> None:
    """With 1 to 64 bytes a sender has nothing that it could send; the receiver may not wait for it."""
    before = bench.stall(stream.far.sock) if is_late else 0  # the server's socket is full
    size = stream.far.window.size - FRAME_COST_BYTES - left
    assert stream.client.send(bytes(size)) == size
    bench.until(lambda: stream.far.received)
    assert (pending_bytes(stream.far) > 0) is is_late
    assert stream.far.received == size, "it was to be one frame"
    stream.client.send(b"more")
    bench.read(stream.server, before + size + 4)
