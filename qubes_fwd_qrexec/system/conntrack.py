# SPDX-License-Identifier: GPL-2.0-or-later
"""The connections that this qube passes on, according to the kernel (NETLINK_NETFILTER, nfnetlink_conntrack).

nftables cannot end a connection: as long as the kernel has an entry for one, its packets are translated and
taken for established, whatever the rules say now. So the entry has to go.

It finds entries by their original direction and by who answers, and deletes exactly these, by tuple and id.
It needs CAP_NET_ADMIN and no program. Sources: linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h and
nf_conntrack_common.h; net/netfilter/nf_conntrack_netlink.c.
"""

import errno
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from itertools import islice

from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.values import IPAddress

from .netlink import (
    BATCH,
    InterruptedDumpError,
    Netlink,
    NetlinkError,
    attribute,
    attributes,
    connect,
)

# linux/netlink.h: NETLINK_NETFILTER.
_NETLINK_NETFILTER = 12
# The subsystem in the upper byte, the message in the lower one.
_NFNL_SUBSYS_CTNETLINK = 1
_IPCTNL_MSG_CT_GET, _IPCTNL_MSG_CT_DELETE = (_NFNL_SUBSYS_CTNETLINK << 8 | n for n in (1, 2))
# nfgenmsg: family, version 0, resource 0.
_GENERAL = struct.Struct("=BBH")
# ctattr_type; within a tuple ctattr_tuple, ctattr_ip and ctattr_l4proto. Numbers in network byte order.
_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY, _CTA_STATUS, _CTA_ID, _CTA_ZONE = 1, 2, 3, 12, 18
_CTA_STATUS_MASK = 26
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO = 1, 2
_CTA_IP_SRC, _CTA_IP_DST = {4: 1, 6: 3}, {4: 2, 6: 4}
_CTA_PROTO_NUM, _CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT = 1, 2, 3
# enum ip_conntrack_status: the destination was translated.
_IPS_DST_NAT = struct.pack("!I", 1 << 5)
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
# How often the table is gone through, until nothing is left to delete: it may change while the
# kernel lists it. More often than that, somebody makes new ones faster than they are deleted.
_PASSES = 5
# To seek one port in an entry takes a hundredth of what it takes to parse it.
_SOUGHT_MAX = 16


class ConntrackError(ForwardError):
    """The kernel does not list or delete its connections; the text says why."""


@dataclass(frozen=True, slots=True)
class Connection:
    """An entry of TCP or UDP: the original direction, and who answers from where.

    ``protocol`` as in `socket`. ``is_sent_on`` if its destination was translated (DNAT).
    """

    protocol: int
    source: IPAddress
    source_port: int
    destination: IPAddress
    destination_port: int
    answerer: IPAddress
    answerer_port: int
    is_sent_on: bool
    request: bytes = field(repr=False, compare=False)
    """What the kernel is to be told to delete exactly this one."""


def delete(
    version: int,
    is_unwanted: Callable[[Connection], bool],
    *,
    sent_on: bool,
    ports: Collection[int] | None = None,
    kernel: Callable[[], Netlink] | None = None,
) -> int:
    """Delete connections of one IP version, in this thread's network namespace, until none is left.

    ``sent_on``: of those alone whose destination was translated; else of the others alone. ``ports``: of
    those alone that came to one of these, or that this qube began from one, which is quicker beside many
    others. Memory does not grow with their number. Returns how many were deleted. Raises `ConntrackError`,
    also if there are always more.
    """
    kernel = kernel or partial(connect, _NETLINK_NETFILTER)
    deleted = 0
    try:
        with kernel() as listing, kernel() as deleting:
            for _ in range(_PASSES):
                one = _Pass(deleting)
                one.go_through(_wanted(listing, version, is_unwanted, sent_on, ports))
                deleted += one.deleted
                if one.refusal:
                    raise NetlinkError(os.strerror(one.refusal))
                if one.is_last:
                    return deleted
    except NetlinkError as error:
        raise ConntrackError(f"the kernel does not delete connections: {error}") from error
    raise ConntrackError(f"connections come anew as fast as they are deleted, {deleted} by now")


