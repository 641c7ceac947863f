# SPDX-License-Identifier: GPL-2.0-or-later
"""What is open for the listener of an exposed qube: a protocol's ports at an address, where it listens.

TCP needs no more than rules for what begins a connection: the listener ends it. Of UDP the kernel knows a
*flow* for as long as datagrams come, and lets each of them in to whatever program has the port by then. So
the openings for UDP are remembered, and the flows that the kernel may have let in go with them (`cutting`).
"""

import time
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass

from qubes_fwd_qrexec.common.config import ListenerConfig, Side
from qubes_fwd_qrexec.common.rules import OnExpire
from qubes_fwd_qrexec.common.values import IPAddress, PortRange, Proto, Sources
from qubes_fwd_qrexec.system.conntrack import Connection

from .pathrules import DRAIN_MAX_S

Socket = tuple[Proto, IPAddress, int]
"""Where the listener listens: TCP or UDP, address and port."""


@dataclass(frozen=True, slots=True)
class Opening:
    """Packets of one protocol that come by a side, from some clients, to these ports of an address.

    The address is unspecified for all of its family. ``key`` is that of the forward.
    """

    key: str
    proto: Proto
    side: Side
    address: IPAddress
    ports: PortRange
    sources: Sources

    def covers(self, other: "Opening") -> bool:
        """Whether all that the other one lets in is let in by this one."""
        return (
            (self.proto, self.side, self.address.version) == (other.proto, other.side, other.address.version)
            and (self.address == other.address or self.address.is_unspecified)
            and self.ports.first <= other.ports.first
            and other.ports.last <= self.ports.last
            and self.sources.cover(other.sources)
        )

    def has(self, connection: Connection) -> bool:
        """Whether a flow in the kernel's table may be one of this opening's.

        The kernel forgets one before the server may have answered, and then takes the answer for the
        beginning of another one, from the listener to the client.
        """
        return self._is_of(connection.source, connection.destination, connection.destination_port) or (
            self._is_of(connection.destination, connection.source, connection.source_port)
        )

    def _is_of(self, client: IPAddress, local: IPAddress, port: int) -> bool:
        is_there = self.address == local or self.address.is_unspecified
        return port in self.ports and is_there and client in self.sources


def openings(config: ListenerConfig, listening: Container[Socket] | None = None) -> Iterator[Opening]:
    """What is open for a forward where the listener listens, in ranges of ports as long as possible.

    Without ``listening``, what would be open if it listened everywhere.
    """
    for address in dict.fromkeys(config.listen):
        everything = [PortRange(config.listen_ports.first, config.listen_ports.last)]
        for ports in everything if listening is None else _open_ports(config, address, listening):
            yield Opening(config.key, config.proto, config.side, address, ports, config.sources)


def is_waiting(config: ListenerConfig, listening: Container[Socket]) -> bool:
    """Whether the listener does not yet listen on every address and port of a forward."""
    return any(
        (config.proto, address, port) not in listening
        for address in config.listen
        for port in config.listen_ports
    )


def _open_ports(
    config: ListenerConfig, address: IPAddress, listening: Container[Socket]
) -> Iterator[PortRange]:
    first = None
    for port in config.listen_ports:
        if (config.proto, address, port) not in listening:
            if first is not None:
                yield PortRange(first, port - 1)
            first = None
        elif first is None:
            first = port
    if first is not None:
        yield PortRange(first, config.listen_ports.last)


class Flows:
    """The forwards of UDP whose flows may go on: those that are active, and those that drain.

    One drains when it ends or changes with on-expire=drain, for as long as the listener lets it.
    """

    def __init__(
        self, before: Iterable[ListenerConfig] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``before``: what an earlier run has left."""
        self._clock = clock
        self._until: dict[ListenerConfig, float] = {}
        self._active = frozenset(before)

    def look(self, active: Iterable[ListenerConfig]) -> frozenset[ListenerConfig]:
        """The forwards whose flows may go on now; ``active`` are those of the listener that are not over."""
        before, now_s = self._active, self._clock()
        by_key = {config.key: config for config in active if config.proto is Proto.UDP}
        self._active = frozenset(by_key.values())
        for old in before - self._active:
            if by_key.get(old.key, old).on_expire is OnExpire.DRAIN:
                self._until[old] = now_s + DRAIN_MAX_S
        self._until = {
            config: until_s
            for config, until_s in self._until.items()
            if now_s < until_s and config not in self._active
        }
        return self._active | self._until.keys()
