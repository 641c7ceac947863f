# SPDX-License-Identifier: GPL-2.0-or-later
"""The streams of one mux call: room and budget, half-closed streams, and that none leaves anything behind."""

import os
import random
import socket

import pytest
from endings import pattern
from helpers import no_fds_left, tcp_pair
from mux_bench import ORIGIN, PORTS, MuxBench, pending_bytes

from qubes_fwd_qrexec.common.errors import LocalProtocolError
from qubes_fwd_qrexec.mux import OpenReceived, Origin, ResetCode
from qubes_fwd_qrexec.relay import mux as mux_module
from qubes_fwd_qrexec.relay.budget import FLOOR_BYTES, Budget
from qubes_fwd_qrexec.relay.copy import abort, half_close

# What may not be


def test_without_room_a_stream_is_a_local_error_and_costs_nothing() -> None:
    with MuxBench(max_streams=1) as bench:
        stream = bench.join()
        assert bench.near.open_room == 0
        before = bench.near_budget.streams, bench.near_budget.shared_left
        with pytest.raises(LocalProtocolError):
            bench.open_on(stream.client)
        assert (bench.near_budget.streams, bench.near_budget.shared_left) == before


def test_a_budget_without_room_refuses_the_stream_at_once() -> None:
    small = Budget(2 * FLOOR_BYTES, 2)
    with MuxBench(near_budget=small) as bench:
        for _ in range(2):
            bench.join()
        assert bench.open_on(bench.near_call) is None


def test_a_target_whose_budget_has_no_room_refuses() -> None:
    with MuxBench(far_budget=Budget(FLOOR_BYTES, 1)) as bench:
        bench.join()
        client, leg = bench.open()
        bench.until(lambda: len(bench.far_owner.requested) == 2)
        with client, leg.sock:
            assert bench.far.accept(2, client) is None
            bench.until(lambda: bench.near_owner.refusals)
            assert bench.near_owner.refusals == [(leg, ResetCode.OVER_LIMIT)]


# Half-closed


def test_a_half_closed_stream_ends_when_nothing_moves() -> None:
    """docs/behaviours.md, 9."""
    with MuxBench(half_close_s=60) as bench:
        idle, half_closed = bench.join(), bench.join()
        half_close(half_closed.client)
        bench.until(lambda: half_closed.far.has_eof)
        for stream in (idle, half_closed):
            stream.rest(30)
        bench.tick(5)
        assert half_closed.near.ended is None
        for stream in (idle, half_closed):
            stream.rest(30)
        bench.tick(4)
        assert half_closed.near.ended is None
        bench.tick(1)
        bench.until(lambda: len(half_closed.ends) == 2)
        assert bench.is_aborted(half_closed.client)
        assert idle.near.ended is None


@pytest.mark.parametrize("is_client", [True, False])
def test_the_time_of_a_half_closed_stream_begins_when_one_side_ends(is_client: bool) -> None:
    """It may have been idle for longer before that, as it may be idle for an hour; docs/behaviours.md, 9."""
    with MuxBench(half_close_s=60) as bench:
        stream = bench.join()
        stream.rest(300)
        half_close(stream.client if is_client else stream.server)
        bench.until(lambda: (stream.far if is_client else stream.near).has_eof)
        bench.tick(10)
        assert (stream.near.ended, stream.far.ended) == (None, None)
        stream.rest(60)
        bench.tick(5)
        bench.until(lambda: len(stream.ends) == 2)


def test_last_bytes_that_nobody_takes_end_too() -> None:
    with MuxBench(half_close_s=60) as bench:
        stream = bench.join()
        bench.stall(stream.client)
        half_close(stream.server)
        bench.until(lambda: stream.near.has_eof)
        bench.stall(stream.client)
        stream.rest(60)
        bench.tick(5)
        bench.until(lambda: len(stream.ends) == 2)


# Idle


def test_an_idle_stream_ends_within_a_tenth_of_its_time() -> None:
    """docs/behaviours.md, 38: not before, and the next look comes within 5 s."""
    with MuxBench(idle_s=600) as bench:
        idle, half_closed = bench.join(), bench.join()
        half_close(half_closed.client)
        bench.until(lambda: half_closed.far.has_eof)
        for stream in (idle, half_closed):
            stream.rest(550)
        bench.tick(5)
        assert (idle.near.ended, half_closed.near.ended) == (None, None)
        for stream in (idle, half_closed):
            stream.rest(50)
        bench.tick(5)
        bench.until(lambda: len(idle.ends) + len(half_closed.ends) == 4)
        assert bench.is_aborted(idle.client)
        assert bench.is_aborted(idle.server)


