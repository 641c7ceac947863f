# SPDX-License-Identifier: GPL-2.0-or-later
"""Both ends of a mux call in one loop, run turn by turn: two `Mux` objects wired together, without threads.

``near`` is the listener's end and ``far`` the target's. Each stream has a TCP connection at either end, of
which the test holds the outer sockets: the client's and the server's.

Their time is the test's as well: it passes where the test waits in vain, and no faster than that, however
long a busy machine keeps us from going on.
"""

import contextlib
import math
import select
import socket
import time
from collections.abc import Callable
from ipaddress import ip_address

from bounds import BOUND_S
from helpers import is_ready, tcp_pair, unix_pair
from inflight import acknowledge, in_flight_bytes
from loop_time import LoopClock

from qubes_fwd_qrexec.mux import Connection, GoawayCode, Hello, OpenReceived, Origin, ResetCode
from qubes_fwd_qrexec.relay.budget import WINDOW_MAX_BYTES, Budget
from qubes_fwd_qrexec.relay.leg import Leg
from qubes_fwd_qrexec.relay.leg_end import LegEnd
from qubes_fwd_qrexec.relay.loop import Loop
from qubes_fwd_qrexec.relay.mux import Mux
from qubes_fwd_qrexec.relay.patience import TICK_S

PORTS = range(8080, 8090)
ORIGIN = Origin(ip_address("192.0.2.1"), 40000, ip_address("198.51.100.2"), 80)
# Several times as long as the kernel waits before it first sends something again.
_STANDS_S = 5.0
# The longest wait for news before it is looked again whether they are what was waited for.
_LOOK_S = 0.01
_BLOCK = bytes(65536)
BUFFER_BYTES = 131072


class Owner:
    """Notes all calls; a far one answers requests with `answer`, if it is set."""

    def __init__(self) -> None:
        self.is_ready = False
        self.is_over = False
        self.problem: str | None = None
        self.requested: list[OpenReceived] = []
        self.abandoned: list[int] = []
        self.refusals: list[tuple[Leg, ResetCode]] = []
        self.drained: list[GoawayCode] = []
        self.answer: Callable[[OpenReceived], None] | None = None

    def ready(self) -> None:
        self.is_ready = True

    def open_requested(self, event: OpenReceived) -> None:
        self.requested.append(event)
        if self.answer is not None:
            self.answer(event)

    def open_abandoned(self, stream_id: int) -> None:
        self.abandoned.append(stream_id)

    def refused(self, leg: Leg, code: ResetCode) -> None:
        self.refusals.append((leg, code))

    def draining(self, code: GoawayCode) -> None:
        self.drained.append(code)

    def over(self, problem: str | None) -> None:
        assert not self.is_over, "told twice"
        self.is_over = True
        self.problem = problem


class Joined:
    """One stream: ``client`` and ``server`` are the test's; ``near`` and ``far`` the legs between them."""

    def __init__(self, client: socket.socket, server: socket.socket, near: Leg, far: Leg) -> None:
        self.client = client
        self.server = server
        self.near = near
        self.far = far
        self.ends: dict[str, LegEnd] = {}
        near.on_end = lambda leg: self.ends.__setitem__("near", leg.ended)
        far.on_end = lambda leg: self.ends.__setitem__("far", leg.ended)

    def rest(self, seconds: float) -> None:
        """Make it so much longer ago that bytes moved last, at both ends, without waiting for that."""
        for leg in (self.near, self.far):
            leg.moved_at -= seconds

    def close(self) -> None:
        self.client.close()
        self.server.close()


def pending_bytes(leg: Leg) -> int:
    """What waits at a leg for its socket to take it, as its window counts it."""
    return 0 if leg.pending is None else leg.pending.cost


