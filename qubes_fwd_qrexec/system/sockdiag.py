# SPDX-License-Identifier: GPL-2.0-or-later
"""The sockets of this qube, according to the kernel (NETLINK_SOCK_DIAG, sock_diag(7)).

Where the programs of one user listen shows the firewall's program that a port is the listener's and not
another program's. It does not ask the listener, which talks to strangers and can only show itself by a
socket: for TCP one that listens, for UDP one without a peer, which takes datagrams of anybody.

The listener is identified by its user, the owner of its runtime directory: only root can make directories in
/run, and no two units with DynamicUser= share a user. Root is never taken for the listener by default, so a
directory with a wrong owner admits nobody. The control group of the sockets would show the same, but only
with cgroup version 2, Linux 5.9 or later, and the unit in the expected slice.

It asks only for sockets in that state. Those that listen for TCP the kernel keeps in a list of their own, so
that 10,000 connections cost nothing. Any user may ask. There is no fallback to /proc, which lists all
connections: if the kernel does not answer, nothing is known, and the caller must let nobody in.

Connections can be ended too, with CAP_NET_ADMIN and the kernel's INET_DIAG_DESTROY. Sockets of UDP are left
alone: one that loses its peer stays bound, and would hand its server datagrams of anybody.
"""

import errno
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.values import Binding, IPAddress, unmapped

from .netlink import Netlink, NetlinkError, connect

# RuntimeDirectory= of the listener's unit.
DIRECTORY = Path("/run/qubes-forward-listener")

# linux/netlink.h: NETLINK_SOCK_DIAG.
_NETLINK_SOCK_DIAG = 4
# linux/sock_diag.h.
_SOCK_DIAG_BY_FAMILY = 20
_SOCK_DESTROY = 21
# include/net/tcp_states.h; a state's bit is 1 << its number. A socket in TIME_WAIT or CLOSE has no peer.
_TCP_LISTEN = 10
_CONNECTED = (1, 2, 3, 4, 5, 8, 9, 11, 12)
# The state of a socket of UDP that takes datagrams of anybody; one with a peer is ESTABLISHED.
_UDP_UNCONNECTED = 7
# linux/inet_diag.h, inet_diag_req_v2: family, protocol, extensions, a gap, states; an inet_diag_sockid: the
# ports, the addresses (16 bytes each), the interface and the cookie, which are all 0 for any.
_REQUEST = struct.Struct("=BBBxI")
_ANY = bytes(48)
# inet_diag_msg: family, state, timer, retrans; inet_diag_sockid; then expires, rqueue, wqueue, uid and inode.
# What follows is attributes.
_SOCKET = struct.Struct("!BBxx48s12x4s4x")
_ID = struct.Struct("!HH16s16s4s8x")
_NO_INTERFACE = bytes(4)
# How often the sockets are listed and ended, until none is left: a connection may be made meanwhile.
_PASSES = 3
# Of a socket in FIN_WAIT2 the program has let go. Kernels before 6.10 may have no more of it than of one in
# TIME_WAIT, and end neither (EOPNOTSUPP).
_FIN_WAIT2 = 5


class SocketsError(ForwardError):
    """The kernel does not list or end its sockets, or not the listener's; the text says why."""


