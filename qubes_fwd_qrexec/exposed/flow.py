# SPDX-License-Identifier: GPL-2.0-or-later
"""One flow: the datagrams between one client's address and port and one exposed address and port.

There may be thousands, so it is small, has no task and no timer, and decides nothing: its owner does, the
socket of the exposed port.
"""

import math
from ipaddress import ip_address
from typing import Protocol

from qubes_fwd_qrexec.common.values import Binding, IPAddress
from qubes_fwd_qrexec.mux import Buffer, FlowCode, Origin, ProxyVersion
from qubes_fwd_qrexec.system.datagrams import Address

from .connectionlog import FlowHow, Opened
from .flowcall import FlowCall
from .flowcounters import FlowCounters


class FlowOwner(Protocol):
    """Who is told what happens to a flow, in the loop's thread. ``port``: the exposed one; ``counters``:
    those of its forward."""

    port: int
    counters: FlowCounters

    def reply(self, flow: "Flow", data: Buffer, segment: int) -> None:
        """The server has answered."""

    def ended_there(self, flow: "Flow", code: FlowCode) -> None:
        """The target has ended the flow, or its call is over."""

    def end(self, flow: "Flow", how: FlowHow) -> None:
        """End the flow here."""

    def not_carried(self, flow: "Flow", kind: str, error: str) -> None:
        """There is no call for the flow; ``kind`` is a word for counters."""


class Carrier(Protocol):
    """What carries datagrams of flows to the target."""

    def carry(self, flow: "Flow", data: bytes, segment: int, now: float) -> None:
        """Send datagrams on, or drop them."""


class Flow:
    """Belongs to the loop's thread. ``sender`` is the client as its socket address, ``local`` the exposed
    address that it wrote to, packed. ``call`` carries the flow, under ``flow_id``; it has none before its
    first call, and between two.

    ``sent`` and ``received`` are bytes from and to the client; ``since`` and ``moved_at`` are of
    `time.monotonic`, as is ``ends_at``, when it must be over at the latest.
    """

    __slots__ = (
        "call",
        "carrier",
        "client",
        "datagrams_received",
        "datagrams_sent",
        "ends_at",
        "flow_id",
        "interface",
        "is_answered",
        "is_over",
        "line",
        "local",
        "moved_at",
        "owner",
        "proxy",
        "received",
        "sender",
        "sent",
        "since",
        "target_port",
    )

    def __init__(
        self,
        owner: FlowOwner,
        carrier: Carrier,
        sender: Address,
        client: IPAddress,
        local: bytes,
        interface: int,
        target_port: int,
        proxy: ProxyVersion,
        now: float,
    ) -> None:
        self.owner = owner
        self.carrier = carrier
        self.sender = sender
        self.client = client
        self.local = local
        self.interface = interface
        self.target_port = target_port
        self.proxy = proxy
        self.call: FlowCall | None = None
        self.flow_id = 0
        self.since = self.moved_at = now
        self.ends_at = math.inf
        self.is_answered = self.is_over = False
        self.line: Opened | None = None
        self.sent = self.received = self.datagrams_sent = self.datagrams_received = 0

    @property
    def counters(self) -> FlowCounters:
        return self.owner.counters

    @property
    def local_address(self) -> IPAddress:
        """The exposed address."""
        return ip_address(self.local)

    def origin(self) -> Origin:
        """Who writes to what, for the target."""
        return Origin(self.client, self.sender[1], self.local_address, self.owner.port)

    def client_name(self) -> tuple[str, int]:
        """The client's address and port, as `socket.getpeername` has them for a connection."""
        return self.sender[0], self.sender[1]

    @property
    def peer(self) -> Binding:
        """The client's address and port."""
        return self.client, self.sender[1]

    def make_room(self) -> None:
        """Others need its place."""
        self.owner.end(self, FlowHow.MADE_ROOM)

    def fail(self) -> None:
        """There was a bug in what was done for it."""
        self.owner.end(self, FlowHow.BUG)

    # As the end of a flow in its call

    def deliver(self, data: Buffer, segment: int) -> None:
        self.owner.reply(self, data, segment)

    def ended(self, code: FlowCode) -> None:
        self.owner.ended_there(self, code)
