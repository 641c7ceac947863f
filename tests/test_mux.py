# SPDX-License-Identifier: GPL-2.0-or-later
"""One tunnel: its beginning and end, its timers, fairness, and that nothing is left of any stream."""

import errno
import os
import random
import socket
import time
from collections.abc import Iterator

import pytest
from endings import pattern
from helpers import no_fds_left
from mux_bench import PORTS, TunnelBench

from qubes_fwd_qrexec import leg as leg_module
from qubes_fwd_qrexec import mux as mux_module
from qubes_fwd_qrexec.budget import FLOOR_BYTES, Budget
from qubes_fwd_qrexec.errors import LocalProtocolError
from qubes_fwd_qrexec.leg import Leg, LegEnd
from qubes_fwd_qrexec.relay import abort, half_close
from qubes_fwd_qrexec.tunnel import Connection, GoawayCode, Hello, OpenReceived, Origin, ResetCode

MIB = 1 << 20


@pytest.fixture
def bench() -> Iterator[TunnelBench]:
    with no_fds_left(), TunnelBench() as bench:
        yield bench


def is_all_back(bench: TunnelBench) -> bool:
    return all(
        (budget.streams, budget.shared_left) == (0, Budget(budget.total, budget.streams_max).shared_left)
        for budget in (bench.near_budget, bench.far_budget)
    )


def tick(bench: TunnelBench, count: int) -> None:
    """So many seconds, at once; each end's tick begins the next."""
    for _ in range(count):
        for mux in {bench.near, getattr(bench, "far", bench.near)}:
            mux._tick()
        bench.turn()


# The tunnel's beginning and end


def test_both_say_hello_and_streams_may_be_opened(bench: TunnelBench) -> None:
    assert bench.near.open_room == 1000
    assert bench.far.open_room == 0


def test_no_hello_ends_the_tunnel() -> None:
    """relay-behaviours 26."""
    with TunnelBench(is_far_there=False) as bench:
        tick(bench, 29)
        assert not bench.near_owner.is_over
        tick(bench, 1)
        assert bench.near_owner.problem == "no HELLO within 30 s"
        assert bench.near.open_room == 0


def test_half_a_frame_and_silence_ends_the_tunnel(bench: TunnelBench) -> None:
    """relay-behaviours 48; a frame that goes on, however slowly, does not."""
    bench.far_call.send(b"\x04\x00")
    bench.turn()
    tick(bench, 9)
    bench.far_call.send(b"\x00")
    bench.turn()
    tick(bench, 9)
    assert not bench.near_owner.is_over
    tick(bench, 1)
    assert bench.near_owner.problem == "half a frame, and nothing more for 10 s"


def test_a_peer_that_reads_nothing_ends_the_tunnel(bench: TunnelBench) -> None:
    streams = [bench.join() for _ in range(20)]
    bench.loop.change(bench.far_call.fileno(), 0)
    for stream in streams:
        bench.stall(stream.client)
    tick(bench, 9)
    assert not bench.near_owner.is_over
    assert bench.near.backlog._unsent_bytes
    assert bench.wake_ups() == 0
    tick(bench, 1)
    assert bench.near_owner.problem == "the other end has read nothing for 10 s"
    assert bench.read_to_end(stream.client)[1] == "RST"


def test_a_tunnel_with_nothing_to_say_is_no_peer_that_does_not_read(bench: TunnelBench) -> None:
    tick(bench, 40)
    stream = bench.join()
    tick(bench, 1)
    stream.client.send(b"x")
    assert bench.read(stream.server, 1) == b"x"


def test_drained_it_ends_with_its_last_stream_and_takes_no_more(bench: TunnelBench) -> None:
    stream = bench.join()
    bench.far.drain(GoawayCode.LEASE_OVER)
    bench.until(lambda: bench.near_owner.drained)
    assert bench.near_owner.drained == [GoawayCode.LEASE_OVER]
    assert bench.near.open_room == 0
    stream.client.send(b"still here")
    assert bench.read(stream.server, 10) == b"still here"
    half_close(stream.client)
    half_close(stream.server)
    bench.until(lambda: bench.near_owner.is_over and bench.far_owner.is_over)
    assert bench.near_owner.problem is bench.far_owner.problem is None
    assert set(stream.ends.values()) == {LegEnd.DONE}


