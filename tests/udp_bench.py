# SPDX-License-Identifier: GPL-2.0-or-later
"""The flows of one forward of UDP in a loop of the test's own thread, with real sockets of clients."""

import socket
from collections.abc import Callable
from contextlib import ExitStack
from typing import Self

from loop_time import LoopClock
from udp_clients import UdpClient

from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.values import Binding
from qubes_fwd_qrexec.exposed import flowtable, udpport
from qubes_fwd_qrexec.exposed.flow import Flow
from qubes_fwd_qrexec.exposed.flowtable import FlowMeans, FlowTable
from qubes_fwd_qrexec.exposed.udpport import open_udp
from qubes_fwd_qrexec.relay.loop import Loop


def udp_config(listen: str = "127.0.0.1", **options: str) -> ListenerConfig:
    """A forward of any free port; ``srcports`` are replaced by it."""
    given = {
        "version": "1",
        "service": "qubes.ForwardUDP",
        "transport": "mux",
        "side": "outer",
        "listen": listen,
        "srcports": "1024-1024",
        "dstports": "53-53",
        "srchosts": "any",
    } | {name.replace("_", "-"): value for name, value in options.items()}
    return ListenerConfig.parse("udp.work.dns", " ".join(f"{name}={value}" for name, value in given.items()))


class Carried:
    """In the place of the calls: it keeps what flows send, and does what ``then`` says."""

    def __init__(self) -> None:
        self.sent: list[tuple[Flow, bytes, int]] = []
        self.then: Callable[[Flow, bytes, int], None] = lambda flow, data, segment: None

    def carry(self, flow: Flow, data: bytes, segment: int, now: float) -> None:
        self.sent.append((flow, data, segment))
        self.then(flow, data, segment)

    @property
    def data(self) -> list[bytes]:
        return [data for _, data, _ in self.sent]


def echo(flow: Flow, data: bytes, segment: int) -> None:
    flow.deliver(data, segment)


class FlowBench:
    """A forward with one port for each address that it listens on, and what it carries."""

    def __init__(self, config: ListenerConfig | None = None, means: FlowMeans | None = None) -> None:
        self.config = config or udp_config()
        self.stack = ExitStack()
        self.clock = LoopClock(flowtable, udpport)
        self.loop = Loop()
        self.carried = Carried()
        self.table = FlowTable(self.config, "work dns", self.carried, self.loop, means or FlowMeans())
        self.port = 0
        sockets: dict[Binding, socket.socket] = {}
        for address in self.config.listen:
            sock = open_udp(address, self.port)
            self.port = self.port or int(sock.getsockname()[1])
            sockets[address, self.port] = sock
        self.config = self.with_port(self.config)
        self.table.config = self.config
        self.table.open(sockets)

    def with_port(self, config: ListenerConfig) -> ListenerConfig:
        """The same configuration for the port that the kernel gave."""
        text = str(config).replace("srcports=1024-1024", f"srcports={self.port}-{self.port}")
        return ListenerConfig.parse(config.key, text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()
        self.table.give_up(list(self.table.ports), is_cut=True)
        self.clock.let_go()
        self.loop.close()

    def client(self, host: str = "127.0.0.1", own: str = "") -> UdpClient:
        return self.stack.enter_context(UdpClient(self.port, host, own))

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.loop.run_once(0)

    def send(self, client: UdpClient, data: bytes = b"x") -> None:
        """A datagram of a client, and the turn in which it comes."""
        client.send(data)
        self.turn()

    def pass_s(self, seconds: int) -> None:
        """So many seconds pass, one by one, as the process runs."""
        for _ in range(seconds):
            self.clock.advance(1)
            self.turn()

    @property
    def flows(self) -> list[Flow]:
        return list(self.table.flows)
