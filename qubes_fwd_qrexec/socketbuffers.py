# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel may hold for the TCP sockets of a process, in their buffers.

A connection that stalls fills both its buffers, so these are part of what a process may be made to hold. They
are lent as windows are (`budget`): large to the few that move much, small where there are many, and back when
nothing is in them. A socket's own floor is small enough for any number, and it still moves everything, only
less at a time.
"""

import socket
import struct

# What a socket has in each direction, as it is asked for. The kernel lets twice as much be used, for what it
# needs beside the bytes themselves (socket(7), SO_SNDBUF), so a connection counts four times.
_TIMES = 4
FLOOR_BYTES = 8 << 10
# The longest segment of loopback fits: with less, its two ends wait for each other's timers.
START_BYTES = 64 << 10
# What a stock kernel lets a program ask for (net.core.wmem_max): a gigabit over a LAN's 1 ms, and 6 MiB/s to
# a client 50 ms away.
MAX_BYTES = 212_992
# All that is lent above the floors: 75 connections of the largest size, or 300 as they begin.
SHARED_BYTES = 64 << 20
# No connection has more than this part of what is left, so that there is always something for the next.
_PART = 64
# linux/sock_diag.h: what is received and not read is the first number, what is sent and not taken the sixth.
_SO_MEMINFO = 55
_MEMINFO = struct.Struct("=I16xI")


class SocketMemory:
    """The account of one process; in bytes of kernel memory."""

    def __init__(self, total: int = SHARED_BYTES) -> None:
        self.total = total
        self.left = total

    @property
    def size_max(self) -> int:
        """The largest buffer, in each direction, that a socket may have now."""
        return min(max(self.left // _PART // _TIMES, FLOOR_BYTES), MAX_BYTES)

    @property
    def is_short(self) -> bool:
        """Whether so little is left that what is lent and empty is missed elsewhere."""
        return self.left < self.total // 2


class Buffers:
    """The buffers of one connection: ``size`` bytes in each direction.

    They grow as it moves bytes: whoever moves them calls `grow` when they are ``grow_at`` in all.
    """

    __slots__ = ("_account", "_moved", "_sock", "grow_at", "size")

    def __init__(self, account: SocketMemory, sock: socket.socket) -> None:
        self._account = account
        self._sock = sock
        self._moved = 0
        self.size = FLOOR_BYTES
        self._resize(min(START_BYTES, account.size_max))
        self.grow_at = 2 * self.size

    def grow(self, moved: int) -> None:
        """``moved`` bytes in all, in both directions, is much for so small a size."""
        size = min(2 * self.size, self._account.size_max)
        if size > self.size:
            self._resize(size)
        self.grow_at = moved + 2 * self.size

    def look(self, moved: int) -> None:
        """Once a second: while memory is short, what was lent, is empty and was not used is for others.

        What is full could not be taken back: the kernel holds it until it is read.
        """
        used, self._moved = moved - self._moved, moved
        is_missed = self._account.is_short and used < self.size and self.size > FLOOR_BYTES
        if is_missed and held_bytes(self._sock) == 0:
            self._resize(FLOOR_BYTES)
            self.grow_at = moved + 2 * FLOOR_BYTES

    def leave(self) -> None:
        """The socket is somebody else's from now on, or is closed."""
        self._account.left += _TIMES * (self.size - FLOOR_BYTES)
        self.size = FLOOR_BYTES

    def _resize(self, size: int) -> None:
        self._account.left -= _TIMES * (size - self.size)
        self.size = size
        set_size(self._sock, size)


def set_size(sock: socket.socket, size: int) -> None:
    """Let a socket have so many bytes in each direction; what is in it already stays."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


def held_bytes(sock: socket.socket) -> int:
    """What the kernel holds for a socket now, in both directions, with all that it needs beside the bytes."""
    received, queued = _MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size))
    return int(received + queued)
