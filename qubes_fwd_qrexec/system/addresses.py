# SPDX-License-Identifier: GPL-2.0-or-later
"""The addresses of this qube, according to the kernel (NETLINK_ROUTE, rtnetlink(7))."""

import socket
import struct
from collections.abc import Callable
from functools import partial
from ipaddress import IPv4Address, IPv6Address

from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.values import IPAddress

from .netlink import InterruptedDumpError, Netlink, NetlinkError, attributes, connect

# linux/netlink.h: NETLINK_ROUTE. linux/rtnetlink.h: RTM_GETADDR.
_NETLINK_ROUTE = 0
_RTM_GETADDR = 22
# linux/if_addr.h, ifaddrmsg: family, length of the prefix, flags, scope, index of the interface.
_ADDRESS = struct.Struct("=BBBBI")
# The address of the other end, where there is one, and else this end's, which also has its own attribute.
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
# How often the list is read until it has not changed meanwhile.
_PASSES = 5


class AddressesError(ForwardError):
    """The kernel does not list its addresses; the text says why."""


def local_addresses(version: int, kernel: Callable[[], Netlink] | None = None) -> frozenset[IPAddress]:
    """The addresses of one IP version, of all interfaces in this thread's network namespace.

    Raises `AddressesError`.
    """
    kernel = kernel or partial(connect, _NETLINK_ROUTE)
    request = _ADDRESS.pack(_FAMILIES[version], 0, 0, 0, 0)
    problem: NetlinkError | None = None
    for _ in range(_PASSES):
        try:
            with kernel() as listing:
                return frozenset(_address(message) for message in listing.dump(_RTM_GETADDR, request))
        except InterruptedDumpError as error:
            problem = error
        except NetlinkError as error:
            raise AddressesError(f"the kernel does not list its addresses: {error}") from error
    raise AddressesError(f"the kernel does not list its addresses: {problem}")


def _address(message: bytes) -> IPAddress:
    found = attributes(message, _ADDRESS.size)
    packed = found.get(_IFA_LOCAL, found.get(_IFA_ADDRESS, b""))
    if len(packed) not in (4, 16):
        raise NetlinkError("an address has another size than it should have")
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)
