# SPDX-License-Identifier: GPL-2.0-or-later
"""Who holds how many connections, and which one makes room when the limit is reached.

Clients are counted twice: by address, and by network, since an IPv6 host can choose among 2**64 addresses
(docs/facts.md, R6). The network with most connections makes room first, in it the address with most, and of
that one the connection that has been idle for longest. Nobody makes room for a newcomer that holds as many.
"""

import itertools
from collections.abc import Iterable, Iterator
from ipaddress import IPv6Address
from typing import Generic, Protocol, TypeVar

from qubes_fwd_qrexec.common.values import IPAddress

Host = int | IPv6Address
"""What an address is counted by. An IPv4 address is a number here, which is found ten times as fast."""

Network = int
"""An IPv4 address; or the upper 64 bits of an IPv6 address, and these are below 0."""

_K = TypeVar("_K")

# At how many connections `quiet_of` looks, and `idlest` where several networks hold as many.
_LOOKS = 16


class Member(Protocol):
    """A connection that is let in."""

    @property
    def client(self) -> IPAddress:
        """The client's address, IPv4 as IPv4."""

    @property
    def moved_at(self) -> float:
        """When bytes last moved, or it began (`time.monotonic`)."""

    def make_room(self) -> None:
        """End it now: the client sees RST."""


def client_key(client: IPAddress) -> tuple[Network, Host]:
    """What a client is counted by, the widest first."""
    if isinstance(client, IPv6Address):
        return -1 - (int(client) >> 64), client
    number = int(client)
    return number, number


def network(client: IPAddress) -> Network:
    """The network that an address counts towards."""
    return client_key(client)[0]


class _Ranking(Generic[_K]):
    """Numbers by key, which change by one; finding the largest takes constant time."""

    __slots__ = ("_keys", "_largest", "numbers")

    def __init__(self) -> None:
        self.numbers: dict[_K, int] = {}
        self._keys: dict[int, dict[_K, None]] = {}
        self._largest = 0

    def change(self, key: _K, by: int) -> None:
        before = self.numbers.get(key, 0)
        after = before + by
        if before:
            del self._keys[before][key]
            if not self._keys[before]:
                del self._keys[before]
        if after:
            self.numbers[key] = after
            self._keys.setdefault(after, {})[key] = None
        else:
            del self.numbers[key]
        if after > self._largest or self._largest not in self._keys:
            self._largest = after

    def largest(self) -> _K:
        """The key with the largest number, the one that reached it first. Raises KeyError if empty."""
        return next(iter(self._keys[self._largest]))

    def some_largest(self, looks: int) -> list[_K]:
        """Keys with the largest number: as many as have ``looks`` things together, or one. Those that are
        returned come behind the others the next time."""
        keys = self._keys[self._largest]
        found = list(itertools.islice(keys, max(1, looks // self._largest)))
        for key in found:
            del keys[key]
            keys[key] = None
        return found


class Crowd:
    """The connections of one forward, by network and address."""

    def __init__(self) -> None:
        self._members: dict[Host, dict[Member, None]] = {}
        self._networks: _Ranking[Network] = _Ranking()
        # Of IPv6 networks; an IPv4 address is a network by itself.
        self._hosts: dict[Network, _Ranking[Host]] = {}

    def __iter__(self) -> Iterator[Member]:
        for members in self._members.values():
            yield from members

    def __contains__(self, member: Member) -> bool:
        return member in self._members.get(client_key(member.client)[1], ())

    @property
    def clients(self) -> int:
        """How many addresses have a connection."""
        return len(self._members)

    def held_by(self, client: IPAddress) -> int:
        """How many connections an address has."""
        return len(self._members.get(client_key(client)[1], ()))

    def held_in(self, client: IPAddress) -> int:
        """How many connections the network of an address has."""
        return self._networks.numbers.get(network(client), 0)

    def add(self, member: Member) -> None:
        """Count a connection."""
        key, host = client_key(member.client)
        self._members.setdefault(host, {})[member] = None
        self._networks.change(key, 1)
        if key < 0:
            self._hosts.setdefault(key, _Ranking()).change(host, 1)

    def discard(self, member: Member) -> bool:
        """Stop counting a connection. Returns whether it was counted."""
        key, host = client_key(member.client)
        members = self._members.get(host, {})
        if member not in members:
            return False
        del members[member]
        if not members:
            del self._members[host]
        self._networks.change(key, -1)
        if key < 0:
            self._hosts[key].change(host, -1)
            if not self._hosts[key].numbers:
                del self._hosts[key]
        return True

    def idlest(self) -> Member | None:
        """The connection that makes room for anybody; None if there are no connections."""
        return self._idlest_of_largest() if self._members else None

    def idlest_before(self, client: IPAddress) -> Member | None:
        """The connection that makes room for ``client``; None if nobody holds more than it does."""
        if not self._members:
            return None
        key, host = client_key(client)
        if self._networks.numbers[self._networks.largest()] > self.held_in(client):
            return self._idlest_of_largest()
        if key not in self._networks.numbers:
            return None
        largest = self._members[self._largest_in(key)]
        return _idlest(largest) if len(largest) > len(self._members.get(host, ())) else None

    def quiet_of(self, client: IPAddress, since: float) -> Member | None:
        """A connection of ``client`` that has not moved after ``since``; if it has none, of that address of
        its network which has most.

        It looks at a few and puts these behind the others, so that it finds each one in the end.
        """
        key, host = client_key(client)
        if key not in self._networks.numbers:
            return None
        members = self._members.get(host) or self._members[self._largest_in(key)]
        for member in list(itertools.islice(members, _LOOKS)):
            if member.moved_at <= since:
                return member
            del members[member]
            members[member] = None
        return None

    def _idlest_of_largest(self) -> Member:
        """The idlest connection of the network with most; of several such networks, it looks at some, so that
        who moves keeps its connection although many others come and hold as much."""
        keys = self._networks.some_largest(_LOOKS)
        return _idlest(_idlest(self._members[self._largest_in(key)]) for key in keys)

    def _largest_in(self, key: Network) -> Host:
        """The address of a network with most connections."""
        return self._hosts[key].largest() if key < 0 else key


def _idlest(members: Iterable[Member]) -> Member:
    return min(members, key=lambda member: member.moved_at)
