# SPDX-License-Identifier: GPL-2.0-or-later
"""Flows without a call, with the datagrams that each has waiting, and whose turn is next.

Clients take turns: first the networks, then the addresses of a network (`crowd.client_key`), and a client's
flow that has waited longest is its next one. So a client with a thousand flows holds up another one by one
of them. There is a bound for the bytes of a flow, and one for those of all: where all have too much, the
network with the most loses its oldest. Of a flow that has too much, the newest are dropped, as a server can
make nothing of an exchange without its first datagrams. What is dropped is counted for the flow's forward.
"""

from collections import deque

from qubes_fwd_qrexec.common.values import IPAddress
from qubes_fwd_qrexec.system.datagrams import count

from .callqueue import Key
from .crowd import Network, client_key, network
from .flow import Flow
from .flowcounters import Dropped

# docs/behaviours.md, 56: how many bytes may wait in all, and of one flow.
WAITING_MAX_BYTES = 1 << 20
WAITING_OF_ONE_BYTES = 64 << 10
# What a datagram takes here beside its bytes, so that empty ones have a bound, too.
_COST_BYTES = 256

Batch = tuple[bytes, int]
"""The bytes of one datagram (0), or of several of equal size, of which only the last may be shorter."""


class _Held:
    """What one flow has waiting, and since when (`time.monotonic`)."""

    __slots__ = ("batches", "bytes")

    def __init__(self) -> None:
        self.batches: deque[tuple[bytes, int, float]] = deque()
        self.bytes = 0


class _Group:
    """What one network has waiting: by address and flow, those first whose turn is next."""

    __slots__ = ("bytes", "clients", "network")

    def __init__(self, network: Network) -> None:
        self.network = network
        self.bytes = 0
        self.clients: dict[IPAddress, dict[Flow, _Held]] = {}


class WaitingFlows:
    """It belongs to the loop's thread; ``clients``, who has something here, may be copied in another one."""

    def __init__(self) -> None:
        self.clients: set[Key] = set()
        self._bytes = 0
        # Those first whose turn is next.
        self._groups: dict[Network, _Group] = {}
        # By the number of bits of what each has waiting: so the one with the most is found at once.
        self._by_size: list[dict[Network, _Group]] = [{} for _ in range(WAITING_MAX_BYTES.bit_length() + 1)]

    def __bool__(self) -> bool:
        return bool(self._groups)

    def __len__(self) -> int:
        """How many flows wait."""
        return sum(len(flows) for group in self._groups.values() for flows in group.clients.values())

    def add(self, flow: Flow, data: bytes, segment: int, now: float) -> None:
        """Have datagrams of a flow wait: one (``segment`` 0), or several of equal size."""
        cost = len(data) + _COST_BYTES
        group = self._groups.get(network(flow.client))
        held = None if group is None else group.clients.get(flow.client, {}).get(flow)
        if held is not None and held.bytes + cost > WAITING_OF_ONE_BYTES:
            _count(flow, Dropped.FULL, data, segment)
            return
        while self._groups and self._bytes + cost > WAITING_MAX_BYTES:
            self._drop_of_largest()
        group, held = self._place(flow)
        held.batches.append((data, segment, now))
        self._resize(group, held, cost)

    def take(self) -> tuple[Flow, list[Batch]]:
        """Take the flow whose turn it is, with all that it has waiting. There must be one."""
        group = next(iter(self._groups.values()))
        client, flows = next(iter(group.clients.items()))
        flow, held = next(iter(flows.items()))
        self._remove(group, flow, held)
        if group.clients:
            self._groups[group.network] = self._groups.pop(group.network)
            if client in group.clients:
                group.clients[client] = group.clients.pop(client)
        return flow, [(data, segment) for data, segment, _ in held.batches]

    def drop_old(self, before: float) -> None:
        """Drop what has waited since ``before``, and what belongs to flows that are over."""
        for group in list(self._groups.values()):
            for flow, held in [item for flows in group.clients.values() for item in flows.items()]:
                while held.batches and (flow.is_over or held.batches[0][2] <= before):
                    self._drop(group, flow, held, Dropped.NO_CALL)

    def _place(self, flow: Flow) -> tuple[_Group, _Held]:
        """Where a flow's datagrams wait, from now on if there were none."""
        key = network(flow.client)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = self._by_size[0][key] = _Group(key)
        flows = group.clients.setdefault(flow.client, {})
        held = flows.get(flow)
        if held is None:
            held = flows[flow] = _Held()
            self.clients.add(client_key(flow.client))
        return group, held

    def _drop_of_largest(self) -> None:
        """Drop the oldest datagrams of the network with the most, within a factor of two."""
        group = next(iter(next(filter(None, reversed(self._by_size))).values()))
        flow, held = next(iter(next(iter(group.clients.values())).items()))
        self._drop(group, flow, held, Dropped.FULL)

    def _drop(self, group: _Group, flow: Flow, held: _Held, reason: Dropped) -> None:
        data, segment, _ = held.batches.popleft()
        self._resize(group, held, -len(data) - _COST_BYTES)
        _count(flow, reason, data, segment)
        if not held.batches:
            self._remove(group, flow, held)

    def _remove(self, group: _Group, flow: Flow, held: _Held) -> None:
        self._resize(group, held, -held.bytes)
        flows = group.clients[flow.client]
        del flows[flow]
        if not flows:
            del group.clients[flow.client]
            self.clients.discard(client_key(flow.client))
        if not group.clients:
            del self._groups[group.network]
            del self._by_size[0][group.network]

    def _resize(self, group: _Group, held: _Held, change: int) -> None:
        del self._by_size[group.bytes.bit_length()][group.network]
        group.bytes += change
        self._by_size[group.bytes.bit_length()][group.network] = group
        held.bytes += change
        self._bytes += change


def _count(flow: Flow, reason: Dropped, data: bytes, segment: int) -> None:
    flow.counters.dropped(reason, count(len(data), segment))
