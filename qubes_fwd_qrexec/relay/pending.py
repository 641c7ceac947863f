# SPDX-License-Identifier: GPL-2.0-or-later
"""Data of a stream that its socket has not taken yet, in order, and the credit that it cost."""

import socket
from collections import deque

from qubes_fwd_qrexec.mux import Buffer

# Small pieces are joined while they wait: each one takes some 350 bytes beside its data.
_JOIN_BYTES = 4096


class Pending:
    """Pieces that wait to be written; true while there are any."""

    __slots__ = ("_pieces",)

    def __init__(self, data: Buffer, cost: int) -> None:
        self._pieces = deque([(memoryview(bytes(data)), cost)])

    def __len__(self) -> int:
        return len(self._pieces)

    @property
    def cost(self) -> int:
        """The credit in bytes that everything here has cost."""
        return sum(cost for _, cost in self._pieces)

    def add(self, data: Buffer, cost: int) -> None:
        """Copy ``data`` and keep it behind everything else."""
        last, last_cost = self._pieces[-1]
        if len(last) + len(data) <= _JOIN_BYTES:
            self._pieces[-1] = (memoryview(b"".join((last, data))), last_cost + cost)
        else:
            self._pieces.append((memoryview(bytes(data)), cost))

    def send(self, sock: socket.socket) -> int:
        """Write the first piece. Returns its cost if the socket took all of it, else 0. Raises OSError."""
        data, cost = self._pieces[0]
        sent = sock.send(data)
        if sent < len(data):
            self._pieces[0] = (data[sent:], cost)
            return 0
        self._pieces.popleft()
        return cost
