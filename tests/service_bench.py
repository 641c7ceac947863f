# SPDX-License-Identifier: GPL-2.0-or-later
"""A mux instead of the exposed qube, and the target's end of the mux call, in one thread."""

import contextlib
import select
import socket
from collections.abc import Iterator

from helpers import port_of, tcp_pair
from mux_bench import BOUND_S, ORIGIN, MuxBench

from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.mux import Connection, Hello, Origin, ProxyVersion, ResetCode
from qubes_fwd_qrexec.relay.leg import Leg
from qubes_fwd_qrexec.relay.loop import Loop
from qubes_fwd_qrexec.relay.mux import Mux
from qubes_fwd_qrexec.target.callservice import LEASE_S, Lease
from qubes_fwd_qrexec.target.muxservice import MuxService


class Word:
    """dom0's, of a call: a `Permission` in the hands of a test."""

    def __init__(self) -> None:
        self.is_allowed = True
        self.drain_left_s: float | None = None

    def look(self) -> bool:
        return self.is_allowed


class ServiceBench(MuxBench):
    """The near end of a mux call and the service at the other, each with its loop, turned in turns."""

    def __init__(
        self, ports: TargetPorts, lease_s: int = LEASE_S, *, asked: TargetPorts | None = None
    ) -> None:
        """``asked``: the ports that the near end takes its call to be for."""
        super().__init__(is_far_there=False)
        self.is_time_still = True
        try:
            self._begin_service(ports, lease_s, asked or ports)
        except BaseException:
            self.clock.let_go()
            raise
        self.is_time_still = False

    def _begin_service(self, ports: TargetPorts, lease_s: int, asked: TargetPorts) -> None:
        self.near.abandon()
        hello = Connection(Hello(1 << 19, bytes(16)), range(asked.first, asked.last + 1))
        self.near = Mux(self.loop, hello, self.near_call, self.near_sink, self.near_budget, self.near_owner)
        self.word = Word()
        self.said_s = self.clock.now
        lease = Lease(lease_s, lambda: self.said_s)
        self.service = MuxService(
            ports, self.far_call, self.far_sink, lease, self.word, budget=self.far_budget
        )
        near_loop, service = self.loop, self.service

        class Both(Loop):
            def run_once(self, timeout_s: float | None = None) -> None:
                near_loop.run_once(0)
                service.loop.run_once(timeout_s)

            def close(self) -> None:
                super().close()
                near_loop.close()
                service.close()

        self.loop = Both()
        self.until(lambda: self.near_owner.is_ready)

    @property
    def muxes(self) -> tuple[Mux, ...]:
        return self.near, self.service.mux

    def connect(
        self, port: int, proxy: ProxyVersion = ProxyVersion.OFF, origin: Origin = ORIGIN, first: bytes = b""
    ) -> tuple[socket.socket, Leg]:
        """``first``: what the client has sent before anybody asks for its stream."""
        client, accepted = tcp_pair()
        if first:
            client.sendall(first)
            arrived = select.poll()
            arrived.register(accepted, select.POLLIN)
            assert arrived.poll(1000 * BOUND_S)
        leg = self.near.open(port, origin, accepted, proxy)
        assert leg is not None
        return client, leg

    def refusal(self, port: int) -> ResetCode:
        """What a stream is refused with, which its socket survives."""
        client, leg = self.connect(port)
        with client, leg.sock:
            self.until(lambda: self.near_owner.refusals)
            ((refused, code),) = self.near_owner.refusals
            assert refused is leg
            self.near_owner.refusals.clear()
        return code

    def accept(self, server: socket.socket) -> socket.socket:
        """Turn until the server has a connection; the server's end of it."""
        found: list[socket.socket] = []

        def is_there() -> bool:
            with contextlib.suppress(BlockingIOError):
                found.append(server.accept()[0])
            return bool(found)

        self.until(is_there)
        found[0].setblocking(False)
        return found[0]


@contextlib.contextmanager
def full_server() -> Iterator[int]:
    """The port of a server whose accept queue is full: it answers nobody any more."""
    with contextlib.ExitStack() as sockets:
        server = sockets.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(3):
            filler = sockets.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(server.getsockname())
        yield port_of(server)
