# SPDX-License-Identifier: GPL-2.0-or-later
"""A copy between two pairs of sockets, turned by hand."""

import socket
from collections.abc import Callable

from qubes_fwd_qrexec.loop import Loop
from qubes_fwd_qrexec.relay import BUFFER_BYTES, Copy, CopyEnd, Relay

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
        for _ in range(2000):
            if self.ends:
                break
            self.loop.run_once(0.01)
        (end,) = self.ends
        return end

    def stall(self) -> None:
        """Send until nothing moves any more."""
        self.far_source.setblocking(False)
        idle = 0
        while idle < 20:
            try:
                self.far_source.send(bytes(BUFFER_BYTES))
                idle = 0
            except BlockingIOError:
                idle += 1
            self.turn(1)
        assert self.copy.pending

    def wake_ups(self) -> int:
        """How often the kernel has news in twenty turns in which nothing can be moved."""
        self.turn(2)
        return sum(bool(self.loop._epoll.poll(0)) for _ in range(20))

    def close(self) -> None:
        self.loop.close()
        for sock in (self.far_source, self.source, self.sink, self.far_sink):
            sock.close()


def receive_all(sock: socket.socket) -> bytes:
    sock.setblocking(True)
    sock.settimeout(5)
    data = b""
    while chunk := sock.recv(65536):
        data += chunk
    return data
