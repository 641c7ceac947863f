# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the programs of one user listen for TCP, in the words of the kernel: NETLINK_SOCK_DIAG, sock_diag(7).

By this `nft` knows that a port is the listener's own and not another program's. The listener, which talks to
strangers, is not asked. It can make itself known by nothing but a socket that listens.

The listener is known by its user, which is the owner of its runtime directory: only root makes directories
in /run, and no two units with DynamicUser= have a user in common. Root is never taken for it unasked, so a
directory that is not as it should be admits nobody. The control group of its sockets, which the kernel tells
too, would say the same, but only where it is of version 2, Linux has at least 5.9, and the unit is in the
slice where we look for it.

Only listening sockets are asked for, and those the kernel has in a list of their own: 10,000 connections
cost nothing. Any user may ask. There is no way round this in /proc, which lists all connections; where the
kernel does not answer, nothing is known, and who asked closes.
"""

import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.values import Binding, IPAddress

# RuntimeDirectory= of the listener's unit.
DIRECTORY = Path("/run/qubes-forward-listener")

# The kernel answers while it is asked; this only keeps us from hanging for ever.
_TIMEOUT_S = 5.0
# netlink(7): an answer to a dump comes in parts of at most 32 KiB (net/netlink/af_netlink.c, netlink_dump).
_READ_MAX = 1 << 16
# linux/netlink.h: NETLINK_SOCK_DIAG; nlmsghdr, its types and flags. Messages begin at multiples of 4 bytes.
_NETLINK_SOCK_DIAG = 4
_HEADER = struct.Struct("=IHHII")
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_DUMP = 0x1, 0x100 | 0x200
# linux/sock_diag.h.
_SOCK_DIAG_BY_FAMILY = 20
# include/net/tcp_states.h: TCPF_LISTEN, the bit of TCP_LISTEN.
_TCP_LISTEN = 10
_TCPF_LISTEN = 1 << _TCP_LISTEN
# linux/inet_diag.h, inet_diag_req_v2: family, protocol, extensions, a gap, states; any inet_diag_sockid.
_REQUEST = struct.Struct("=BBBxI48x")
# inet_diag_msg: family, state, timer, retrans; in inet_diag_sockid the ports, the addresses (16 bytes each),
# the interface and the cookie; then expires, rqueue, wqueue, uid and inode. What follows is attributes.
_SOCKET = struct.Struct("!BBxxHxx16s16x4s8x12x4s4x")
_NO_INTERFACE = bytes(4)


class SocketsError(ForwardError):
    """The kernel does not say where the listener listens; the text says why."""


def owner(directory: Path = DIRECTORY) -> int:
    """The listener's user, by its runtime directory. Raises `SocketsError` where that does not say."""
    try:
        found = directory.lstat()
    except OSError as error:
        raise SocketsError(f"no listener is running: {directory}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid == 0:
        raise SocketsError(f"{directory} is no directory of a user other than root, as the listener's is")
    return found.st_uid


def listening(uid: int) -> frozenset[Binding]:
    """Every address and port that sockets of this user listen on, in this process's network namespace.

    A socket for one interface alone does not count: others may then listen on the same port. Nor is ``::``
    taken for IPv4. Raises `SocketsError`.
    """
    return frozenset(
        binding for family in (socket.AF_INET, socket.AF_INET6) for binding in _listening(family, uid)
    )


def _listening(family: int, uid: int) -> Iterator[Binding]:
    addresses: dict[bytes, IPAddress] = {}
    wanted_uid = struct.pack("=I", uid)
    for message in _dump(family):
        try:
            of_family, state, port, packed, interface, of_uid = _SOCKET.unpack_from(message)
        except struct.error:
            raise SocketsError("the kernel's list of sockets is not what it should be") from None
        if (of_family, state, of_uid, interface) == (family, _TCP_LISTEN, wanted_uid, _NO_INTERFACE):
            if packed not in addresses:
                is_ipv4 = family == socket.AF_INET
                addresses[packed] = IPv4Address(packed[:4]) if is_ipv4 else IPv6Address(packed)
            yield addresses[packed], port


def _dump(family: int) -> Iterator[bytes]:
    """The sockets that listen, of all users; asked for on a new socket, which has no earlier answer in it."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as sock:
            sock.settimeout(_TIMEOUT_S)
            wanted = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, _TCPF_LISTEN)
            flags = _NLM_F_REQUEST | _NLM_F_DUMP
            header = _HEADER.pack(_HEADER.size + len(wanted), _SOCK_DIAG_BY_FAMILY, flags, 1, 0)
            sock.sendto(header + wanted, (0, 0))
            while True:
                received, (sender, _) = sock.recvfrom(_READ_MAX)
                if sender != 0:
                    continue  # not of the kernel
                for kind, message in _messages(received):
                    if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                        _check(message)
                        return
                    yield message
    except OSError as error:
        raise SocketsError(f"the kernel does not list its sockets: {error.strerror or error}") from error


def _messages(received: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(received):
        try:
            length, kind, *_ = _HEADER.unpack_from(received, at)
        except struct.error:
            length, kind = 0, 0
        if not _HEADER.size <= length <= len(received) - at:
            raise SocketsError("the kernel's list of sockets is cut short")
        yield kind, received[at + _HEADER.size : at + length]
        at += (length + 3) & ~3


def _check(message: bytes) -> None:
    """Of the last message: 0, or less than that for an error. Raises OSError."""
    status = int.from_bytes(message[:4], sys.byteorder, signed=True)
    if status != 0:
        raise OSError(-status, os.strerror(-status))
