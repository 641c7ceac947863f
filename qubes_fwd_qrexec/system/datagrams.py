# SPDX-License-Identifier: GPL-2.0-or-later
"""Sockets of UDP, with what the kernel tells of each datagram, and several datagrams at once.

Where the kernel has them together, one call receives a batch: datagrams of one sender and equal size, of
which only the last may be shorter (UDP_GRO). One call sends such a batch (UDP_SEGMENT); where the kernel
refuses that, as it does for a route with IPsec or a smaller MTU, its datagrams are sent one by one.

A batch is its bytes and its ``segment``: the bytes of each datagram, or 0 for bytes that are one datagram.

Nothing here waits: the sockets are non-blocking, and what the kernel has no room for is not sent.
"""

import errno
import socket
import struct
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

Buffer = bytes | bytearray | memoryview
Address = tuple[str, int] | tuple[str, int, int, int]
"""As the socket module has it: for IPv6 with flow label and scope."""
Control = tuple[int, int, bytes]
"""Level, type and contents of a control message."""

# The most that UDP over IPv4 carries: 65535 without the headers of IP and UDP.
MAX_DATAGRAM_BYTES = 65_507
# What is read in one turn of a loop: so often from all sockets that have something, but from each once; and
# from one socket until so many bytes have come.
READS_MAX = 64
READ_MAX_BYTES = 128 << 10
# linux/udp.h, before Linux 6.9 (then 128).
MAX_SEGMENTS = 64

# linux/udp.h.
_UDP_SEGMENT, _UDP_GRO = 103, 104
# linux/in.h and linux/in6.h; the socket module lacks the first.
_IP_PKTINFO, _IPV6_RECVPKTINFO, _IPV6_PKTINFO = 8, socket.IPV6_RECVPKTINFO, socket.IPV6_PKTINFO
# asm-generic/socket.h, linux/sock_diag.h: nine numbers, of which the last is what was lost (Linux 4.12).
_SO_MEMINFO, _MEMINFO = 55, struct.Struct("=9I")
# in_pktinfo: interface, the local address to answer from, destination; in6_pktinfo: destination, interface.
_INFO4 = struct.Struct("=i4s4s")
_INFO6 = struct.Struct("=16si")
_SEGMENT = struct.Struct("=H")
_NUMBER = struct.Struct("=I")
_MAPPED = b"\0" * 10 + b"\xff\xff"
# More than any datagram or batch has, so that nothing is cut off.
_RECEIVE_BYTES = 1 << 16
# Room for one number, and for all that `tell_arrivals` asks for.
_ONE_NUMBER = socket.CMSG_SPACE(4)
_ALL = _ONE_NUMBER + socket.CMSG_SPACE(_INFO4.size) + socket.CMSG_SPACE(_INFO6.size)
# The kernel has no room now. (ENOBUFS also stands for a full queue of the interface.)
_NO_ROOM = frozenset((errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.EINTR))
# The kernel does not send this batch as one, whatever it says of its datagrams: the size of a segment and its
# headers are above the MTU (EINVAL, EMSGSIZE), or the route cannot have it (EIO).
_NOT_AS_ONE = frozenset((errno.EINVAL, errno.EIO, errno.EMSGSIZE, errno.EOPNOTSUPP))


class Arrived(NamedTuple):
    """What `receive` found: a batch, and what the kernel tells of it.

    ``local`` is the address to answer from, packed: 4 bytes, or 16 for a sender of IPv6. ``interface`` is the
    index of the one that it came in by. ``is_for_one``: it was sent to that address, and not to many by
    broadcast or multicast.
    """

    data: bytes
    segment: int
    sender: Address
    local: bytes
    interface: int
    is_for_one: bool


class Sent(NamedTuple):
    """How many datagrams of a batch went out, and why the next one did not.

    ``problem`` is None if all did, and also if the kernel had no room for more.
    """

    datagrams: int
    problem: OSError | None = None


_SENT_ONE, _NO_ROOM_LEFT = Sent(1), Sent(0)


def count(length: int, segment: int) -> int:
    """How many datagrams a batch of ``length`` bytes has."""
    return -(-length // segment) if segment else 1


def reads(sockets: int) -> int:
    """How often each of so many sockets may be read in one turn of a loop."""
    return max(1, READS_MAX // max(1, sockets))


def receive_batches(sock: socket.socket) -> None:
    """Have the kernel leave datagrams together that came together, where it can (Linux 5.0)."""
    with suppress(OSError):
        sock.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)


class Lost:
    """How many datagrams the kernel had no room for in a socket."""

    __slots__ = ("_before",)

    def __init__(self) -> None:
        self._before = 0

    def more(self, sock: socket.socket) -> int:
        """How many there are since the last look. Raises OSError."""
        before = self._before
        self._before = _MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size))[-1]
        return (self._before - before) % (1 << 32)