class MuxBench:
    """Two ends that have said HELLO. ``near_call`` and ``far_call`` are what each has for its call."""

    def __init__(
        self,
        *,
        near_budget: Budget | None = None,
        far_budget: Budget | None = None,
        max_streams: int = 1000,
        is_far_there: bool = True,
        half_close_s: float = 600.0,
        idle_s: float = math.inf,
        ports: range = PORTS,
    ) -> None:
        self.clock = LoopClock()
        self.is_time_still = True
        """Whether nothing is waited for that only time brings, as in the beginning."""
        try:
            self._begin(near_budget, far_budget, max_streams, is_far_there, half_close_s, idle_s, ports)
        except BaseException:
            self.clock.let_go()
            raise
        self.is_time_still = False

    def _begin(
        self,
        near_budget: Budget | None,
        far_budget: Budget | None,
        max_streams: int,
        is_far_there: bool,
        half_close_s: float,
        idle_s: float,
        ports: range,
    ) -> None:
        self.loop = Loop()
        self.near_budget = near_budget or Budget()
        self.far_budget = far_budget or Budget()
        self.near_call, self.far_call = unix_pair()
        self.near_sink, self.far_sink = self.near_call.dup(), self.far_call.dup()
        self.near_owner, self.far_owner = Owner(), Owner()
        self._streams: list[Joined] = []
        near = Connection(Hello(WINDOW_MAX_BYTES, bytes(16)), ports)
        self.near = Mux(
            self.loop,
            near,
            self.near_call,
            self.near_sink,
            self.near_budget,
            self.near_owner,
            half_close_s,
            idle_s,
        )
        if is_far_there:
            hello = Hello(WINDOW_MAX_BYTES, bytes(16), max_streams=max_streams, lease_s=300)
            far = Connection(hello, ports)
            self.far = Mux(
                self.loop, far, self.far_call, self.far_sink, self.far_budget, self.far_owner, half_close_s
            )
            self.until(lambda: self.near_owner.is_ready and self.far_owner.is_ready)

    def __enter__(self) -> "MuxBench":
        return self

    def __exit__(self, *_: object) -> None:
        self.clock.let_go()
        for mux in self.muxes:
            mux.abandon()
            for leg in list(mux.legs.values()):
                leg.abort_from_here()
        for stream in self._streams:
            stream.close()
        for sock in (self.near_call, self.far_call, self.near_sink, self.far_sink):
            sock.close()
        self.loop.close()

    @property
    def muxes(self) -> tuple[Mux, ...]:
        """Those that this loop turns."""
        return (self.near, self.far) if hasattr(self, "far") else (self.near,)

    def open(self, port: int = PORTS.start) -> tuple[socket.socket, Leg]:
        """Ask for a stream; the client, and its leg."""
        client, accepted = tcp_pair()
        leg = self.near.open(port, ORIGIN, accepted)
        assert leg is not None
        return client, leg

    def open_on(self, sock: socket.socket) -> Leg | None:
        return self.near.open(PORTS.start, ORIGIN, sock)

    def join(self) -> Joined:
        """A stream from end to end, with socket buffers as small as they are set at work."""
        client, near = self.open()
        asked = len(self.far_owner.requested)
        self.until(lambda: len(self.far_owner.requested) > asked)
        server, connected = tcp_pair()
        for sock in (client, near.sock, server, connected):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        far = self.far.accept(self.far_owner.requested[-1].stream_id, connected)
        assert far is not None
        self.until(lambda: near.is_joined)
        stream = Joined(client, server, near, far)
        self._streams.append(stream)
        return stream

    def turn(self, times: int = 5) -> bool:
        """So many turns, for which no time passes; whether any byte was moved in them."""
        before = self._moved_bytes()
        for _ in range(times):
            self.loop.run_once(0)
        return self._moved_bytes() != before

    def _moved_bytes(self) -> list[tuple[int, int, int]]:
        legs = [leg for mux in self.muxes for leg in mux.legs.values()]
        return [(leg.sent, leg.received, pending_bytes(leg)) for leg in legs]

    def tick(self, count: int) -> None:
        """So many seconds, at once."""
        for _ in range(count):
            self.clock.advance(TICK_S)
            self.turn()

    def until(self, condition: Callable[[], object], bound_s: float = BOUND_S) -> None:
        deadline = time.monotonic() + bound_s
        while not condition():
            assert time.monotonic() < deadline, "it does not come true"
            self._wait()

    def _wait(self) -> None:
        """One turn, in which time passes as in a process that is never stopped."""
        began = time.monotonic()
        self.loop.run_once(_LOOK_S)
        if not self.is_time_still:
            self.clock.advance(min(time.monotonic() - began, _LOOK_S))

    def read(self, sock: socket.socket, size: int) -> bytes:
        """Turn until so much has come."""
        data = bytearray()

        def has_come() -> bool:
            try:
                chunk = sock.recv(size - len(data))
            except BlockingIOError:
                return False
            assert chunk, f"an end of file after {len(data)} of {size} bytes"
            data.extend(chunk)
            return len(data) == size

        self.until(has_come)
        return bytes(data)

    def read_to_end(self, sock: socket.socket) -> tuple[bytes, str]:
        """Turn until the end; what came, and ``EOF`` or ``RST``."""
        data = bytearray()
        how: list[str] = []

        def has_ended() -> bool:
            try:
                chunk = sock.recv(1 << 20)
            except BlockingIOError:
                return False
            except ConnectionResetError:
                how.append("RST")
                return True
            data.extend(chunk)
            if not chunk:
                how.append("EOF")
            return not chunk

        self.until(has_ended)
        return bytes(data), how[0]

    def is_aborted(self, sock: socket.socket) -> bool:
        return self.read_to_end(sock)[1] == "RST"

    def stall(self, *senders: socket.socket) -> int:
        """Send from all ``senders`` until nothing moves any more, in the kernel either; how much that was.

        What a full socket had no room for is on its way until somebody reads, and is sent again ever later.
        """
        sent = 0
        flying: list[int] = []
        since = 0.0
        deadline = time.monotonic() + BOUND_S
        is_moving = True
        while is_moving:
            assert time.monotonic() < deadline, "it never stalls"
            socks = {*senders, *self._sockets()}
            for one in socks:
                acknowledge(one)  # that makes room
            before, flying = flying, sorted(map(in_flight_bytes, socks))
            if flying != before:
                since = time.monotonic()
            is_moving = any(flying) and time.monotonic() < since + _STANDS_S
            if is_moving:
                select.select([], [], [], 0.001)
            is_moving = self.turn() or is_moving
            for sock in senders:
                with contextlib.suppress(BlockingIOError):
                    sent += sock.send(_BLOCK)
                    is_moving = True
        return sent

    def _sockets(self) -> set[socket.socket]:
        legs = [leg for mux in self.muxes for leg in mux.legs.values()]
        outer = [sock for stream in self._streams for sock in (stream.client, stream.server)]
        return {leg.sock for leg in legs} | set(outer)

    @property
    def is_all_back(self) -> bool:
        """Whether neither end's budget has anything lent."""
        return all(
            (budget.streams, budget.shared_left) == (0, Budget(budget.total, budget.streams_max).shared_left)
            for budget in (self.near_budget, self.far_budget)
        )

    def wake_ups(self) -> int:
        """How often the kernel has news in fifty turns in which nothing can be moved."""
        count = 0
        for _ in range(50):
            count += is_ready(self.loop)
            self.loop.run_once(0)
        return count
