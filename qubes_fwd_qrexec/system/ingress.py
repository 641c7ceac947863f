# SPDX-License-Identifier: GPL-2.0-or-later
"""The interface that an accepted connection came in through, and the group of that interface.

The firewall enforces the side of a forward. The listener checks again, as that costs little and a firewall
can be flushed. Both go by the interface's group, which Qubes sets: 1 for the uplink to the netvm, 2 for vifs
to other qubes, and 0 for everything else (NICs, VPN interfaces).

The kernel remembers the interface that completed the handshake, and any user can ask for it:
tcp_v4_syn_recv_sock and tcp_v6_syn_recv_sock store it, IP_PKTOPTIONS and IPV6_2292PKTOPTIONS return it. The
route back to the client could differ, and SO_BINDTODEVICE would need a socket for each interface.

Loopback is admitted everywhere: only the qube's own programs use it, and those could make the calls
themselves.
"""

import socket
import struct
import time
from collections.abc import Callable

# For how long an answer of the kernel about an interface is good for other connections and datagrams.
KNOWN_S = 0.1
# The same in every network namespace (include/net/net_namespace.h, LOOPBACK_IFINDEX).
_LOOPBACK = 1
# linux/in.h and linux/in6.h; the socket module lacks some of them.
_IP_PKTINFO, _IP_PKTOPTIONS = 8, 9
_IPV6_2292PKTOPTIONS, _IPV6_RECVPKTINFO, _IPV6_PKTINFO = 6, 49, 50
# struct cmsghdr: length, level, type; what follows begins at a multiple of a long.
_CMSG = struct.Struct("@Nii")
_ALIGN = struct.calcsize("@N")
_OPTIONS_MAX = 256
# in_pktinfo begins with the interface; in6_pktinfo has the address before it.
_INDEX_AT = {(socket.IPPROTO_IP, _IP_PKTINFO): 0, (socket.IPPROTO_IPV6, _IPV6_PKTINFO): 16}
_INDEX = struct.Struct("=i")

# linux/rtnetlink.h and linux/if_link.h: nlmsghdr, ifinfomsg, rtattr.
_HEADER = struct.Struct("=IHHII")
_LINK = struct.Struct("=BxHiII")
_ATTRIBUTE = struct.Struct("=HH")
_RTM_NEWLINK, _RTM_GETLINK, _NLM_F_REQUEST = 16, 18, 1
_IFLA_GROUP = 27
_GROUP = struct.Struct("=I")
# One link with all its attributes is about 1.5 KiB, and more with many addresses of a VF.
_READ_MAX = 1 << 16


def note_ingress(listening: socket.socket) -> None:
    """Have the kernel remember the interface of each connection that is accepted here."""
    if listening.family == socket.AF_INET6:
        listening.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
    else:
        listening.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)


def ingress(connection: socket.socket) -> int | None:
    """The index of the interface; None if the kernel does not say."""
    try:
        if connection.family == socket.AF_INET6:
            options = connection.getsockopt(socket.IPPROTO_IPV6, _IPV6_2292PKTOPTIONS, _OPTIONS_MAX)
        else:
            options = connection.getsockopt(socket.IPPROTO_IP, _IP_PKTOPTIONS, _OPTIONS_MAX)
    except OSError:
        return None
    start = 0
    while start + _CMSG.size <= len(options):
        length, level, kind = _CMSG.unpack_from(options, start)
        at = _INDEX_AT.get((level, kind))
        if at is not None and _CMSG.size + at + _INDEX.size <= length <= len(options) - start:
            index: int = _INDEX.unpack_from(options, start + _CMSG.size + at)[0]
            return index or None
        if length < _CMSG.size:
            return None
        start += length + -length % _ALIGN
    return None


def interface_group(index: int) -> int | None:
    """The group of an interface; None if it is gone, or the kernel does not say."""
    request = _HEADER.pack(_HEADER.size + _LINK.size, _RTM_GETLINK, _NLM_F_REQUEST, 1, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
            # The kernel answers within `send`, so nothing ever blocks here.
            sock.setblocking(False)
            sock.send(request + _LINK.pack(0, 0, index, 0, 0))
            answer = sock.recv(_READ_MAX)
    except OSError:
        return None
    length, kind, *_ = _HEADER.unpack_from(answer)
    if kind != _RTM_NEWLINK or length > len(answer):
        return None
    start = _HEADER.size + _LINK.size
    while start + _ATTRIBUTE.size <= length:
        size, attribute = _ATTRIBUTE.unpack_from(answer, start)
        if attribute == _IFLA_GROUP:
            group: int = _GROUP.unpack_from(answer, start + _ATTRIBUTE.size)[0]
            return group
        if size < _ATTRIBUTE.size:
            return None
        start += size + -size % 4
    return None


def is_by(index: int | None, group: int) -> bool:
    """Whether an interface is one of this group, or loopback; in doubt, no."""
    return index is not None and (index == _LOOPBACK or interface_group(index) == group)


class Sides:
    """Answers for many connections and datagrams what `is_by` says, and asks the kernel rarely."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[tuple[int, int], bool] = {}
        self._known_until = 0.0

    def is_by(self, index: int, group: int) -> bool:
        """What `is_by` says, or said at most `KNOWN_S` ago."""
        if self._clock() >= self._known_until:
            self._known.clear()
            self._known_until = self._clock() + KNOWN_S
        found = self._known.get((index, group))
        if found is None:
            found = self._known[index, group] = is_by(index, group)
        return found

    def came_by(self, connection: socket.socket, group: int) -> bool:
        """Whether a connection came through an interface of this group, or from this qube; in doubt, no."""
        index = ingress(connection)
        return index is not None and self.is_by(index, group)