def _wanted(
    kernel: Netlink,
    version: int,
    is_unwanted: Callable[[Connection], bool],
    sent_on: bool,
    ports: Collection[int] | None,
) -> Iterator[bytes]:
    """The requests to delete what is unwanted."""
    # Without padding. It may be somewhere else in an entry as well, so what has it is parsed.
    needles = [attribute(_CTA_PROTO_DST_PORT, port.to_bytes(2, "big"))[:6] for port in ports or ()]
    for message in kernel.dump(_IPCTNL_MSG_CT_GET, dump_request(version, sent_on=sent_on)):
        if 0 < len(needles) <= _SOUGHT_MAX and not any(needle in message for needle in needles):
            continue
        connection = parse(version, message)
        if connection is None or (ports is not None and not _has_any(connection, ports)):
            continue
        if connection.is_sent_on == sent_on and is_unwanted(connection):
            yield connection.request


def _has_any(connection: Connection, ports: Collection[int]) -> bool:
    """Whether it came to one of the ports, or was begun from one, to which the answers come then."""
    is_begun = not connection.is_sent_on and connection.source_port in ports
    return is_begun or connection.destination_port in ports


class _Pass:
    """Deletes what one list of connections has. It goes on after a refusal, which it keeps."""

    def __init__(self, kernel: Netlink) -> None:
        self._kernel = kernel
        self.deleted = 0
        self.refusal = 0
        self.is_last = True
        """Whether the list was whole, and empty."""

    def go_through(self, requests: Iterator[bytes]) -> None:
        while True:
            batch: list[bytes] = []
            try:
                for request in islice(requests, BATCH):
                    batch.append(request)
            except InterruptedDumpError:
                self.is_last = False
            if not batch:
                return
            self.is_last = False
            for status in self._kernel.ask(_IPCTNL_MSG_CT_DELETE, batch):
                if status == 0:
                    self.deleted += 1
                elif status != errno.ENOENT:  # or else it has ended by itself
                    self.refusal = status


def dump_request(version: int, *, sent_on: bool) -> bytes:
    """What asks the kernel for all connections of one IP version.

    It leaves those out that do not have the wanted status if it can, which is since Linux 5.17.
    """
    status = _IPS_DST_NAT if sent_on else bytes(4)
    return (
        _GENERAL.pack(_FAMILIES[version], 0, 0)
        + attribute(_CTA_STATUS, status)
        + attribute(_CTA_STATUS_MASK, _IPS_DST_NAT)
    )


def parse(version: int, message: bytes) -> Connection | None:
    """One entry of the kernel's list; None if it is not of TCP or UDP, or not of this IP version.

    Raises `NetlinkError` if it is no entry.
    """
    try:
        if message[0] != _FAMILIES[version]:
            return None
        found = attributes(message, _GENERAL.size)
        original = attributes(found[_CTA_TUPLE_ORIG])
        protocol = attributes(original[_CTA_TUPLE_PROTO])
        number = _number(protocol[_CTA_PROTO_NUM], 1)
        if number not in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
            return None
        addresses = attributes(original[_CTA_TUPLE_IP])
        reply = attributes(found[_CTA_TUPLE_REPLY])
        general = _GENERAL.pack(_FAMILIES[version], 0, 0)
        exact = (_CTA_TUPLE_ORIG, _CTA_ID, *((_CTA_ZONE,) if _CTA_ZONE in found else ()))
        return Connection(
            protocol=number,
            source=_address(version, addresses[_CTA_IP_SRC[version]]),
            source_port=_number(protocol[_CTA_PROTO_SRC_PORT], 2),
            destination=_address(version, addresses[_CTA_IP_DST[version]]),
            destination_port=_number(protocol[_CTA_PROTO_DST_PORT], 2),
            answerer=_address(version, attributes(reply[_CTA_TUPLE_IP])[_CTA_IP_SRC[version]]),
            answerer_port=_number(attributes(reply[_CTA_TUPLE_PROTO])[_CTA_PROTO_SRC_PORT], 2),
            is_sent_on=bool(_number(found[_CTA_STATUS], 4) & _number(_IPS_DST_NAT, 4)),
            request=general + b"".join(attribute(n, found[n], is_nested=n == _CTA_TUPLE_ORIG) for n in exact),
        )
    except (KeyError, IndexError):
        raise NetlinkError("an entry is not what it should be") from None


def _number(value: bytes, size: int) -> int:
    if len(value) != size:
        raise NetlinkError("a number in an entry has another size than it should have")
    return int.from_bytes(value, "big")


def _address(version: int, packed: bytes) -> IPAddress:
    if len(packed) != (4 if version == 4 else 16):
        raise NetlinkError("an address in an entry has another size than it should have")
    return IPv4Address(packed) if version == 4 else IPv6Address(packed)
