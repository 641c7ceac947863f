# SPDX-License-Identifier: GPL-2.0-or-later
"""One end of a mux call at work, and a peer that a test speaks for, frame by frame, over a real socket.

`MuxBench` wires two ends together, which take turns as they do; here the test says what stands in one
chunk of the call, and what the sockets of the streams have to tell in the same turn.
"""

import contextlib
import socket

from helpers import tcp_pair, unix_pair
from loop_time import LoopClock
from mux_bench import ORIGIN, PORTS, Owner

from qubes_fwd_qrexec.mux import Connection, Event, Hello, OpenReceived, ResetReceived, Role
from qubes_fwd_qrexec.relay.budget import WINDOW_MAX_BYTES, Budget
from qubes_fwd_qrexec.relay.loop import Loop
from qubes_fwd_qrexec.relay.mux import Mux

_CREDIT_BYTES = 65536
# A socket that is not read is full after a few writes.
_BUFFER_BYTES = 4608


class PeerBench:
    """``mux`` is the end under test, of that role; ``peer`` is the other end's protocol, and no more."""

    def __init__(self, role: Role, max_streams: int = 100) -> None:
        self.clock = LoopClock()
        self.role = role
        self.origin = ORIGIN
        self.loop = Loop()
        self.owner = Owner()
        self.owner.answer = self._accept
        self.budget = Budget()
        self._call, self._far_call = unix_pair()
        self._sink = self._call.dup()
        listener = Hello(WINDOW_MAX_BYTES, bytes(16))
        target = Hello(WINDOW_MAX_BYTES, bytes(16), max_streams=max_streams, lease_s=300)
        own, other = (listener, target) if role is Role.LISTENER else (target, listener)
        connection = Connection(own, PORTS)
        self.mux = Mux(self.loop, connection, self._call, self._sink, self.budget, self.owner)
        self.peer = Connection(other, PORTS)
        self.socks: dict[int, socket.socket] = {}
        """The test's end of each stream's TCP connection."""
        self.exchange()

    def __enter__(self) -> "PeerBench":
        return self

    def __exit__(self, *_: object) -> None:
        self.clock.let_go()
        self.mux.abandon()
        for leg in list(self.mux.legs.values()):
            leg.abort_from_here()
        for sock in (*self.socks.values(), self._call, self._far_call, self._sink):
            sock.close()
        self.loop.close()

    def open(self) -> int:
        """A stream that both ends have agreed on; its number."""
        known = set(self.socks)
        if self.role is Role.LISTENER:
            near = self._tcp(len(self.socks) + 1)
            assert self.mux.open(PORTS.start, ORIGIN, near) is not None
        else:
            self.peer.open_stream(PORTS.start, ORIGIN, _CREDIT_BYTES)
        self.exchange()
        (stream_id,) = set(self.socks) - known
        return stream_id

    def _accept(self, event: OpenReceived) -> None:
        assert self.mux.accept(event.stream_id, self._tcp(event.stream_id)) is not None

    def _tcp(self, stream_id: int) -> socket.socket:
        self.socks[stream_id], near = tcp_pair()
        for sock in (self.socks[stream_id], near):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        return near

    def fill_call(self) -> None:
        """The call takes nothing more, while the mux has nothing that waits; the peer must not read on."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._sink.send(bytes(65536))

    def say(self, more: bytes = b"") -> None:
        """Write all that the peer has to say, and then something more, as one chunk."""
        frames = b"".join(self.peer.data_to_send()) + more
        if frames:
            assert self._far_call.send(frames) == len(frames)

    def hear(self) -> list[Event]:
        """Have the peer read what the mux has said."""
        heard: list[Event] = []
        with contextlib.suppress(BlockingIOError):
            while chunk := self._far_call.recv(1 << 20):
                for event in self.peer.receive_data(chunk):
                    heard.append(event)
                    if isinstance(event, OpenReceived):
                        self.peer.accept_stream(event.stream_id, _CREDIT_BYTES)
                    elif isinstance(event, ResetReceived):
                        self.peer.reset_stream(event.stream_id)
        return heard

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.loop.run_once(0)

    def exchange(self) -> None:
        """Both say and hear all that they have to, while no time passes."""
        for _ in range(4):
            self.say()
            self.turn(2)
            self.hear()
