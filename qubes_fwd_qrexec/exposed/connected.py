# SPDX-License-Identifier: GPL-2.0-or-later
"""Who is connected, as dom0 may ask: connections and flows of open forwards and of those that drain."""

import heapq
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from qubes_fwd_qrexec.common.clientreport import CLIENTS_MAX, ClientReport, sayable
from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.values import Binding

from .connectionlog import Figures


class Client(Figures, Protocol):
    """A connection or a flow: ``peer`` is its other end, and ``moved_at`` when bytes last moved
    (`time.monotonic`). ``ends_at`` is finite once its forward no longer allows it.
    """

    @property
    def peer(self) -> Binding: ...

    @property
    def moved_at(self) -> float: ...

    @property
    def ends_at(self) -> float: ...


class Forward(Protocol):
    """What may be asked here of a forward of TCP or of UDP; ``live`` are its connections or flows."""

    config: ListenerConfig

    @property
    def live(self) -> Iterable[Client]: ...


def clients(
    forwards: Iterable[Forward],
    closed: Iterable[Forward],
    most: int = CLIENTS_MAX,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[tuple[ClientReport, ...], int]:
    """At most so many of those that are connected, the last that moved first, and how many more there are.

    ``closed``: forwards that have ended and whose connections may finish.
    """
    now = clock()
    found = [*_each(forwards, is_closed=False), *_each(closed, is_closed=True)]
    # Bytes move while this looks, and in the other thread: each is asked once.
    latest = heapq.nlargest(most, ((client.moved_at, n) for n, (_, client, _) in enumerate(found)))
    told = tuple(_told(*found[n], now, now - moved_at) for moved_at, n in latest)
    return told, len(found) - len(told)


def _each(forwards: Iterable[Forward], *, is_closed: bool) -> Iterator[tuple[ListenerConfig, Client, bool]]:
    for forward in forwards:
        for client in forward.live:
            yield forward.config, client, is_closed or client.ends_at < math.inf


def _told(
    config: ListenerConfig, client: Client, is_draining: bool, now: float, idle_s: float
) -> ClientReport:
    address, port = client.peer
    return ClientReport(
        target=config.target,
        name=config.name,
        proto=config.proto,
        address=sayable(address),
        port=port,
        since=int(time.time() - (now - client.since)),
        sent=client.sent,
        received=client.received,
        idle_s=max(0, int(idle_s)),
        is_draining=is_draining,
    )
