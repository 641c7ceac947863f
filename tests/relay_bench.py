# SPDX-License-Identifier: GPL-2.0-or-later
"""A copy between two pairs of sockets, turned by hand."""

import contextlib
import socket
import time
from collections.abc import Callable

from helpers import BOUND_S, is_ready
from inflight import acknowledge, in_flight_bytes

from qubes_fwd_qrexec.relay.copy import BUFFER_BYTES, Copy, CopyEnd, Relay
from qubes_fwd_qrexec.relay.loop import Loop

Pair = Callable[[], tuple[socket.socket, socket.socket]]


class Bench:
    """A copy from ``far_source`` through the loop to ``far_sink``."""

    def __init__(self, source_pair: Pair, sink_pair: Pair) -> None:
        self.far_source, self.source = source_pair()
        self.sink, self.far_sink = sink_pair()
        self.loop = Loop()
        self.relay = Relay(self.loop)
        self.ends: list[CopyEnd] = []
        self.copy = Copy(self.source, self.sink)
        self.relay.start(self.copy, self.ends.append)

    def turn(self, times: int = 3) -> None:
        for _ in range(times):
            self.loop.run_once(0)

    def turn_until_end(self) -> CopyEnd:
        turn_until(self.loop, lambda: self.ends)
        (end,) = self.ends
        return end

    def stall(self) -> None:
        """Send until nothing moves any more, in the kernel either."""
        socks = (self.far_source, self.source, self.sink, self.far_sink)
        before = -1

        def is_still() -> bool:
            nonlocal before
            moved, before = self.copy.moved != before, self.copy.moved
            for sock in socks:
                acknowledge(sock)  # that makes room
            is_moving = any(map(in_flight_bytes, socks)) or moved
            with contextlib.suppress(BlockingIOError):
                self.far_source.send(bytes(BUFFER_BYTES))
                is_moving = True
            return not is_moving

        turn_until(self.loop, is_still)
        assert self.copy.pending

    def wake_ups(self) -> int:
        """How often the kernel has news in twenty turns in which nothing can be moved."""
        self.turn(2)
        return sum(is_ready(self.loop) for _ in range(20))

    def close(self) -> None:
        self.loop.close()
        for sock in (self.far_source, self.source, self.sink, self.far_sink):
            sock.close()


def turn_until(loop: Loop, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + BOUND_S
    while not condition():
        assert time.monotonic() < deadline, "it does not come true"
        loop.run_once(0.001)


def receive_all(sock: socket.socket) -> bytes:
    sock.setblocking(True)
    sock.settimeout(BOUND_S)
    data = b""
    while chunk := sock.recv(65536):
        data += chunk
    return data