def owner(directory: Path = DIRECTORY) -> int:
    """The UID of the listener, by its runtime directory. Raises `SocketsError` if that does not show it."""
    try:
        found = directory.lstat()
    except OSError as error:
        raise SocketsError(f"no listener is running: {directory}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid == 0:
        raise SocketsError(f"{directory} is not a directory owned by a user other than root")
    return found.st_uid


def listening(uid: int, protocol: int = socket.IPPROTO_TCP) -> frozenset[Binding]:
    """Every address and port that sockets of this user listen on, in this process's network namespace.

    ``protocol`` is IPPROTO_TCP or IPPROTO_UDP. A socket bound to one interface does not count, as others may
    listen on the same port; and ``::`` does not include IPv4. Nor does a port that another user's socket
    shares: for UDP two may, if both agree (SO_REUSEADDR), and the kernel prefers the other's if it has one
    address, and chooses if it has the same. Raises `SocketsError`.
    """
    families = (socket.AF_INET, socket.AF_INET6)
    return frozenset(binding for family in families for binding in _listening(family, uid, protocol))


def served_at(protocol: int, port: int) -> frozenset[IPAddress]:
    """The addresses at which programs of any user listen on a port, in this process's network namespace.

    ``protocol`` is IPPROTO_TCP or IPPROTO_UDP. Sockets bound to one interface count as well. Raises
    `SocketsError`.
    """
    return frozenset(
        _address(family, packed)
        for family in (socket.AF_INET, socket.AF_INET6)
        for at, packed, _, _ in _listening_sockets(family, protocol)
        if at == port
    )


def destroy(is_ended: Callable[[IPAddress, int], bool]) -> int:
    """End TCP connections of this qube, in this process's network namespace.

    ``is_ended`` decides by the peer's address and the local port; it is not asked about the qube's
    connections to itself. The peer gets a RST, and the program here ECONNABORTED. What the qube itself has
    connected from such a port looks the same, and ends as well. Returns how many were ended. Raises
    `SocketsError`.
    """
    ended = 0
    try:
        with connect(_NETLINK_SOCK_DIAG) as kernel:
            for _ in range(_PASSES):
                done = _destroy(kernel, is_ended)
                ended += done
                if not done:
                    return ended
    except NetlinkError as error:
        raise SocketsError(f"the kernel does not end connections: {error}") from error
    return ended


def _destroy(kernel: Netlink, is_ended: Callable[[IPAddress, int], bool]) -> int:
    states = sum(1 << state for state in _CONNECTED)
    done = 0
    for family in (socket.AF_INET, socket.AF_INET6):
        requests: list[tuple[int, bytes]] = []
        for message in kernel.dump(_SOCK_DIAG_BY_FAMILY, _request(family, states)):
            of_family, state, sockid, _ = _socket_of(message)
            port, _, here, peer, _ = _ID.unpack(sockid)
            if of_family != family or state not in _CONNECTED or here == peer:
                continue
            address = unmapped(_address(family, peer))
            if not address.is_loopback and is_ended(address, port):
                requests.append((state, _request(family, 0, sockid)))
        answers = kernel.ask(_SOCK_DESTROY, [request for _, request in requests])
        for (state, _), status in zip(requests, answers, strict=True):
            if status == 0:
                done += 1
            elif status != errno.ENOENT and (state, status) != (_FIN_WAIT2, errno.EOPNOTSUPP):
                raise NetlinkError(os.strerror(status))
    return done


def _listening(family: int, uid: int, protocol: int) -> Iterator[Binding]:
    addresses: dict[bytes, IPAddress] = {}
    found: set[Binding] = set()
    others: set[Binding] = set()
    wanted = struct.pack("=I", uid)
    for port, packed, of_uid, interface in _listening_sockets(family, protocol):
        if packed not in addresses:
            addresses[packed] = _address(family, packed)
        if of_uid != wanted:
            others.add((addresses[packed], port))
        elif interface == _NO_INTERFACE:
            found.add((addresses[packed], port))
    taken = {port for _, port in others}
    for address, port in found:
        if (address, port) not in others and not (address.is_unspecified and port in taken):
            yield address, port


def _listening_sockets(family: int, protocol: int) -> Iterator[tuple[int, bytes, bytes, bytes]]:
    """Port, address, UID and interface of each socket that listens. Raises `SocketsError`."""
    state = _TCP_LISTEN if protocol == socket.IPPROTO_TCP else _UDP_UNCONNECTED
    try:
        with connect(_NETLINK_SOCK_DIAG) as kernel:  # a new one, so that no earlier answer is left
            request = _request(family, 1 << state, protocol=protocol)
            for message in kernel.dump(_SOCK_DIAG_BY_FAMILY, request):
                of_family, of_state, sockid, uid = _socket_of(message)
                port, _, packed, _, interface = _ID.unpack(sockid)
                if (of_family, of_state) == (family, state):
                    yield port, packed, uid, interface
    except NetlinkError as error:
        raise SocketsError(f"the kernel does not list its sockets: {error}") from error


def _request(family: int, states: int, sockid: bytes = _ANY, protocol: int = socket.IPPROTO_TCP) -> bytes:
    return _REQUEST.pack(family, protocol, 0, states) + sockid


def _socket_of(message: bytes) -> tuple[int, int, bytes, bytes]:
    """Family, state, inet_diag_sockid and UID. Raises `SocketsError`."""
    try:
        family, state, sockid, uid = _SOCKET.unpack_from(message)
    except struct.error:
        raise SocketsError("the kernel's list of sockets is not what it should be") from None
    return family, state, sockid, uid


def _address(family: int, packed: bytes) -> IPAddress:
    return IPv4Address(packed[:4]) if family == socket.AF_INET else IPv6Address(packed)