@pytest.mark.parametrize("end", ["near", "far"])
def test_drained_without_a_stream_it_ends_at_once(bench: TunnelBench, end: str) -> None:
    getattr(bench, end).drain(GoawayCode.SHUTDOWN)
    bench.until(lambda: bench.near_owner.is_over and bench.far_owner.is_over)
    assert bench.near_owner.problem is bench.far_owner.problem is None


def test_both_may_drain_at_once(bench: TunnelBench) -> None:
    bench.near.drain(GoawayCode.SHUTDOWN)
    bench.far.drain(GoawayCode.LEASE_OVER)
    bench.until(lambda: bench.near_owner.is_over and bench.far_owner.is_over)
    assert bench.near_owner.problem is bench.far_owner.problem is None


def test_an_open_that_crosses_the_goaway_is_refused_and_may_be_tried_elsewhere(bench: TunnelBench) -> None:
    client, leg = bench.open()
    bench.far.drain(GoawayCode.LEASE_OVER)
    with client, leg.sock:
        bench.until(lambda: bench.near_owner.refusals)
        assert bench.near_owner.refusals == [(leg, ResetCode.SHUTDOWN)]  # it was not refused, but never seen
        bench.until(lambda: bench.near_owner.is_over)
    assert not bench.far_owner.requested


def test_an_open_that_crosses_a_goaway_that_is_not_the_last_word_is_refused(bench: TunnelBench) -> None:
    bench.join()
    client, leg = bench.open()
    bench.far.drain(GoawayCode.LEASE_OVER)
    with client, leg.sock:
        bench.until(lambda: bench.near_owner.refusals)
        assert bench.near_owner.refusals == [(leg, ResetCode.LEASE_OVER)]
    assert len(bench.far_owner.requested) == 1


def test_closed_every_stream_is_an_abort_at_both_ends(bench: TunnelBench) -> None:
    streams = [bench.join() for _ in range(3)]
    bench.far.close(GoawayCode.REVOKED)
    bench.until(lambda: bench.near_owner.is_over and bench.far_owner.is_over)
    assert bench.near_owner.problem == "the other end closed the tunnel: REVOKED"
    assert bench.far_owner.problem is None
    for stream in streams:
        assert bench.read_to_end(stream.client)[1] == bench.read_to_end(stream.server)[1] == "RST"
    assert is_all_back(bench)


def test_closed_towards_a_peer_that_reads_nothing_it_ends_soon(
    bench: TunnelBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mux_module, "_LAST_READ_S", 0.05)
    stream = bench.join()
    bench.loop.change(bench.far_call.fileno(), 0)
    bench.stall(stream.client)
    bench.near.close()
    bench.until(lambda: bench.near_owner.is_over)
    assert bench.near_owner.problem is None


def test_a_lost_call_is_an_abort_of_every_stream(bench: TunnelBench) -> None:
    """relay-behaviours 27."""
    streams = [bench.join() for _ in range(3)]
    asked, waiting = bench.open()
    began = time.monotonic()
    for sock in (bench.far_call, bench.far_sink):
        sock.shutdown(socket.SHUT_RDWR)
    for stream in streams:
        assert bench.read_to_end(stream.client)[1] == bench.read_to_end(stream.server)[1] == "RST"
    assert bench.read_to_end(asked)[1] == "RST"
    assert waiting.ended is LegEnd.REMOTE_RESET
    assert time.monotonic() - began < 1
    assert bench.near_owner.problem == "the byte stream ended without a final GOAWAY"
    assert is_all_back(bench)
    asked.close()


