# SPDX-License-Identifier: GPL-2.0-or-later
"""How much of what a peer sends is taken in one turn of the loop, which carries everybody else, too."""

from itertools import pairwise

import pytest
from flow_bench import ORIGIN, FlowBench, Kept
from helpers import unix_pair
from mux_bench import MuxBench

from qubes_fwd_qrexec.mux import FlowCode, ProxyVersion, wire
from qubes_fwd_qrexec.relay.loop import READ
from qubes_fwd_qrexec.relay.muxbase import TURN_FRAMES

# More than three turns take, in one write.
COUNT = 3 * TURN_FRAMES + 10


def datagrams(flow_id: int, data: bytes, segment: int = 0) -> bytes:
    return wire.datagrams_header(flow_id, segment, len(data)) + data


def turns_until(bench: FlowBench, there: Kept, frames: bytes) -> int:
    """How many turns the target needs for these frames of an enemy and one more datagram, read at once."""
    flow_id = max(bench.target.flows)
    assert bench.calls[0].send(frames + datagrams(flow_id, b"after")) > len(frames)
    turns = 0
    while b"after" not in there.datagrams:
        bench.target.loop.run_once(0.0)
        turns += 1
        assert len(there.datagrams) <= turns * (TURN_FRAMES + 63)
    return turns


@pytest.mark.parametrize(
    ("frame", "number"),
    [
        (datagrams(2, b""), 1),
        (datagrams(2, b"x" * 64, 1), 64),
        (datagrams(1, b""), 1),
        (wire.encode_end(1, FlowCode.DONE), 1),
    ],
    ids=["empty datagrams", "many in a frame", "datagrams of a flow that is over", "ends of one"],
)
def test_a_flood_of_datagrams_or_frames_takes_a_bounded_part_of_each_turn(frame: bytes, number: int) -> None:
    with FlowBench() as bench:
        over, _, _ = bench.joined()
        bench.target.end(over, FlowCode.DONE)
        _, _, there = bench.joined()
        assert turns_until(bench, there, frame * (COUNT // number)) == 1 + COUNT // TURN_FRAMES
        assert len(there.datagrams) in (1, 1 + COUNT // number * number)


def test_what_a_mux_call_brings_at_once_and_is_large_is_taken_in_one_turn() -> None:
    with FlowBench() as bench:
        _, _, there = bench.joined()
        assert turns_until(bench, there, datagrams(1, bytes(46 * 1400), 1400) * 3) == 1


def test_others_of_the_loop_have_their_turn_while_a_flood_is_taken() -> None:
    with FlowBench() as bench:
        _, _, there = bench.joined()
        seen: list[int] = []
        one, other = unix_pair()
        with one, other:
            other.send(b"x")  # which nobody reads, so it is served in each turn
            loop = bench.target.loop
            loop.watch(one.fileno(), READ, lambda _: seen.append(len(there.datagrams)), bench.target.fail)
            turns = turns_until(bench, there, datagrams(1, b"x") * COUNT)
            loop.unwatch(one.fileno())
        assert len(seen) == turns
        assert all(later - earlier <= TURN_FRAMES for earlier, later in pairwise([0, *seen]))


def test_what_comes_while_a_flood_is_taken_waits_for_its_turn() -> None:
    with FlowBench() as bench:
        _, _, there = bench.joined()
        bench.calls[0].send(datagrams(1, b"x") * COUNT)
        bench.target.loop.run_once(0.0)
        bench.calls[0].send(datagrams(1, b"later"))
        bench.run(lambda: len(there.datagrams) > COUNT)
        assert there.datagrams == [b"x"] * COUNT + [b"later"]


def test_a_violation_behind_a_flood_ends_the_call_when_its_turn_comes() -> None:
    with FlowBench() as bench:
        _, _, there = bench.joined()
        bench.calls[0].send(datagrams(1, b"x") * COUNT + bytes(8))
        bench.target.loop.run_once(0.0)
        assert not bench.target.is_over
        bench.run(lambda: bench.target.is_over)
        assert bench.target.is_peer_wrong
        assert len(there.datagrams) == COUNT


@pytest.mark.parametrize("is_abandoned", [False, True])
def test_what_a_flood_has_left_is_dropped_with_its_call(is_abandoned: bool) -> None:
    with FlowBench() as bench:
        _, _, there = bench.joined()
        begin = wire.encode_flow(2, wire.FlowRequest(53, ORIGIN, ProxyVersion.OFF))
        bench.calls[0].send(datagrams(1, b"x") * COUNT + begin)
        bench.target.loop.run_once(0.0)
        taken = len(there.datagrams)
        (bench.target.abandon if is_abandoned else bench.target.fail)()
        for _ in range(5):
            bench.target.loop.run_once(0.0)
        assert len(bench.target_owner.requests) == 1
        assert (len(there.datagrams), there.code is None) == (taken, False)
        assert taken == TURN_FRAMES


def test_answers_to_a_flood_do_not_wait_for_its_end() -> None:
    with FlowBench() as bench:
        bench.joined()
        bench.settle()
        bench.calls[0].send(wire.encode_ping(bytes(8)) + datagrams(1, b"x") * COUNT)
        bench.target.loop.run_once(0.0)
        assert wire.encode_pong(bytes(8)) in bench.calls[0].recv(1000)


def test_streams_take_no_more_of_a_turn_and_nothing_is_lost_or_out_of_order() -> None:
    """Frames of two streams alternate, so that each is written by itself."""
    with MuxBench() as bench:
        one, other = bench.join(), bench.join()
        bench.far.abandon()
        ids = one.near.stream_id, other.near.stream_id
        half = TURN_FRAMES - 10  # what the first credit is enough for
        frames = b"".join(
            wire.data_header(stream_id, 1) + bytes([number % 251])
            for number in range(half)
            for stream_id in ids
        )
        bench.far_call.send(frames + wire.encode_eof(ids[0]))
        bench.loop.run_once(0.0)
        assert one.near.received + other.near.received == TURN_FRAMES
        bench.until(lambda: one.near.has_eof)
        sent = bytes(number % 251 for number in range(half))
        assert (bench.read(one.client, half), bench.read(other.client, half)) == (sent, sent)


def test_what_a_turn_has_of_one_stream_is_written_in_it() -> None:
    with MuxBench() as bench:
        stream = bench.join()
        bench.far.abandon()
        frame = wire.data_header(stream.near.stream_id, 1) + b"x"
        bench.far_call.send(frame * (TURN_FRAMES + 20))
        for received in (TURN_FRAMES, TURN_FRAMES + 20):
            bench.loop.run_once(0.0)
            assert stream.near.received == received
