# SPDX-License-Identifier: GPL-2.0-or-later
"""What the kernel may hold in the socket buffers of a process's TCP connections.

A connection that stalls fills both its buffers, so they count among what peers can make a process hold. They
are lent like windows (`budget`): large ones to the few that move much, small ones when there are many, and
given back when they are empty. With only its floor a socket still moves everything, but less at a time.

Floors for all possible connections would be more than a small qube has, and most of them are empty. So when
there are many connections, the kernel is asked what they really hold, and stalled ones that hold too much are
cut.
"""

import socket
import struct

# Sizes are for one direction, as SO_SNDBUF is set. The kernel allows twice as much, for what it needs beside
# the bytes themselves (socket(7), SO_SNDBUF).
_TIMES = 2
FLOOR_BYTES = 16 << 10
# No segment is longer than the smallest buffer. Loopback has segments of 64 KiB, and if one does not fit,
# both ends wait for timers: reading from a server fell to 3 MiB/s. On a network segments are shorter
# anyway. With segments of 8 KiB a bulk stream took more of the processor.
SEGMENT_BYTES = FLOOR_BYTES
START_BYTES = 64 << 10
# While a client waits for its target: more than a client sends before it has heard anything.
WAITING_BYTES = 32 << 10
# The most that a stock kernel lets a program ask for (net.core.wmem_max): a gigabit at a LAN's 1 ms, and
# 6 MiB/s to a client 50 ms away.
MAX_BYTES = 212_992
# The sizes that a buffer may begin with, and how much moves then before it grows. All connections share these
# numbers, so that they take no memory in each.
_GROW_AT = {size: 2 * size for size in (START_BYTES, START_BYTES // 2, FLOOR_BYTES)}
# What is lent above the floors: 149 directions of the largest size, or 597 of the initial size.
SHARED_BYTES = 56 << 20
# What all sockets together may really hold: enough for what is lent, and for as many connections stalled at
# their floor as one client may have by default (1024, of 70 KiB each: their floor and one segment).
HELD_BYTES = 128 << 20
# Each buffer counts as this much until the kernel is asked: its initial size and one segment.
_EACH_BYTES = 256 << 10
# No buffer has more than this part of what is left, so that there is always something left for the next one.
_PART = 128
# linux/sock_diag.h: what is received and not read is the first number, what is sent and not taken the sixth.
_SO_MEMINFO = 55
_MEMINFO = struct.Struct("=I16xI")
_MEMINFO_PLACE = {socket.SO_RCVBUF: 0, socket.SO_SNDBUF: 1}


class SocketMemory:
    """The account of one process, in bytes of kernel memory: what it may lend, and what sockets may hold."""

    def __init__(self, total: int = SHARED_BYTES, held_max: int = HELD_BYTES) -> None:
        self.total = total
        self.left = total
        self.held_max = held_max
        self.buffers = 0
        self.held = 0
        """What they held when each was last looked at."""

    @property
    def size_max(self) -> int:
        """The largest buffer that one direction may have now."""
        return min(max(self.left // _PART // _TIMES, FLOOR_BYTES), MAX_BYTES)

    @property
    def is_short(self) -> bool:
        """Whether so little is left that others need what is lent and empty."""
        return self.left < self.total // 2

    @property
    def is_crowded(self) -> bool:
        """Whether there are so many that what each of them really holds matters."""
        return self.buffers * _EACH_BYTES > self.held_max

    @property
    def is_full(self) -> bool:
        """Whether sockets hold more than they may, so that some must be cut."""
        return self.held > self.held_max


class SocketBuffer:
    """One direction of one connection: ``option`` is SO_SNDBUF or SO_RCVBUF, ``size`` is in bytes.

    It grows with traffic: the caller calls `grow` when it has moved ``grow_at`` bytes in all. ``held``: how
    many bytes the kernel had in it at the last `look`.
    """

    __slots__ = ("_account", "_is_still", "_moved", "_option", "_sock", "grow_at", "held", "size")

    def __init__(self, account: SocketMemory, sock: socket.socket, option: int) -> None:
        self._account = account
        self._sock = sock
        self._option = option
        self._moved = self.held = 0
        self._is_still = False
        account.buffers += 1
        self.size = FLOOR_BYTES
        size = next(size for size in _GROW_AT if size <= account.size_max)
        self._resize(size)
        self.grow_at = _GROW_AT[size]

    def grow(self, moved: int) -> None:
        """The connection has moved ``moved`` bytes in all, which is much for this size: double it."""
        size = min(2 * self.size, self._account.size_max)
        if size > self.size:
            self._resize(size)
        self.grow_at = moved + 2 * self.size

    def look(self, moved: int) -> None:
        """Ask the kernel what it holds, and give back what is lent, empty and unused while memory is short.

        A full buffer cannot be taken back: the kernel holds its bytes until they are read.
        """
        used, self._moved = moved - self._moved, moved
        self._is_still = used == 0
        self._hold(held_bytes(self._sock, self._option))
        if self._account.is_short and self.is_lent and used < self.size and self.held == 0:
            self._resize(FLOOR_BYTES)
            self.grow_at = moved + 2 * FLOOR_BYTES

    @property
    def is_lent(self) -> bool:
        """Whether it is larger than its floor."""
        return self.size > FLOOR_BYTES

    @property
    def is_too_much(self) -> bool:
        """Whether the account is full and this connection stalls, holding at least the average."""
        account = self._account
        return account.is_full and self._is_still and self.held * account.buffers >= account.held

    def leave(self) -> None:
        """The socket is closed, or belongs to somebody else now; called once."""
        self._account.left += _TIMES * (self.size - FLOOR_BYTES)
        self._account.buffers -= 1
        self._hold(0)

    def _hold(self, held: int) -> None:
        self._account.held += held - self.held
        self.held = held

    def _resize(self, size: int) -> None:
        self._account.left -= _TIMES * (size - self.size)
        self.size = size
        self._sock.setsockopt(socket.SOL_SOCKET, self._option, size)


def set_size(sock: socket.socket, size: int) -> None:
    """Set the size of a socket's buffers in each direction; bytes that they hold stay."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


def limit_segments(sock: socket.socket) -> None:
    """Let a TCP socket work with the smallest buffer, too; before it connects or listens. Raises OSError."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)


def held_bytes(sock: socket.socket, option: int) -> int:
    """How many bytes the kernel holds for a buffer of a socket, including its overhead."""
    held = _MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size))
    return int(held[_MEMINFO_PLACE[option]])
