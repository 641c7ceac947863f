# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel may hold for the TCP sockets of a process, in their buffers.

A connection that stalls fills both its buffers, so these are part of what a process may be made to hold. They
are lent as windows are (`budget`): large to the few that move much, small where there are many, and back when
nothing is in them. With its floor alone a socket still moves everything, only less at a time.

Floors for all the connections of a process would be more than a small qube has, and most are empty. So where
there are many it is also looked at what they really hold; those that stand still with too much are cut.
"""

import socket
import struct

# What a socket has in a direction, as it is asked for. The kernel lets twice as much be used, for what it
# needs beside the bytes themselves (socket(7), SO_SNDBUF).
_TIMES = 2
FLOOR_BYTES = 16 << 10
# No segment is longer than the smallest buffer. Those of loopback have 64 KiB, and where one does not fit,
# both ends wait for timers: a server was read from at 3 MiB/s. On a network they are shorter anyway. With
# segments of 8 KiB a bulk stream took more of the processor.
SEGMENT_BYTES = FLOOR_BYTES
START_BYTES = 64 << 10
# While a client waits for its target: more than it sends before it has heard anything.
WAITING_BYTES = 32 << 10
# What a stock kernel lets a program ask for (net.core.wmem_max): a gigabit over a LAN's 1 ms, and 6 MiB/s to
# a client 50 ms away.
MAX_BYTES = 212_992
# All that is lent above the floors: 149 directions of the largest size, or 597 as they begin.
SHARED_BYTES = 56 << 20
# What all sockets may really hold. It is enough for all that is lent, and for as many that stall with their
# floor as one source may have by default (1024, of 70 KiB each: their floor, and a segment that came in).
HELD_BYTES = 128 << 20
# Each counts as this much before it is asked: as it begins, with a segment beside that.
_EACH_BYTES = 256 << 10
# No buffer has more than this part of what is left, so that there is always something for the next.
_PART = 128
# linux/sock_diag.h: what is received and not read is the first number, what is sent and not taken the sixth.
_SO_MEMINFO = 55
_MEMINFO = struct.Struct("=I16xI")
_MEMINFO_PLACE = {socket.SO_RCVBUF: 0, socket.SO_SNDBUF: 1}


class SocketMemory:
    """The account of one process, in bytes of kernel memory: what may be lent, and what may be held."""

    def __init__(self, total: int = SHARED_BYTES, held_max: int = HELD_BYTES) -> None:
        self.total = total
        self.left = total
        self.held_max = held_max
        self.buffers = 0
        self.held = 0
        """What they held when each was looked at last."""

    @property
    def size_max(self) -> int:
        """The largest buffer that a direction may have now."""
        return min(max(self.left // _PART // _TIMES, FLOOR_BYTES), MAX_BYTES)

    @property
    def is_short(self) -> bool:
        """Whether so little is left that what is lent and empty is missed elsewhere."""
        return self.left < self.total // 2

    @property
    def is_crowded(self) -> bool:
        """Whether there are so many that it counts what each of them really holds."""
        return self.buffers * _EACH_BYTES > self.held_max

    @property
    def is_full(self) -> bool:
        """Whether more is held than may be: something must go."""
        return self.held > self.held_max


class SocketBuffer:
    """One direction of one connection: ``option`` is SO_SNDBUF or SO_RCVBUF, ``size`` its bytes.

    It grows as bytes are moved: whoever moves them calls `grow` when they are ``grow_at`` in all.
    """

    __slots__ = ("_account", "_held", "_is_still", "_moved", "_option", "_sock", "grow_at", "size")

    def __init__(self, account: SocketMemory, sock: socket.socket, option: int) -> None:
        self._account = account
        self._sock = sock
        self._option = option
        self._moved = self._held = 0
        self._is_still = False
        account.buffers += 1
        self.size = FLOOR_BYTES
        self._resize(min(START_BYTES, account.size_max))
        self.grow_at = 2 * self.size

    def grow(self, moved: int) -> None:
        """``moved`` bytes in all is much for so small a size."""
        size = min(2 * self.size, self._account.size_max)
        if size > self.size:
            self._resize(size)
        self.grow_at = moved + 2 * self.size

    def look(self, moved: int) -> None:
        """Once a second: while memory is short, what was lent, is empty and was not used is for others.

        What is full could not be taken back: the kernel holds it until it is read.
        """
        account = self._account
        used, self._moved = moved - self._moved, moved
        is_missed = account.is_short and used < self.size and self.size > FLOOR_BYTES
        if not (is_missed or account.is_crowded):
            return
        self._is_still = used == 0
        self._hold(held_bytes(self._sock, self._option))
        if is_missed and self._held == 0:
            self._resize(FLOOR_BYTES)
            self.grow_at = moved + 2 * FLOOR_BYTES

    @property
    def is_too_much(self) -> bool:
        """Whether the account is full, and this stands still and holds at least what one does on average."""
        account = self._account
        return account.is_full and self._is_still and self._held * account.buffers >= account.held

    def leave(self) -> None:
        """The socket is somebody else's from now on, or is closed; called once."""
        self._account.left += _TIMES * (self.size - FLOOR_BYTES)
        self._account.buffers -= 1
        self._hold(0)

    def _hold(self, held: int) -> None:
        self._account.held += held - self._held
        self._held = held

    def _resize(self, size: int) -> None:
        self._account.left -= _TIMES * (size - self.size)
        self.size = size
        self._sock.setsockopt(socket.SOL_SOCKET, self._option, size)


def set_size(sock: socket.socket, size: int) -> None:
    """Let a socket have so many bytes in each direction; what is in it already stays."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


def limit_segments(sock: socket.socket) -> None:
    """Before a TCP socket connects or listens: it works with the smallest buffer too. Raises OSError."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)


def held_bytes(sock: socket.socket, option: int) -> int:
    """What the kernel holds in that buffer of a socket now, with all that it needs beside the bytes."""
    held = _MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size))
    return int(held[_MEMINFO_PLACE[option]])
