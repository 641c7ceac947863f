# SPDX-License-Identifier: GPL-2.0-or-later
"""A sink whose reader will not read on, as the qrexec agent leaves it when a call is lost."""

import socket

import pytest
from helpers import tcp_pair, unix_pair
from loop_time import LoopClock
from relay_bench import Bench, turn_until

from qubes_fwd_qrexec.relay.copy import (
    LOOK_S,
    Copy,
    CopyEnd,
    half_close,
)


@pytest.mark.parametrize("is_stalled", [False, True])
def test_a_sink_that_is_no_longer_read_is_noticed_without_an_event(is_stalled: bool) -> None:
    clock = LoopClock()
    bench = Bench(tcp_pair, unix_pair)
    try:
        if is_stalled:
            bench.stall()
        else:
            bench.relay.stop(bench.copy)
            bench.copy = Copy(bench.source, bench.sink, looks=True)
            bench.relay.start(bench.copy, bench.ends.append)
        bench.far_sink.shutdown(socket.SHUT_RD)
        bench.turn()
        assert bench.ends == []
        assert bench.wake_ups() == 0
        clock.advance(LOOK_S)
        bench.turn()
        assert bench.ends == [CopyEnd.SINK_BROKEN]
    finally:
        clock.let_go()
        bench.close()


def test_looking_at_a_sink_that_is_there_changes_nothing() -> None:
    clock = LoopClock()
    bench = Bench(tcp_pair, unix_pair)
    try:
        bench.relay.stop(bench.copy)
        bench.copy = Copy(bench.source, bench.sink, looks=True)
        bench.relay.start(bench.copy, bench.ends.append)
        moved_at = bench.copy.moved_at
        for _ in range(3):
            clock.advance(LOOK_S)
            bench.turn()
        assert bench.copy.moved_at == moved_at
        bench.far_source.send(b"x")
        turn_until(bench.loop, lambda: bench.copy.moved)
        assert bench.far_sink.recv(10) == b"x"
        half_close(bench.far_source)
        assert bench.turn_until_end() is CopyEnd.EOF
        clock.advance(LOOK_S)
        bench.turn()
        clock.advance(LOOK_S)
        assert bench.loop.timers_left == 0
    finally:
        clock.let_go()
        bench.close()
