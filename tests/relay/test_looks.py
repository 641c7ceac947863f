# SPDX-License-Identifier: GPL-2.0-or-later
"""Which streams are asked what they hold: those that may hold something, and no others."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from endings import MIB
from mux_bench import MuxBench

from qubes_fwd_qrexec.relay.budget import FLOOR_BYTES, Budget, Share
from qubes_fwd_qrexec.relay.looks import BYTES, FLOORS, LENT, Looks


@dataclass
class Stream:
    moved_at: float
    seen: int


@pytest.fixture
def share() -> Share:
    return Share(Budget())


def crowd(share: Share) -> None:
    share.sockets.buffers = 10_000


def test_where_there_is_enough_nobody_is_looked_at(share: Share) -> None:
    assert Looks().due([Stream(0, BYTES)], share, 0) == []


@pytest.mark.parametrize("is_short", [False, True])
def test_what_was_seen_says_who_is_looked_at_again(share: Share, is_short: bool) -> None:
    crowd(share)
    if is_short:
        share.sockets.left = 0
    looks = Looks()
    streams = [Stream(0, seen) for seen in (FLOORS, LENT, BYTES)]
    assert looks.due(streams, share, 1) == streams, "each is new"
    assert looks.due(streams, share, 2) == streams[1 if is_short else 2 :]


def test_who_has_moved_something_since_is_looked_at(share: Share) -> None:
    looks = Looks()
    crowd(share)
    looks.due([], share, 10)
    before, meanwhile = Stream(9, FLOORS), Stream(10, FLOORS)
    assert looks.due([before, meanwhile], share, 20) == [meanwhile]
    share.sockets.buffers = 0
    looks.due([], share, 30)
    crowd(share)
    later = Stream(20, FLOORS)
    assert looks.due([meanwhile, later], share, 40) == [later], (
        "it counts from the last look, not the last second"
    )


@pytest.fixture
def bench() -> Iterator[MuxBench]:
    """The sockets of a few streams are a crowd already."""
    far = Budget()
    far.sockets.held_max = MIB
    with MuxBench(far_budget=far) as bench:
        yield bench


def test_a_stream_that_only_waits_has_nothing_or_what_it_was_lent(bench: MuxBench) -> None:
    legs = [bench.join().far for _ in range(4)]
    assert {leg.seen for leg in legs} == {BYTES}, "nobody has looked"
    bench.tick(1)
    assert {leg.seen for leg in legs} == {LENT}
    bench.far_budget.shared_left = bench.far_budget.sockets.left = 0
    bench.tick(2)
    assert {leg.seen for leg in legs} == {FLOORS}
    assert {leg.window.size for leg in legs} == {FLOOR_BYTES}


def test_a_stream_whose_server_reads_nothing_holds_bytes_until_it_does(bench: MuxBench) -> None:
    streams = [bench.join() for _ in range(4)]
    bench.tick(1)
    stream = streams[0]
    sent = bench.stall(stream.client)
    bench.tick(2)
    assert [one.far.seen for one in streams] == [BYTES, LENT, LENT, LENT]
    bench.read(stream.server, sent)
    bench.until(lambda: not stream.far.pending)
    bench.tick(1)
    assert stream.far.seen == LENT


def test_what_a_client_sends_before_it_is_accepted_is_looked_at(bench: MuxBench) -> None:
    bench.near_budget.sockets.held_max = 0
    client, leg = bench.open()
    bench.tick(2)
    assert leg.seen == BYTES
    client.close()


def test_a_stream_that_waits_for_credit_may_get_bytes_which_are_not_read(bench: MuxBench) -> None:
    """What its socket holds then came without a byte being moved here."""
    streams = [bench.join() for _ in range(4)]
    bench.stall(streams[0].server)
    bench.tick(1)
    assert [one.far.seen for one in streams] == [BYTES, LENT, LENT, LENT]


def test_a_stream_that_waits_for_its_turn_may_get_bytes_as_well(bench: MuxBench) -> None:
    bulk, other = bench.join(), bench.join()
    near = bench.near
    bench.near_budget.sockets.held_max = 0
    bench.tick(1)
    assert bulk.near.seen == LENT
    bulk.near.is_bulk = True
    near.backlog.waiting[other.near] = None
    bulk.client.send(b"x")
    bench.until(lambda: bulk.near in near.backlog.waiting)
    assert (bulk.near.seen, bulk.near.sent) == (BYTES, 0)
