# SPDX-License-Identifier: GPL-2.0-or-later
"""Clients of forwards of UDP, with real sockets."""

import socket
from types import TracebackType
from typing import Self

import trio
from helpers import BOUND_S


def free_udp_port(host: str = "127.0.0.1") -> int:
    """A port that nobody has at the moment."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])


class UdpClient:
    """A client with a port of its own, which hears nobody but the address and port that it writes to."""

    def __init__(self, port: int, host: str = "127.0.0.1", own: str = "") -> None:
        self.sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setblocking(False)
        self.heard = 0
        """For a test that counts bytes."""
        if own:
            self.sock.bind((own, 0))
        self.sock.connect((host, port))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.send(data)

    async def hear(self) -> bytes:
        """The next datagram."""
        with trio.fail_after(BOUND_S):
            await trio.lowlevel.wait_readable(self.sock)
        return self.sock.recv(1 << 16)

    async def ask(self, data: bytes) -> bytes:
        self.send(data)
        return await self.hear()
