# SPDX-License-Identifier: GPL-2.0-or-later
"""A sink whose reader will not read on, as the qrexec agent leaves it when a call is lost."""

import socket
from contextlib import closing

import pytest
from helpers import is_ready, tcp_pair, unix_pair
from loop_time import LoopClock
from relay_bench import Bench, turn_until

from qubes_fwd_qrexec.relay.copy import (
    LOOK_S,
    Copy,
    CopyEnd,
    Relay,
    half_close,
)
from qubes_fwd_qrexec.relay.loop import Loop


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


def test_a_unix_server_that_has_closed_breaks_the_copy_with_the_next_byte_for_it() -> None:
    """docs/facts.md, L26."""
    loop = Loop()
    relay = Relay(loop)
    ends: list[CopyEnd] = []
    far_source, source = unix_pair()
    sink, server = unix_pair()
    with closing(loop), far_source, source, sink:
        relay.start(Copy(source, sink, may_close=True), ends.append)
        server.close()
        for _ in range(3):
            loop.run_once(0)
        assert not ends
        assert not is_ready(loop)
        far_source.send(b"more")
        turn_until(loop, lambda: ends)
        assert ends == [CopyEnd.SINK_BROKEN]


def test_a_unix_server_that_shuts_down_unread_breaks_the_copy_at_once() -> None:
    """The kernel says in each turn that it is gone, and never that it takes more."""
    loop = Loop()
    relay = Relay(loop)
    ends: list[CopyEnd] = []
    far_source, source = unix_pair()
    sink, server = unix_pair()
    with closing(loop), far_source, source, sink, server:
        copy = Copy(source, sink, may_close=True)
        relay.start(copy, ends.append)
        while not copy.pending:
            far_source.send(bytes(65536))
            loop.run_once(0)
        server.shutdown(socket.SHUT_RDWR)
        for _ in range(3):
            loop.run_once(0)
        assert ends == [CopyEnd.SINK_BROKEN]
        assert not is_ready(loop)


def test_a_unix_server_that_has_closed_takes_an_end_of_file() -> None:
    loop = Loop()
    relay = Relay(loop)
    ends: list[CopyEnd] = []
    far_source, source = unix_pair()
    sink, server = unix_pair()
    with closing(loop), far_source, source, sink:
        relay.start(Copy(source, sink, may_close=True), ends.append)
        server.close()
        loop.run_once(0)
        far_source.close()
        turn_until(loop, lambda: ends)
        assert ends == [CopyEnd.EOF]


def test_a_unix_server_that_has_left_bytes_unread_breaks_the_copy_at_once() -> None:
    loop = Loop()
    relay = Relay(loop)
    ends: list[CopyEnd] = []
    far_source, source = unix_pair()
    sink, server = unix_pair()
    with closing(loop), far_source, source, sink:
        sink.send(b"unread")
        relay.start(Copy(source, sink, may_close=True), ends.append)
        server.close()
        turn_until(loop, lambda: ends)
        assert ends == [CopyEnd.SINK_BROKEN]
