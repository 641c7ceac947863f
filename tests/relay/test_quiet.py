# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever the peers have done, a loop with nothing to do sleeps until there is news."""

import contextlib
import itertools
import select
import socket
from collections.abc import Callable
from contextlib import closing
from functools import partial

import pytest
from helpers import is_ready, tcp_pair, unix_pair
from mux_peer import PeerBench

from qubes_fwd_qrexec.mux import Role
from qubes_fwd_qrexec.relay.budget import WINDOW_MAX_BYTES
from qubes_fwd_qrexec.relay.copy import Copy, CopyEnd, Relay, abort, half_close
from qubes_fwd_qrexec.relay.loop import Loop

_BLOCK = bytes(65536)
_BUFFERS = socket.SO_SNDBUF, socket.SO_RCVBUF
# So few that what one write of a peer holds does not fit.
_FEW_BYTES = 8192
# Far more turns than anything here takes, and so many without news as no spinning loop has.
_TURNS, _QUIET_TURNS = 3000, 4


def fill(sock: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(_BLOCK)


def shut_both(sock: socket.socket) -> None:
    sock.shutdown(socket.SHUT_RDWR)


def after_fill(then: Callable[[socket.socket], None], sock: socket.socket) -> None:
    fill(sock)
    then(sock)


DEEDS = {
    "nothing": lambda _sock: None,
    "fill": fill,
    "end": half_close,
    "fill, end": partial(after_fill, half_close),
    "shut": shut_both,
    "fill, shut": partial(after_fill, shut_both),
    "close": socket.socket.close,
    "fill, close": partial(after_fill, socket.socket.close),
    "abort": abort,
    "fill, abort": partial(after_fill, abort),
}
LATER = ("nothing", "end", "shut", "abort")


def do(deed: str, socks: list[socket.socket]) -> None:
    for sock in socks:
        with contextlib.suppress(OSError):  # it was closed before
            DEEDS[deed](sock)


def goes_quiet(loop: Loop) -> bool:
    quiet = 0
    for _ in range(_TURNS):
        quiet = 0 if is_ready(loop) else quiet + 1
        if quiet == _QUIET_TURNS:
            return True
        select.select([loop], [], [], 0.001)
        loop.run_once(0)
    return False


def enlarge(bench: PeerBench) -> None:
    """Let them be bulk, of which the call does not take all that credit allows."""
    for stream_id, sock in bench.socks.items():
        for one, option in itertools.product((sock, bench.mux.legs[stream_id].sock), _BUFFERS):
            one.setsockopt(socket.SOL_SOCKET, option, WINDOW_MAX_BYTES)
        bench.peer.grant(stream_id, WINDOW_MAX_BYTES - bench.peer.granted(stream_id))
    bench.exchange()


def say(bench: PeerBench, what: str) -> None:
    for stream_id in bench.socks:
        if "data" in what:
            while limit := bench.peer.send_limit(stream_id):
                bench.peer.send_data(stream_id, bytes(limit))
        if "EOF" in what:
            bench.peer.send_eof(stream_id)
        if "RESET" in what:
            bench.peer.reset_stream(stream_id)
    bench.say()


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("first", DEEDS)
def test_streams_that_cannot_move(role: Role, first: str) -> None:
    """The other end reads nothing in the beginning, and then all there is."""
    for then, said in itertools.product(LATER, ("", "data", "EOF", "data, EOF", "RESET")):
        with PeerBench(role) as bench:
            for _ in range(4):
                bench.open()
            enlarge(bench)
            say(bench, said)
            do(first, list(bench.socks.values()))
            assert goes_quiet(bench.loop), (then, said)
            do(then, list(bench.socks.values()))
            assert goes_quiet(bench.loop), (then, said)
            for _ in range(_TURNS):
                bench.hear()
                bench.say()
                if not is_ready(bench.loop):
                    break
                bench.turn()
            assert goes_quiet(bench.loop), (then, said, "heard")


@pytest.mark.parametrize("pair", [tcp_pair, unix_pair])
@pytest.mark.parametrize("first", DEEDS)
def test_a_single_call_that_cannot_move(
    pair: Callable[[], tuple[socket.socket, socket.socket]], first: str
) -> None:
    later = (("nothing", "nothing"), ("end", "shut"), ("shut", "end"), ("abort", "nothing"))
    for of_call, (then, then_call) in itertools.product(DEEDS, later):
        loop = Loop()
        relay = Relay(loop)
        far, server = pair()
        caller, call = unix_pair()
        copies = Copy(call, server, may_close=True), Copy(server, call)
        for one, option in itertools.product((far, server, caller, call), _BUFFERS):
            one.setsockopt(socket.SOL_SOCKET, option, _FEW_BYTES)
        with closing(loop), far, server, caller, call:

            def ended(sink: socket.socket, how: CopyEnd) -> None:
                if how is CopyEnd.EOF:
                    half_close(sink)

            for copy in copies:
                relay.start(copy, partial(ended, copy.sink))
            for deed, deed_of_call in (("nothing", of_call), (first, of_call), (then, then_call)):
                do(deed, [far])
                do(deed_of_call, [caller])
                assert goes_quiet(loop), (of_call, then, then_call)
            for copy in copies:
                relay.stop(copy)
