# SPDX-License-Identifier: GPL-2.0-or-later
"""A stream of a tunnel as a trio stream, for what is not a socket to be relayed.

The relay itself never uses it: it would cost two tasks for each connection. Bytes go through a
socketpair whose other end is a leg like any other; what a socketpair cannot say, an abort, the leg says.
"""

import socket

import trio

from .leg import Leg, LegEnd
from .relaythread import RelayThread

_BUFFER_BYTES = 65536


class TunnelStream(trio.abc.HalfCloseableStream):
    """Made by `tunnel_stream`. The peer's RESET, and the tunnel's loss, are BrokenResourceError."""

    def __init__(self, sock: socket.socket, relays: RelayThread) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._relays = relays
        self._leg: Leg | None = None

    def joined(self, leg: Leg) -> None:
        """The stream is open, and this is its leg."""
        self._leg = leg

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        received = await self._stream.receive_some(max_bytes)
        leg = self._leg
        is_reset = leg is not None and leg.ended is LegEnd.REMOTE_RESET and not leg.has_eof
        if is_reset and not received:
            raise trio.BrokenResourceError("the other end aborted the stream")
        return received

    async def aclose(self) -> None:
        """Close as trio's own socket streams do: what was sent is delivered, and then an end of file."""
        await self._stream.aclose()

    def abort(self) -> None:
        """RESET for the other end, whatever was sent before."""
        leg = self._leg
        if leg is not None:
            self._relays.order(leg.abort_from_here)
