# SPDX-License-Identifier: GPL-2.0-or-later
"""Anything that comes from the call and from the sockets, in any order, ends at most its own stream."""

import contextlib
import random
import socket
from collections.abc import Iterator

import pytest
from helpers import tcp_pair, unix_pair
from mux_peer import PeerBench

from qubes_fwd_qrexec.common.errors import LocalProtocolError
from qubes_fwd_qrexec.mux import Role
from qubes_fwd_qrexec.mux.limits import MIN_CREDIT_BYTES, MIN_WINDOW_BYTES
from qubes_fwd_qrexec.relay.copy import Copy, CopyEnd, Relay, abort, half_close
from qubes_fwd_qrexec.relay.loop import Loop

ROLES = pytest.mark.parametrize("role", Role)


@pytest.fixture
def bench(role: Role) -> Iterator[PeerBench]:
    with PeerBench(role) as bench:
        yield bench


def assert_alive(bench: PeerBench) -> None:
    """Nothing but the stream was harmed: another one is opened, and bytes go both ways."""
    stream_id = bench.open()
    sock = bench.socks[stream_id]
    bench.peer.send_data(stream_id, b"ping")
    bench.exchange()
    assert sock.recv(100) == b"ping"
    sock.send(b"pong")
    bench.say()
    bench.turn(2)
    assert [getattr(event, "data", None) for event in bench.hear()] == [b"pong"]
    assert not bench.owner.is_over


# What a client did to a whole listener: half-close, then an abort while the last bytes come.


@ROLES
@pytest.mark.parametrize("last", ["eof", "reset", "credit"])
def test_an_abort_while_the_last_bytes_and_what_follows_them_come(bench: PeerBench, last: str) -> None:
    stream_id = bench.open()
    sock = bench.socks[stream_id]
    half_close(sock)
    bench.exchange()
    bench.peer.send_data(stream_id, b"the last bytes")
    match last:
        case "eof":
            bench.peer.send_eof(stream_id)
        case "reset":
            bench.peer.reset_stream(stream_id)
        case "credit":
            bench.peer.grant(stream_id, MIN_CREDIT_BYTES)
    bench.say()
    abort(sock)
    bench.turn(2)
    assert stream_id not in bench.mux.legs
    assert_alive(bench)


@ROLES
def test_garbage_behind_the_final_goaway_is_nothing_where_the_call_is_full(bench: PeerBench) -> None:
    bench.fill_call()
    bench.peer.close()
    bench.say(b"garbage that is no frame")
    bench.turn(2)
    assert bench.owner.is_over


# Any order at all


class Play:
    """Random doings at both sides of some streams, at times several within one turn of the loop."""

    def __init__(self, bench: PeerBench, chance: random.Random) -> None:
        self.bench = bench
        self.chance = chance

    def step(self) -> None:
        bench, chance = self.bench, self.chance
        for _ in range(chance.randrange(1, 9)):
            if not bench.socks or chance.random() < 0.1:
                bench.open()
            stream_id = chance.choice(list(bench.socks)[-2:])
            if chance.random() < 0.5:
                self._from_the_call(stream_id)
            else:
                self._from_the_socket(stream_id)
        bench.say()
        bench.turn(chance.randrange(3))
        if chance.random() < 0.7:
            bench.hear()

    def _from_the_call(self, stream_id: int) -> None:
        """One frame, if it is legal; chance decides whether it goes out in one chunk with the next."""
        bench, chance = self.bench, self.chance
        with contextlib.suppress(LocalProtocolError):
            match chance.choice(["data", "data", "data", "eof", "reset", "credit", "recall", "return"]):
                case "data":
                    length = min(bench.peer.send_limit(stream_id), chance.choice([1, 100, 5000, 32768]))
                    if length:
                        bench.peer.send_data(stream_id, bytes(length))
                case "eof":
                    bench.peer.send_eof(stream_id)
                case "reset":
                    bench.peer.reset_stream(stream_id)
                case "credit":
                    bench.peer.grant(stream_id, MIN_CREDIT_BYTES)
                case "recall":
                    bench.peer.recall(stream_id, MIN_WINDOW_BYTES)
                case "return":  # the peer answers when it hears this
                    bench.mux.connection.recall(stream_id, MIN_WINDOW_BYTES)
        if chance.random() < 0.3:
            bench.say()

    def _from_the_socket(self, stream_id: int) -> None:
        """A FIN, an abort, bytes, or room for what waits; a socket that is left alone becomes full."""
        sock = self.bench.socks[stream_id]
        with contextlib.suppress(OSError):
            match self.chance.choice(["fin", "rst", "close", "readable", "readable", "room", "room"]):
                case "fin":
                    half_close(sock)
                case "rst":
                    abort(sock)
                case "close":
                    sock.close()  # an abort once there is something unread
                case "readable":
                    sock.send(bytes(self.chance.choice([1, 100, 3000])))
                case "room":
                    sock.recv(65536)


@ROLES
@pytest.mark.parametrize("seed", range(60))
def test_no_order_of_frames_and_of_what_sockets_do_ends_more_than_its_stream(
    bench: PeerBench, seed: int
) -> None:
    play = Play(bench, random.Random(seed))
    for _ in range(80):
        play.step()
        assert not bench.owner.is_over, bench.owner.problem
    for sock in bench.socks.values():
        abort(sock)
    for stream_id in bench.socks:
        bench.peer.reset_stream(stream_id)
    for _ in range(20):
        bench.exchange()
        bench.clock.advance(1.0)
        bench.turn()
    assert bench.mux.legs == {}
    assert bench.budget.streams == 0
    assert_alive(bench)


@pytest.mark.parametrize("seed", range(60))
def test_no_order_of_what_two_sockets_do_ends_another_copy(seed: int) -> None:
    """`call`: an accepted connection and the two sockets of its own call."""
    chance = random.Random(seed)
    loop = Loop()
    relay = Relay(loop)
    try:
        for _ in range(25):
            client, accepted = tcp_pair()
            stdin, far_in = unix_pair()
            stdout, far_out = unix_pair()
            far = [client, far_in, far_out]
            ends: list[CopyEnd] = []
            copies = [Copy(accepted, stdin), Copy(stdout, accepted)]
            for copy in copies:
                relay.start(copy, ends.append)
            for _ in range(chance.randrange(1, 30)):
                sock = chance.choice(far)
                with contextlib.suppress(OSError):
                    match chance.choice(["fin", "rst", "close", "no reader", "readable", "full", "room"]):
                        case "fin":
                            half_close(sock)
                        case "rst":
                            abort(sock)
                        case "close":
                            sock.close()
                        case "no reader":
                            sock.shutdown(socket.SHUT_RD)
                        case "readable":
                            sock.send(bytes(chance.choice([1, 5000])))
                        case "full":
                            while True:
                                sock.send(bytes(65536))
                        case "room":
                            sock.recv(1 << 20)
                for _ in range(chance.randrange(3)):
                    loop.run_once(0)
            for sock in far:
                sock.close()
            for _ in range(20):
                loop.run_once(0)
            assert len(ends) == 2, (ends, copies)
            for sock in (accepted, stdin, stdout):
                sock.close()
    finally:
        loop.close()
