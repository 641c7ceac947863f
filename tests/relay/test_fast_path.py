# SPDX-License-Identifier: GPL-2.0-or-later
"""A lone small payload takes a fast path from socket to call, and from call to socket."""

import contextlib
import random
import struct
from collections.abc import Iterator

import pytest
from helpers import unix_pair
from mux_bench import PORTS, MuxBench

from qubes_fwd_qrexec.mux import HEADER_BYTES, MAX_DATA_BYTES, Connection, Hello, ResetCode
from qubes_fwd_qrexec.relay.backlog import BULK_FRAMES, TURN_BYTES, Backlog
from qubes_fwd_qrexec.relay.copy import abort, half_close
from qubes_fwd_qrexec.relay.leg_end import LegEnd
from qubes_fwd_qrexec.relay.loop import Loop


@pytest.fixture
def short(bench: MuxBench, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Notes how many bytes each end sent on the fast path."""
    sent: list[tuple[str, int]] = []
    for name, mux in (("near", bench.near), ("far", bench.far)):
        real = mux.send_now

        def send_now(stream_id: int, length: int, name=name, real=real) -> None:  # type: ignore[no-untyped-def]
            sent.append((name, length))
            real(stream_id, length)

        monkeypatch.setattr(mux, "send_now", send_now)
    return sent


def test_a_byte_there_and_back_takes_the_fast_path(bench: MuxBench, short: list[tuple[str, int]]) -> None:
    stream = bench.join()
    stream.client.send(b"?")
    bench.loop.run_once(1)  # out of the client's socket: nothing is left for the end of the turn
    bench.loop.run_once(1)  # and into the server's
    assert stream.server.recv(10) == b"?"
    stream.server.send(b"!!")
    bench.loop.run_once(1)
    bench.loop.run_once(1)
    assert stream.client.recv(10) == b"!!"
    assert short == [("near", 1), ("far", 2)]


def test_two_streams_that_speak_at_once_share_a_write(bench: MuxBench, short: list[tuple[str, int]]) -> None:
    streams = [bench.join(), bench.join()]
    for stream in streams:
        stream.client.send(b"hello")
    bench.until(lambda: all(stream.far.received for stream in streams))
    assert [stream.server.recv(10) for stream in streams] == [b"hello", b"hello"]
    assert not short


def test_bulk_is_read_and_written_in_several_frames_at_once(
    bench: MuxBench, short: list[tuple[str, int]]
) -> None:
    stream = bench.join()
    sent = random.Random(1).randbytes(2 << 20)
    left, got = memoryview(sent), bytearray()

    def all_there() -> bool:
        nonlocal left
        with contextlib.suppress(BlockingIOError):
            left = left[stream.client.send(left) :]
        with contextlib.suppress(BlockingIOError):
            got.extend(stream.server.recv(1 << 20))
        return len(got) == len(sent)

    bench.until(all_there)
    assert bytes(got) == sent
    assert sum(length for _, length in short) > len(sent) // 2  # the rest came while something was queued
    assert MAX_DATA_BYTES < max(length for _, length in short) <= TURN_BYTES


def test_an_end_and_an_abort_are_seen_on_the_fast_path_too(bench: MuxBench) -> None:
    ended, aborted = bench.join(), bench.join()
    half_close(ended.client)
    bench.until(lambda: ended.far.has_eof)
    assert ended.server.recv(1) == b""
    abort(aborted.client)
    bench.until(lambda: "far" in aborted.ends)
    assert aborted.ends["near"] is LegEnd.LOCAL_RESET


def test_what_overtakes_nothing_waits_behind_what_is_queued(
    bench: MuxBench, short: list[tuple[str, int]]
) -> None:
    one, other = bench.join(), bench.join()
    bench.near.connection.reset_stream(other.near.stream_id, ResetCode.ABORTED)
    one.client.send(b"later")
    bench.until(lambda: one.far.received == 5)
    assert not short


class Alone:
    """A backlog with no mux call around it, and a frame to send."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.sink, self.far = unix_pair()
        self.told: list[str] = []
        self.backlog = Backlog(
            self.loop,
            Connection(Hello(65536, bytes(16), max_streams=1000, lease_s=1), PORTS),
            self.sink,
            lambda: self.told.append("ready"),
            lambda: self.told.append("broken"),
            lambda: self.told.append("failed"),
        )
        self.backlog.send()
        self.hello_bytes = len(self.far.recv(1000))


@pytest.fixture
def alone() -> Iterator[Alone]:
    alone = Alone()
    yield alone
    alone.backlog.let_go()
    alone.loop.close()
    alone.sink.close()
    alone.far.close()


def test_what_the_call_does_not_take_at_once_is_kept_in_its_order(alone: Alone) -> None:
    frame = bytearray(HEADER_BYTES + 8000)
    count = 0
    while alone.backlog.is_empty:
        frame[:] = struct.pack(">I", count) * (len(frame) // 4)
        alone.backlog.send_now(memoryview(frame))
        count += 1
    frame[:] = bytes(len(frame))  # the caller uses it again
    got = bytearray()
    while len(got) < count * len(frame):
        got += alone.far.recv(100_000)
        alone.backlog.send()
    expected = b"".join(struct.pack(">I", number) * (len(frame) // 4) for number in range(count))
    assert got == expected
    assert alone.backlog.is_empty


def test_a_whole_turn_goes_out_in_one_write(alone: Alone) -> None:
    alone.backlog.send_now(memoryview(bytes(BULK_FRAMES * HEADER_BYTES + TURN_BYTES)))
    assert alone.backlog.is_empty  # although nobody has read any of it


def test_a_broken_call_is_reported_once(alone: Alone) -> None:
    alone.far.close()
    alone.backlog.send_now(memoryview(bytes(HEADER_BYTES + 1)))
    assert alone.told == ["broken"]
    assert alone.backlog.is_empty
