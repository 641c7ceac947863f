# SPDX-License-Identifier: GPL-2.0-or-later
"""When a network namespace is as it was told to be: workers of the kernel see to some of it a little later.

A link is up only once one of them has noted that its other end is, and another adds the local route of an
address of IPv6. Packets are dropped before.
"""

import fcntl
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from bounds import BOUND_S

# linux/if.h and linux/sockios.h: name and flags of a link, in an ifreq.
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP, _IFF_RUNNING = 0x8913, 0x8914, 0x1, 0x40
_FLAGS = struct.Struct("16sH22x")
# linux/if_addr.h and linux/ipv6_route.h: flags in if_inet6 and in ipv6_route, which are in hexadecimal.
_TABLES = Path("/proc/thread-self/net")
_IFA_F_TENTATIVE, _RTF_LOCAL = 0x40, 0x80000000

Entering = Callable[[], AbstractContextManager[object]]
"""What puts this thread into a namespace, for a block."""


def settle(places: Iterable[Entering]) -> None:
    """Wait until each link that is to be up is, in each of these namespaces, and each address answers."""
    until_s = time.monotonic() + BOUND_S
    for entering in places:
        while not _is_settled(entering):
            assert time.monotonic() < until_s
            os.sched_yield()


def _is_settled(entering: Entering) -> bool:
    with entering(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        names = [name for _, name in socket.if_nameindex()]
        answers = [fcntl.ioctl(sock, _SIOCGIFFLAGS, _FLAGS.pack(name.encode(), 0)) for name in names]
        addresses, routes = (_read_fields(name) for name in ("if_inet6", "ipv6_route"))
        # This changes nothing, but it takes the lock under which the kernel's worker says that a link is up
        # and then lets packets out there.
        for answer in answers:
            fcntl.ioctl(sock, _SIOCSIFFLAGS, answer)
    flags = {name: _FLAGS.unpack_from(answer)[1] for name, answer in zip(names, answers, strict=True)}
    up = {name for name, flag in flags.items() if flag & _IFF_UP}
    usable = {(of[0], of[-1]) for of in addresses if of[-1] in up and not int(of[4], 16) & _IFA_F_TENTATIVE}
    local = {(of[0], of[-1]) for of in routes if int(of[-2], 16) & _RTF_LOCAL}
    return all(flags[name] & _IFF_RUNNING for name in up) and usable <= local


def _read_fields(name: str) -> list[list[str]]:
    """A table of the namespace that this thread is in; empty without IPv6."""
    table = _TABLES / name
    return [line.split() for line in table.read_text().splitlines()] if table.exists() else []
