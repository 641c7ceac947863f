# SPDX-License-Identifier: GPL-2.0-or-later
"""Requests to the kernel over netlink(7): messages, their attributes, and what answers them.

What the messages mean is their users' business: `sockdiag` and `conntrack`. The kernel is trusted, and still
no length is believed that leads out of a message: a list that is not whole is an error, never a shorter list.
"""

import os
import socket
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, Self

from qubes_fwd_qrexec.common.errors import ForwardError

# The kernel answers at once; this only keeps us from hanging for ever.
TIMEOUT_S = 5.0
# An answer to a dump comes in parts of at most 32 KiB (net/netlink/af_netlink.c, netlink_dump).
READ_MAX = 1 << 16
# How many requests are sent before their answers are read. The kernel holds the answers within the socket's
# receive buffer, which has room for some hundreds.
BATCH = 64
# linux/netlink.h: nlmsghdr, its types and flags. Messages and attributes begin at multiples of 4 bytes.
_HEADER = struct.Struct("=IHHII")
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_DUMP = 0x1, 0x4, 0x100 | 0x200
_NLM_F_DUMP_INTR = 0x10
# nlattr, and the bits of its type that only tell how the value is written.
_ATTRIBUTE = struct.Struct("=HH")
_NLA_F_NESTED, _NLA_TYPE_MASK = 0x8000, 0x3FFF


class NetlinkError(ForwardError):
    """The kernel has refused a request, or its answer is not whole; the text says which."""


class InterruptedDumpError(NetlinkError):
    """What was listed has changed meanwhile, so that something may be missing; to be asked again."""


class KernelSocket(Protocol):
    """What a request needs of a socket of the family AF_NETLINK."""

    def sendto(self, data: bytes, address: tuple[int, int], /) -> int: ...

    def recvfrom(self, size: int, /) -> tuple[bytes, tuple[int, int]]: ...

    def close(self) -> None: ...


def connect(protocol: int) -> "Netlink":
    """A way to one of netlink's protocols, as in linux/netlink.h, in this thread's network namespace.

    Raises `NetlinkError`.
    """
    try:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
    except OSError as error:
        raise _refusal(error) from error
    sock.settimeout(TIMEOUT_S)
    return Netlink(sock)


class Netlink:
    """One request after another over a socket, which it closes in the end."""

    def __init__(self, sock: KernelSocket) -> None:
        self._sequence = 0
        self._socket = sock

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def dump(self, kind: int, request: bytes) -> Iterator[bytes]:
        """The messages of a list, without their headers; to be read to the end before anything else is asked.

        Raises `NetlinkError`, perhaps after some of the messages; `InterruptedDumpError` after all.
        """
        self._send([(kind, request)], _NLM_F_DUMP)
        is_whole = True
        for sequence, answer, flags, message in self._received():
            if sequence != self._sequence:
                continue
            is_whole = is_whole and not flags & _NLM_F_DUMP_INTR
            if answer in (_NLMSG_DONE, _NLMSG_ERROR):
                if status := _status(message):
                    raise NetlinkError(os.strerror(status))
                break
            yield message
        if not is_whole:
            raise InterruptedDumpError("the list has changed while it was read")

    def ask(self, kind: int, requests: Sequence[bytes]) -> list[int]:
        """Make requests that are answered by their success alone.

        Returns for each the number of its error in `errno`, 0 for none. Raises `NetlinkError`.
        """
        found: list[int] = []
        for at in range(0, len(requests), BATCH):
            found += self._ask([(kind, request) for request in requests[at : at + BATCH]])
        return found

    def _ask(self, requests: list[tuple[int, bytes]]) -> list[int]:
        first = self._send(requests, _NLM_F_ACK)
        waiting = set(range(first, first + len(requests)))
        found = [0] * len(requests)
        for sequence, answer, _, message in self._received():
            if answer == _NLMSG_ERROR and sequence in waiting:
                waiting.remove(sequence)
                found[sequence - first] = _status(message)
                if not waiting:
                    break
        return found

    def _send(self, requests: Iterable[tuple[int, bytes]], flags: int) -> int:
        """Send requests in one piece. Returns the sequence number of the first."""
        first = self._sequence + 1
        parts = []
        for kind, request in requests:
            self._sequence += 1
            header = (_HEADER.size + len(request), kind, _NLM_F_REQUEST | flags, self._sequence, 0)
            parts.append(_padded(_HEADER.pack(*header) + request))
        try:
            self._socket.sendto(b"".join(parts), (0, 0))
        except OSError as error:
            raise _refusal(error) from error
        return first

    def _received(self) -> Iterator[tuple[int, int, int, bytes]]:
        """What the kernel sends, without end: sequence number, type, flags and content of each message."""
        while True:
            try:
                received, (sender, _) = self._socket.recvfrom(READ_MAX)
            except OSError as error:
                raise _refusal(error) from error
            if sender == 0:  # or else it is not of the kernel
                yield from _messages(received)


def attributes(message: bytes, at: int = 0) -> dict[int, bytes]:
    """The attributes in a message from ``at`` on, by type. Raises `NetlinkError`."""
    found = {}
    while at < len(message):
        try:
            length, kind = _ATTRIBUTE.unpack_from(message, at)
        except struct.error:
            length, kind = 0, 0
        if not _ATTRIBUTE.size <= length <= len(message) - at:
            raise NetlinkError("an attribute is cut short")
        found[kind & _NLA_TYPE_MASK] = message[at + _ATTRIBUTE.size : at + length]
        at += _aligned(length)
    return found


def attribute(kind: int, value: bytes, *, is_nested: bool = False) -> bytes:
    """An attribute as it is sent."""
    bits = _NLA_F_NESTED if is_nested else 0
    return _padded(_ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind | bits) + value)


def _messages(received: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    at = 0
    while at < len(received):
        try:
            length, kind, flags, sequence, _ = _HEADER.unpack_from(received, at)
        except struct.error:
            length, kind, flags, sequence = 0, 0, 0, 0
        if not _HEADER.size <= length <= len(received) - at:
            raise NetlinkError("an answer is cut short")
        yield sequence, kind, flags, received[at + _HEADER.size : at + length]
        at += _aligned(length)


def _status(message: bytes) -> int:
    """What the last message of an answer says: 0, or the number of an error, which is sent as negative."""
    if len(message) < 4:
        raise NetlinkError("an answer is cut short")
    return -int.from_bytes(message[:4], sys.byteorder, signed=True)


def _refusal(error: OSError) -> NetlinkError:
    return NetlinkError(error.strerror or str(error))


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _padded(data: bytes) -> bytes:
    return data.ljust(_aligned(len(data)), b"\0")