def test_ten_thousand_last_words_are_not_looked_after_all_the_time(
    bench: TunnelBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stalled client's leg is looked at eight times within its 0.8 s, and not 160 times."""
    monkeypatch.setattr(leg_module, "_LAST_WORDS_S", 0.1)
    looks = 0
    real = leg_module.unsent_bytes

    def counted(sock: socket.socket) -> int:
        nonlocal looks
        looks += 1
        return real(sock) or 1

    monkeypatch.setattr(leg_module, "unsent_bytes", counted)
    stream = bench.join()
    bench.far.close()
    bench.until(lambda: "near" in stream.ends)
    assert looks <= 2 * 7


def test_a_call_that_only_stops_taking_is_read_to_its_end_and_then_lost(
    bench: TunnelBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mux_module, "_LAST_READ_S", 0.05)
    near, far = socket.socketpair()
    owner = bench.near_owner
    with near, far:
        near.setblocking(False)
        connection = Connection(Hello(65536, bytes(16)), PORTS)
        owner.is_over = False
        mux = mux_module.Mux(bench.loop, connection, bench.near_call.dup(), near, Budget(), owner)
        bench.loop.unwatch(mux._source.fileno())
        mux._source.close()
        mux._source, source = socket.socketpair()
        mux._source.setblocking(False)
        bench.loop.watch(mux._source.fileno(), 1, mux._on_source)
        far.close()
        bench.turn()
        assert not owner.is_over
        bench.until(lambda: owner.is_over)
        assert owner.problem == "the call takes nothing more"
        source.close()
        mux._source.close()


def test_an_error_of_the_call_is_named(bench: TunnelBench, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def recv_into(self, _buffer: object) -> int:
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

        def fileno(self) -> int:
            return bench.near_call.fileno()

    monkeypatch.setattr(bench.near, "_source", Broken())
    bench.near._on_source(0)
    assert bench.near_owner.problem == "the call was lost: Connection reset by peer"


def test_no_news_from_the_call_are_no_news(bench: TunnelBench) -> None:
    bench.near._on_source(0)
    assert not bench.near_owner.is_over


def test_a_violation_ends_the_tunnel_with_its_reason_at_both_ends(bench: TunnelBench) -> None:
    stream = bench.join()
    bench.far_call.send(b"\xff" * 8)
    bench.until(lambda: bench.near_owner.is_over)
    assert bench.near_owner.problem
    assert bench.near_owner.problem != "the byte stream ended without a final GOAWAY"
    bench.until(lambda: bench.far_owner.is_over)
    assert bench.far_owner.problem == "the other end closed the tunnel: PROTOCOL_ERROR"
    assert bench.read_to_end(stream.client)[1] == bench.read_to_end(stream.server)[1] == "RST"


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 100])
def test_garbage_never_leaves_the_loop_as_an_exception(cut: int) -> None:
    with TunnelBench(is_far_there=False) as bench:
        bench.far_call.send(random.Random(cut).randbytes(cut) or b"\0" * 8)
        bench.far_call.shutdown(socket.SHUT_WR)
        bench.until(lambda: bench.near_owner.is_over)
        assert bench.near_owner.problem


