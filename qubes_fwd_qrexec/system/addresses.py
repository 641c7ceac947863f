# SPDX-License-Identifier: GPL-2.0-or-later
"""The addresses of this qube, and of those behind it, by the kernel (NETLINK_ROUTE, rtnetlink(7))."""

import socket
import struct
import sys
from collections.abc import Callable
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from typing import TypeVar

from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.values import IPAddress

from .ingress import interface_group
from .netlink import InterruptedDumpError, Netlink, NetlinkError, attributes, connect

# linux/netlink.h: NETLINK_ROUTE. linux/rtnetlink.h: RTM_GETADDR, RTM_GETROUTE.
_NETLINK_ROUTE = 0
_RTM_GETADDR, _RTM_GETROUTE = 22, 26
# linux/if_addr.h, ifaddrmsg: family, length of the prefix, flags, scope, index of the interface.
_ADDRESS = struct.Struct("=BBBBI")
# The address of the other end, where there is one, and else this end's, which also has its own attribute.
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
# linux/rtnetlink.h, rtmsg: family, length of the destination, that of the source, five more, flags.
_ROUTE = struct.Struct("=8BI")
_RTA_DST, _RTA_OIF = 1, 4
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
_BITS = {4: 32, 6: 128}
# How often the list is read until it has not changed meanwhile.
_PASSES = 5
_T = TypeVar("_T")


class AddressesError(ForwardError):
    """The kernel does not list its addresses or routes; the text says why."""


def local_addresses(version: int, kernel: Callable[[], Netlink] | None = None) -> frozenset[IPAddress]:
    """The addresses of one IP version, of all interfaces in this thread's network namespace.

    Raises `AddressesError`.
    """
    request = _ADDRESS.pack(_FAMILIES[version], 0, 0, 0, 0)

    def read(message: bytes) -> IPAddress:
        found = attributes(message, _ADDRESS.size)
        return _address(found.get(_IFA_LOCAL, found.get(_IFA_ADDRESS, b"")))

    return frozenset(_listed(_RTM_GETADDR, request, read, kernel))


def routed_by(version: int, group: int) -> frozenset[IPAddress]:
    """The single addresses of one IP version to which a route leads by an interface of a group: by that of
    the vifs, the qubes behind this one. Raises `AddressesError`.
    """
    request = _ROUTE.pack(_FAMILIES[version], *[0] * 8)

    def read(message: bytes) -> tuple[IPAddress, int] | None:
        found = attributes(message, _ROUTE.size)
        is_single = message[1] == _BITS[version]
        if not is_single or _RTA_DST not in found or _RTA_OIF not in found:
            return None
        return _address(found[_RTA_DST]), int.from_bytes(found[_RTA_OIF], sys.byteorder)

    routes = [route for route in _listed(_RTM_GETROUTE, request, read) if route is not None]
    of_group = {index for index in {index for _, index in routes} if interface_group(index) == group}
    return frozenset(address for address, index in routes if index in of_group)


def _listed(
    kind: int, request: bytes, read: Callable[[bytes], _T], kernel: Callable[[], Netlink] | None = None
) -> list[_T]:
    """What ``read`` makes of each message of a list."""
    kernel = kernel or partial(connect, _NETLINK_ROUTE)
    problem: NetlinkError | None = None
    for _ in range(_PASSES):
        try:
            with kernel() as listing:
                return [read(message) for message in listing.dump(kind, request)]
        except InterruptedDumpError as error:
            problem = error
        except NetlinkError as error:
            raise AddressesError(f"the kernel does not list its addresses: {error}") from error
    raise AddressesError(f"the kernel does not list its addresses: {problem}")


def _address(packed: bytes) -> IPAddress:
    if len(packed) not in (4, 16):
        raise NetlinkError("an address has another size than it should have")
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)