def tell_arrivals(sock: socket.socket) -> None:
    """Have the kernel tell what `receive` returns, of each datagram; a socket of IPv6 may take IPv4 as well.

    Raises OSError.
    """
    receive_batches(sock)
    sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)


def receive(sock: socket.socket) -> Arrived:
    """The next batch of a socket that is not connected, after `tell_arrivals`.

    Raises BlockingIOError if there is none, and another OSError that the kernel has for this socket.
    """
    data, told, _, sender = sock.recvmsg(_RECEIVE_BYTES, _ALL)
    segment = interface = 0
    local, is_for_one = b"", False
    for level, kind, value in told:
        if level == socket.IPPROTO_UDP and kind == _UDP_GRO:
            segment = _NUMBER.unpack(value)[0]
        elif level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
            interface, local, destination = _INFO4.unpack(value)
            is_for_one = local == destination
        elif level == socket.IPPROTO_IPV6 and kind == _IPV6_PKTINFO and not value.startswith(_MAPPED):
            local, interface = _INFO6.unpack(value)  # of IPv4 IP_PKTINFO tells more
            is_for_one = local[0] != 0xFF
    if segment >= len(data):
        segment = 0
    return Arrived(data, segment, sender, local, interface, is_for_one)


def receive_connected(sock: socket.socket) -> tuple[bytes, int]:
    """The next batch of a connected socket, after `receive_batches`, and its segment.

    Raises BlockingIOError if there is none, and another OSError that the kernel has for this socket:
    ConnectionRefusedError if the port at the other end is closed.
    """
    data, told, _, _ = sock.recvmsg(_RECEIVE_BYTES, _ONE_NUMBER)
    segment = 0
    for level, kind, value in told:
        if level == socket.IPPROTO_UDP and kind == _UDP_GRO:
            segment = _NUMBER.unpack(value)[0]
    return data, segment if segment < len(data) else 0


def from_address(sock: socket.socket, local: bytes, interface: int = 0) -> Control:
    """What makes ``send`` send from an address of this host, packed as `Arrived` has it.

    ``interface`` is the index of the one to send by, which a link-local address needs; 0 leaves it to the
    routes.
    """
    if len(local) == 4 and sock.family == socket.AF_INET:
        return socket.IPPROTO_IP, _IP_PKTINFO, _INFO4.pack(interface, local, bytes(4))
    return socket.IPPROTO_IPV6, _IPV6_PKTINFO, _INFO6.pack(_MAPPED[: 16 - len(local)] + local, interface)


def send(
    sock: socket.socket,
    data: Buffer,
    segment: int,
    to: Address | None = None,
    control: Iterable[Control] = (),
) -> Sent:
    """Send a batch of at most `MAX_SEGMENTS`, without waiting; ``to`` is None for a connected socket.

    Datagrams go out in their order, and those after one that did not are not sent.
    """
    try:
        if not segment:
            _send_one(sock, data, to, control)
            return _SENT_ONE
        together = socket.IPPROTO_UDP, _UDP_SEGMENT, _SEGMENT.pack(segment)
        sock.sendmsg((data,), (*control, together), 0, *(() if to is None else (to,)))
        return Sent(count(len(data), segment))
    except OSError as error:
        if error.errno in _NO_ROOM:
            return _NO_ROOM_LEFT
        if not segment or error.errno not in _NOT_AS_ONE:
            return Sent(0, error)
    return _send_each(sock, data, segment, to, control)


def _send_each(
    sock: socket.socket, data: Buffer, segment: int, to: Address | None, control: Iterable[Control]
) -> Sent:
    whole = memoryview(data)
    sent = 0
    for start in range(0, len(whole), segment):
        try:
            _send_one(sock, whole[start : start + segment], to, control)
        except OSError as error:
            return Sent(sent, None if error.errno in _NO_ROOM else error)
        sent += 1
    return Sent(sent)


def _send_one(sock: socket.socket, data: Buffer, to: Address | None, control: Iterable[Control]) -> None:
    if to is None:
        sock.send(data)
    elif control:
        sock.sendmsg((data,), control, 0, to)
    else:
        sock.sendto(data, to)
