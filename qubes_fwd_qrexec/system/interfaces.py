# SPDX-License-Identifier: GPL-2.0-or-later
"""The addresses of one interface, by means that a unit without netlink sockets has, too."""

import fcntl
import socket
import struct
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from qubes_fwd_qrexec.common.values import IPAddress

# linux/sockios.h, netdevice(7): the first IPv4 address of an interface. A qube's eth0 has one.
_SIOCGIFADDR = 0x8915
# struct ifreq: a name, then a sockaddr_in: family, port, address.
_IFREQ = struct.Struct("=16sHH4s16x")
# proc(5): address, index, length of the prefix, scope, flags, name.
_IPV6 = Path("/proc/self/net/if_inet6")


def interface_addresses(name: str) -> tuple[IPAddress, ...]:
    """The IPv4 address of an interface of this network namespace, then its IPv6 addresses.

    Without those of the link alone. Nothing if there is no such interface.
    """
    return (*_ipv4(name), *_ipv6(name))


def _ipv4(name: str) -> list[IPAddress]:
    request = _IFREQ.pack(name.encode("ascii"), 0, 0, bytes(4))
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            answer = fcntl.ioctl(sock, _SIOCGIFADDR, request)
    except OSError:
        return []
    return [IPv4Address(_IFREQ.unpack(answer)[3])]


def _ipv6(name: str) -> list[IPAddress]:
    try:
        lines = _IPV6.read_text("ascii").splitlines()
    except OSError:  # a kernel without IPv6
        return []
    found = [words for words in map(str.split, lines) if words[5:] == [name]]
    addresses = [IPv6Address(bytes.fromhex(words[0])) for words in found]
    return [address for address in addresses if not address.is_link_local]
