# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the programs of one user listen for TCP, according to the kernel (NETLINK_SOCK_DIAG, sock_diag(7)).

This shows the firewall's program that a port is the listener's and not another program's. It does not ask the
listener, which talks to strangers and can only show itself by a listening socket.

The listener is identified by its user, the owner of its runtime directory: only root can make directories in
/run, and no two units with DynamicUser= share a user. Root is never taken for the listener by default, so a
directory with a wrong owner admits nobody. The control group of the sockets would show the same, but only
with cgroup version 2, Linux 5.9 or later, and the unit in the expected slice.

It asks only for listening sockets, which the kernel keeps in a list of their own, so that 10,000 connections
cost nothing. Any user may ask. There is no fallback to /proc, which lists all connections: if the kernel does
not answer, nothing is known, and the caller must let nobody in.
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

# The kernel answers at once; this only keeps us from hanging for ever.
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
    """It is unknown where the listener listens; the text says why."""


def owner(directory: Path = DIRECTORY) -> int:
    """The UID of the listener, by its runtime directory. Raises `SocketsError` if that does not show it."""
    try:
        found = directory.lstat()
    except OSError as error:
        raise SocketsError(f"no listener is running: {directory}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid == 0:
        raise SocketsError(f"{directory} is not a directory owned by a user other than root")
    return found.st_uid


def listening(uid: int) -> frozenset[Binding]:
    """Every address and port that sockets of this user listen on, in this process's network namespace.

    A socket bound to one interface does not count, as others may listen on the same port; and ``::`` does not
    include IPv4. Raises `SocketsError`.
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
    """The listening sockets of all users. It uses a new netlink socket, so that no earlier answer is left."""
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
    """Check the last message, which has 0 or a negative error number. Raises OSError."""
    status = int.from_bytes(message[:4], sys.byteorder, signed=True)
    if status != 0:
        raise OSError(-status, os.strerror(-status))