@pytest.mark.parametrize("number", [0, 1])
def test_a_call_that_cannot_be_watched_leaves_nothing(
    bench: TunnelBench, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real = bench.loop.watch

    def only_once(fd: int, *rest: object) -> None:
        if fd == (one, other)[number].fileno():
            raise OSError(errno.ENOSPC, "too many")
        real(fd, *rest)  # type: ignore[arg-type]

    one, other = socket.socketpair()
    with one, other:
        watched = dict(bench.loop._handlers)
        monkeypatch.setattr(bench.loop, "watch", only_once)
        with pytest.raises(OSError, match="too many"):
            mux_module.Mux(
                bench.loop,
                Connection(Hello(65536, bytes(16)), PORTS),
                one,
                other,
                Budget(),
                bench.near_owner,
            )
        assert bench.loop._handlers == watched


def test_abandoned_it_tells_nobody_and_leaves_the_call_alone(bench: TunnelBench) -> None:
    stream = bench.join()
    bench.near.abandon()
    bench.near.abandon()
    assert not bench.near_owner.is_over
    assert bench.read_to_end(stream.client)[1] == "RST"
    assert bench.near_call.fileno() >= 0
    bench.turn()


# What may not be


def test_without_room_a_stream_is_a_local_error_and_costs_nothing() -> None:
    with TunnelBench(max_streams=1) as bench:
        stream = bench.join()
        assert bench.near.open_room == 0
        before = bench.near_budget.streams, bench.near_budget.shared_left
        with pytest.raises(LocalProtocolError):
            bench.open_on(stream.client)
        assert (bench.near_budget.streams, bench.near_budget.shared_left) == before


def test_a_budget_without_room_is_said_to_whoever_asks() -> None:
    small = Budget(2 * FLOOR_BYTES, 2)
    with TunnelBench(near_budget=small) as bench:
        for _ in range(2):
            bench.join()
        assert bench.open_on(bench.near_call) is None


def test_a_target_whose_budget_has_no_room_refuses() -> None:
    with TunnelBench(far_budget=Budget(FLOOR_BYTES, 1)) as bench:
        bench.join()
        client, leg = bench.open()
        bench.until(lambda: len(bench.far_owner.requested) == 2)
        with client, leg.sock:
            assert bench.far.accept(2, client) is None
            bench.until(lambda: bench.near_owner.refusals)
            assert bench.near_owner.refusals == [(leg, ResetCode.OVER_LIMIT)]


# Half-closed


def test_a_half_closed_stream_ends_when_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """relay-behaviours 9."""
    with TunnelBench(half_close_s=0.05) as bench:
        idle, half_closed = bench.join(), bench.join()
        half_close(half_closed.client)
        bench.until(lambda: half_closed.far.has_eof)
        tick(bench, 5)
        assert half_closed.near.ended is None
        time.sleep(0.06)
        tick(bench, 4)
        assert half_closed.near.ended is None
        tick(bench, 1)
        bench.until(lambda: len(half_closed.ends) == 2)
        assert bench.read_to_end(half_closed.client)[1] == "RST"
        assert idle.near.ended is None


def test_last_bytes_that_nobody_takes_end_too() -> None:
    with TunnelBench(half_close_s=0.05) as bench:
        stream = bench.join()
        bench.stall(stream.client)
        half_close(stream.server)
        bench.until(lambda: stream.near.has_eof)
        time.sleep(0.06)
        tick(bench, 5)
        bench.until(lambda: len(stream.ends) == 2)


# Bounds


def test_the_budget_at_its_bound_stops_nobody() -> None:
    """relay-behaviours 18: every window is at its floor; all consumers stall but one, which goes on."""
    with TunnelBench(
        far_budget=Budget(30 * FLOOR_BYTES, 30), near_budget=Budget(30 * FLOOR_BYTES, 30)
    ) as bench:
        streams = [bench.join() for _ in range(30)]
        assert bench.far_budget.shared_left == bench.near_budget.shared_left == 0
        sent = [bench.stall(stream.client) for stream in streams[:-1]]
        held = sum(cost for leg in bench.far.legs.values() for _, cost in leg._pending or ())
        assert held <= 30 * FLOOR_BYTES
        last = streams[-1]
        last.client.send(b"x" * 20_000)
        assert bench.read(last.server, 20_000) == b"x" * 20_000
        for stream, size in zip(streams, sent, strict=False):
            assert len(bench.read(stream.server, size)) == size


# Nothing is left


@pytest.mark.parametrize("seed", range(3))
def test_of_a_thousand_random_streams_nothing_is_left(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """relay-behaviours 3: no byte crosses streams, and windows, slots, sockets and timers all come back."""
    monkeypatch.setattr(leg_module, "_STALLED_GONE_S", 0.2)
    monkeypatch.setattr(leg_module, "_LAST_WORDS_S", 0.2)
    chance = random.Random(seed)
    small = 200 * FLOOR_BYTES
    with no_fds_left(), TunnelBench(far_budget=Budget(small, 40), near_budget=Budget(small, 40)) as bench:
        bench.far_owner.answer = lambda mux, event: answer(bench, mux, event, chance)
        living: list[Stream] = []
        for _ in range(330):
            while len(living) < 30 and bench.near.open_room > 0:
                living.append(Stream(bench, chance))
            bench.loop.run_once(0)
            living = [stream for stream in living if stream.step()]
        deadline = time.monotonic() + 20
        while living or bench.near.legs or bench.far.legs:
            assert time.monotonic() < deadline, (len(living), bench.near.legs, bench.far.legs)
            bench.loop.run_once(0.001)
            living = [stream for stream in living if stream.step(is_ending=True)]
        ends = bench.near.connection, bench.far.connection
        bench.until(lambda: not any(end.open_streams for end in ends))
        assert bench.near.connection.granted_bytes == bench.far.connection.granted_bytes == 0
        assert is_all_back(bench)
        assert not bench.near.backlog._waiting
        assert not bench.near_owner.is_over
        assert not bench.far_owner.is_over
        own = {bench.near_call, bench.near_sink, bench.far_call, bench.far_sink}
        assert bench.loop._handlers.keys() == {sock.fileno() for sock in own}
        assert not [t for _, _, t in bench.loop._timers if isinstance(t.callback, Leg)]


SERVERS: dict[int, socket.socket] = {}


def answer(bench: TunnelBench, mux: mux_module.Mux, event: OpenReceived, chance: random.Random) -> None:
    if chance.random() < 0.1:
        mux.refuse(event.stream_id, chance.choice((ResetCode.REFUSED, ResetCode.TIMEOUT)))
        return
    from helpers import tcp_pair

    server, connected = tcp_pair()
    if mux.accept(event.stream_id, connected) is None:
        server.close()
        connected.close()
        return
    SERVERS[event.origin.client_port] = server


class Stream:
    """Sends its own pattern from either side, and now and then does something rude."""

    serial = 0

    def __init__(self, bench: TunnelBench, chance: random.Random) -> None:
        from helpers import tcp_pair
        from mux_bench import ORIGIN

        Stream.serial = Stream.serial % 60_000 + 1
        self.number = Stream.serial
        self.chance = chance
        self.client, self.accepted = tcp_pair()
        origin = Origin(ORIGIN.client, self.number, ORIGIN.exposed, ORIGIN.exposed_port)
        self.leg = bench.near.open(PORTS.start, origin, self.accepted)
        assert self.leg is not None
        self.data = {"client": pattern(chance.randrange(100_000), self.number)}
        self.data["server"] = self.data["client"][::-1]
        self.sent = {"client": 0, "server": 0}
        self.got = {"client": 0, "server": 0}
        self.over: set[str] = set()

    def step(self, *, is_ending: bool = False) -> bool:
        """Whether it goes on."""
        assert self.leg is not None
        ends = {"client": self.client, "server": SERVERS.get(self.number)}
        for name, sock in ends.items():
            if sock is None or sock.fileno() < 0:
                continue
            other = "server" if name == "client" else "client"
            try:
                if self.chance.random() < 0.02 or (is_ending and self.chance.random() < 0.1):
                    abort(sock)
                    continue
                data = self.data[name][self.sent[name] : self.sent[name] + self.chance.randrange(1, 40_000)]
                if data:
                    self.sent[name] += sock.send(data)
                elif name not in self.over:
                    self.over.add(name)
                    half_close(sock)
                if self.chance.random() < 0.7:
                    chunk = sock.recv(self.chance.randrange(1, 70_000))
                    start = self.got[name]
                    assert chunk == self.data[other][start : start + len(chunk)], "bytes of another stream"
                    self.got[name] += len(chunk)
                    if not chunk and name in self.over:
                        assert start == len(self.data[other]), "a clean end before all had come"
                        sock.close()
            except BlockingIOError:
                pass
            except OSError:
                sock.close()
        if self.leg.ended is None:
            return True
        if self.leg.sock.fileno() >= 0 and self.leg not in self.leg._mux.legs.values():
            self.leg.sock.close()  # it was refused
        if self.leg.sock.fileno() >= 0:
            return True
        self.client.close()
        server = SERVERS.get(self.number)
        if server is not None:
            server.close()
        return False


def test_a_process_of_many_tunnels_has_one_budget() -> None:
    budget = Budget(100 * FLOOR_BYTES, 20)
    with TunnelBench(near_budget=budget, far_budget=budget) as bench:
        stream = bench.join()
        assert budget.streams == 2
        stream.client.send(os.urandom(10))
        abort(stream.client)
        bench.until(lambda: not budget.streams)