@pytest.mark.parametrize("sender", ["client", "server"])
def test_a_byte_either_way_restarts_the_time(sender: str) -> None:
    with MuxBench(idle_s=600) as bench:
        stream = bench.join()
        receiver = stream.server if sender == "client" else stream.client
        for _ in range(3):
            stream.rest(550)
            getattr(stream, sender).send(b"x")
            assert bench.read(receiver, 1) == b"x"
            bench.tick(5)
        assert stream.near.ended is None


def test_a_target_ends_no_idle_stream_by_itself() -> None:
    with MuxBench(idle_s=600) as bench:
        stream = bench.join()
        stream.far.moved_at -= 1_000_000
        bench.tick(5)
        assert stream.far.ended is None


# Bounds


def test_the_budget_at_its_bound_stops_nobody() -> None:
    """docs/behaviours.md, 18: every window is at its floor; all consumers stall but one, which goes on."""
    total = 8 * FLOOR_BYTES
    with MuxBench(far_budget=Budget(total, 8), near_budget=Budget(total, 8)) as bench:
        streams = [bench.join() for _ in range(8)]
        assert bench.far_budget.shared_left == bench.near_budget.shared_left == 0
        sent = [bench.stall(stream.client) for stream in streams[:-1]]
        held = sum(map(pending_bytes, bench.far.legs.values()))
        assert held <= total
        last = streams[-1]
        last.client.send(b"x" * 20_000)
        assert bench.read(last.server, 20_000) == b"x" * 20_000
        for stream, size in zip(streams, sent, strict=False):
            assert len(bench.read(stream.server, size)) == size


# Nothing is left


@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_random_streams_leave_nothing(seed: int) -> None:
    """docs/behaviours.md, 3. Windows, slots, sockets and timers all come back."""
    chance = random.Random(seed)
    small = 200 * FLOOR_BYTES
    with no_fds_left(), MuxBench(far_budget=Budget(small, 40), near_budget=Budget(small, 40)) as bench:
        bench.far_owner.answer = lambda event: answer(bench, bench.far, event, chance)
        living: list[Stream] = []
        for _ in range(330):
            while len(living) < 30 and bench.near.open_room > 0:
                living.append(Stream(bench, chance))
            bench.loop.run_once(0)
            living[:] = [stream for stream in living if stream.step()]

        def are_all_over() -> bool:
            bench.clock.advance(0.1)  # nobody waits for the last words of so many
            living[:] = [stream for stream in living if stream.step(is_ending=True)]
            return not (living or bench.near.legs or bench.far.legs)

        bench.until(are_all_over)
        ends = bench.near.connection, bench.far.connection
        bench.until(lambda: not any(end.open_streams for end in ends))
        assert bench.near.connection.granted_bytes == bench.far.connection.granted_bytes == 0
        assert bench.is_all_back
        assert not bench.near.backlog.waiting
        assert not bench.near_owner.is_over
        assert not bench.far_owner.is_over
        own = {bench.near_call, bench.near_sink, bench.far_call, bench.far_sink}
        assert bench.loop.watched == {sock.fileno() for sock in own}
        assert bench.loop.timers_left == len(bench.muxes)  # for their ticks


SERVERS: dict[int, socket.socket] = {}


def answer(bench: MuxBench, mux: mux_module.Mux, event: OpenReceived, chance: random.Random) -> None:
    if chance.random() < 0.1:
        mux.refuse(event.stream_id, chance.choice((ResetCode.REFUSED, ResetCode.TIMEOUT)))
        return
    server, connected = tcp_pair()
    if mux.accept(event.stream_id, connected) is None:
        server.close()
        connected.close()
        return
    SERVERS[event.origin.client_port] = server


class Stream:
    """Sends its own pattern from either side, and now and then does something rude."""

    serial = 0

    def __init__(self, bench: MuxBench, chance: random.Random) -> None:
        Stream.serial = Stream.serial % 60_000 + 1
        self.number = Stream.serial
        self.chance = chance
        self.client, self.accepted = tcp_pair()
        origin = Origin(ORIGIN.client, self.number, ORIGIN.exposed, ORIGIN.exposed_port)
        self.mux = bench.near
        self.leg = self.mux.open(PORTS.start, origin, self.accepted)
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
        if self.leg.sock.fileno() >= 0 and self.leg not in self.mux.legs.values():
            self.leg.sock.close()  # it was refused
        if self.leg.sock.fileno() >= 0:
            return True
        self.client.close()
        server = SERVERS.get(self.number)
        if server is not None:
            server.close()
        return False


def test_a_process_of_many_mux_calls_has_one_budget() -> None:
    budget = Budget(100 * FLOOR_BYTES, 20)
    with MuxBench(near_budget=budget, far_budget=budget) as bench:
        stream = bench.join()
        assert budget.streams == 2
        stream.client.send(os.urandom(10))
        abort(stream.client)
        bench.until(lambda: not budget.streams)
