# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of a packet on its way, as the taps of all qubes see it."""

import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

_PACKET_OUTGOING = 4
_IP_PROTOCOLS = (0x0800, 0x86DD)
_ICMP = (socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6)
_IPV6_HEADER_BYTES = 40
READ_MAX = 1 << 16


class Sight(NamedTuple):
    """A packet as a tap saw it."""

    is_leaving: bool
    packet: bytes


class Probe(NamedTuple):
    """What a packet and its answers are known by, whatever becomes of addresses and ports."""

    packet: Callable[[bytes], bool]
    answer: Callable[[bytes], bool]


class Trace:
    """What all taps have seen since they were read last."""

    def __init__(self, taps: dict[str, socket.socket]) -> None:
        self._taps = taps
        self.sights: dict[str, list[Sight]] = {name: [] for name in taps}

    def read(self) -> bool:
        """Whether there was anything."""
        before = sum(map(len, self.sights.values()))
        for name, tap in self._taps.items():
            self.sights[name] += read(tap)
        return sum(map(len, self.sights.values())) > before

    def end(self, is_it: Callable[[bytes], bool]) -> str | None:
        """The qube that such a packet came to and did not leave; none as "", on its way as None."""
        found = {name: [one for one in seen if is_it(one.packet)] for name, seen in self.sights.items()}
        leaving = sum(sight.is_leaving for seen in found.values() for sight in seen)
        if 2 * leaving != sum(map(len, found.values())):
            return None
        return next((name for name, seen in found.items() if seen and not seen[-1].is_leaving), "")


def read(tap: socket.socket) -> list[Sight]:
    found = []
    with suppress(BlockingIOError):
        while True:
            packet, (_, protocol, kind, *_) = tap.recvfrom(READ_MAX)
            if protocol in _IP_PROTOCOLS:
                found.append(Sight(kind == _PACKET_OUTGOING, packet))
    return found


def _l4(packet: bytes) -> tuple[int, bytes]:
    """The protocol, and what it is about; IPv6 without extension headers."""
    if packet[0] >> 4 == 4:
        return packet[9], packet[4 * (packet[0] & 15) :]
    return packet[6], packet[_IPV6_HEADER_BYTES:]


def of_datagram(token: bytes) -> Probe:
    def is_answer(packet: bytes) -> bool:
        protocol, text = _l4(packet)
        return token[::-1] in text or (protocol in _ICMP and token in text)

    return Probe(lambda packet: _l4(packet)[0] == socket.IPPROTO_UDP and token in packet, is_answer)


def of_syn(sights: list[Sight], port: int) -> Probe | None:
    """By the number of the SYN that has left from this port, which no NAT changes; None if none has."""
    syns = (
        segment
        for protocol, segment in (_l4(sight.packet) for sight in sights if sight.is_leaving)
        if protocol == socket.IPPROTO_TCP and struct.unpack_from("!H", segment)[0] == port
    )
    if (syn := next(syns, None)) is None:
        return None
    number = syn[4:8]
    acknowledged = struct.pack("!I", (struct.unpack("!I", number)[0] + 1) & 0xFFFFFFFF)

    def is_packet(packet: bytes) -> bool:
        protocol, segment = _l4(packet)
        return protocol == socket.IPPROTO_TCP and segment[4:8] == number

    def is_answer(packet: bytes) -> bool:
        protocol, segment = _l4(packet)
        if protocol in _ICMP:
            return number in segment
        return protocol == socket.IPPROTO_TCP and segment[8:12] == acknowledged

    return Probe(is_packet, is_answer)
