# SPDX-License-Identifier: GPL-2.0-or-later
"""Bytes of a stream that its socket has not taken yet, in order, with what they cost of its window."""

import socket
from collections import deque

from qubes_fwd_qrexec.mux import Buffer

# Small pieces that wait are kept as one: each by itself takes some 350 bytes more than it has.
_JOIN_BYTES = 4096


class Pending:
    """Pieces that wait; true while there are any."""

    __slots__ = ("_pieces",)

    def __init__(self, data: Buffer, cost: int) -> None:
        self._pieces = deque([(memoryview(bytes(data)), cost)])

    def __len__(self) -> int:
        return len(self._pieces)

    @property
    def cost(self) -> int:
        """Of all that waits, in bytes of credit."""
        return sum(cost for _, cost in self._pieces)

    def add(self, data: Buffer, cost: int) -> None:
        """Behind all that waits; it is copied."""
        last, last_cost = self._pieces[-1]
        if len(last) + len(data) <= _JOIN_BYTES:
            self._pieces[-1] = (memoryview(b"".join((last, data))), last_cost + cost)
        else:
            self._pieces.append((memoryview(bytes(data)), cost))

    def send(self, sock: socket.socket) -> int:
        """Write what comes first; its cost if the socket has taken it whole, else 0. Raises OSError."""
        data, cost = self._pieces[0]
        sent = sock.send(data)
        if sent < len(data):
            self._pieces[0] = (data[sent:], cost)
            return 0
        self._pieces.popleft()
        return cost
