# SPDX-License-Identifier: GPL-2.0-or-later
"""A datagram mux instead of the exposed qube, and the target's end of the call, in one thread."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Self

from flow_bench import ORIGIN, Kept, Owner
from helpers import BOUND_S, is_ready, unix_pair
from loop_time import LoopClock
from service_bench import Word

from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.mux import FlowConnection, Hello, Origin, ProxyVersion
from qubes_fwd_qrexec.relay.flowmux import FlowMux
from qubes_fwd_qrexec.relay.loop import Loop
from qubes_fwd_qrexec.target import udpflow, udpservice
from qubes_fwd_qrexec.target.callservice import LEASE_S, Lease
from qubes_fwd_qrexec.target.udpflow import NewSocket, new_socket
from qubes_fwd_qrexec.target.udpservice import UdpService


@contextmanager
def udp_server(host: str = "127.0.0.1", port: int = 0) -> Iterator[socket.socket]:
    """A server's socket; it waits for what it receives."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(BOUND_S)
        sock.bind((host, port))
        yield sock


def udp_port(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


class UdpBench(ExitStack):
    """`listener` opens flows to the service; time passes where the test says so."""

    def __init__(
        self,
        ports: TargetPorts,
        *,
        asked: TargetPorts | None = None,
        flows_max: int = 100,
        new: NewSocket = new_socket,
    ) -> None:
        """``asked``: the ports that the listener's end takes its call to be for."""
        super().__init__()
        self.clock = LoopClock(udpflow, udpservice)
        self.callback(self.clock.let_go)
        self.word = Word()
        self.said_s = self.clock.now
        self.owner = Owner()
        self.call, of_service = map(self.enter_context, unix_pair())
        sinks = [self.enter_context(call.dup()) for call in (self.call, of_service)]
        loop = Loop()
        self.callback(loop.close)
        asked = asked or ports
        connection = FlowConnection(Hello(0, bytes(16)), range(asked.first, asked.last + 1))
        self.listener = self.owner.mux = FlowMux(loop, connection, self.call, sinks[0], self.owner)
        self.callback(self.listener.abandon)
        lease = Lease(LEASE_S, lambda: self.said_s)
        self.service = UdpService(ports, of_service, sinks[1], lease, self.word, flows_max=flows_max, new=new)
        self.callback(self.service.close)
        self.callback(self.service.mux.abandon)

    def __enter__(self) -> Self:
        self.run(lambda: self.owner.is_ready)
        return self

    def run(self, until: Callable[[], object]) -> None:
        """Turn both loops until something is so."""
        deadline = time.monotonic() + BOUND_S
        while not until():
            assert time.monotonic() < deadline, "it does not come"
            for loop in (self.listener.loop, self.service.loop):
                loop.run_once(0.0)

    def settle(self) -> None:
        """Turn both loops until nothing is left that they could do at once."""
        loops = (self.listener.loop, self.service.loop)
        for loop in loops:
            loop.run_once(0.0)
        while any(map(is_ready, loops)):
            for loop in loops:
                loop.run_once(0.0)

    def pass_s(self, seconds: float) -> None:
        """Let so much time pass, a second at a time."""
        while seconds > 0:
            self.clock.advance(min(seconds, 1.0))
            self.settle()
            seconds -= 1.0

    def open(
        self, port: int, proxy: ProxyVersion = ProxyVersion.OFF, origin: Origin = ORIGIN
    ) -> tuple[int, Kept]:
        kept = Kept()
        return self.listener.open(port, origin, proxy, kept), kept

    def ask(self, port: int, data: bytes = b"ask", segment: int = 0) -> tuple[int, Kept]:
        """A new flow and its first datagrams, which are sent."""
        flow_id, kept = self.open(port)
        self.listener.send(flow_id, data, segment)
        self.settle()
        return flow_id, kept
