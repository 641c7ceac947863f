# SPDX-License-Identifier: GPL-2.0-or-later
"""A stream of a mux call as a trio stream, so that trio's own checks of streams can judge it.

Nothing else uses it: two tasks for each connection would cost more than what they do. Bytes go through a
socketpair whose other end is a leg like any other; what a socketpair cannot say, an abort, the leg says.
"""

import socket

import trio

from qubes_fwd_qrexec.relay.leg import Leg
from qubes_fwd_qrexec.relay.leg_end import LegEnd
from qubes_fwd_qrexec.relay.thread import RelayThread


class MuxStream(trio.abc.HalfCloseableStream):
    """One end of an open stream, whose leg has the other end of ``sock``.

    The peer's RESET, and the mux call's loss, are BrokenResourceError.
    """

    def __init__(self, sock: socket.socket, leg: Leg, relays: RelayThread) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._leg = leg
        self._relays = relays

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        received = await self._stream.receive_some(max_bytes)
        if not received and self._leg.ended is LegEnd.REMOTE_RESET and not self._leg.has_eof:
            raise trio.BrokenResourceError("the other end aborted the stream")
        return received

    async def aclose(self) -> None:
        """Close as trio's own socket streams do: what was sent is delivered, and then an end of file."""
        await self._stream.aclose()

    def abort(self) -> None:
        """RESET for the other end, whatever was sent before."""
        self._relays.order(self._leg.abort_from_here, self._leg.fail)
