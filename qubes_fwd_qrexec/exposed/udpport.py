# SPDX-License-Identifier: GPL-2.0-or-later
"""The UDP socket of one exposed address and port, and the flows of those who write to it.

It reads in the loop's thread, a bounded number of times in a turn, so that other sockets of the loop have
theirs. What a flow exists for goes on at once; for everything else its table decides whether it begins one.
Replies leave from the address that the client wrote to. Nothing is ever sent to a client but what the server
has sent.
"""

import socket
import time
from ipaddress import IPv6Address
from typing import Protocol

from qubes_fwd_qrexec.common.refusals import Refusal
from qubes_fwd_qrexec.common.values import Binding, IPAddress, Proto, address_text
from qubes_fwd_qrexec.mux import Buffer, FlowCode, ProxyVersion
from qubes_fwd_qrexec.relay.acceptloop import BindError, bind_trouble
from qubes_fwd_qrexec.relay.loop import READ, Loop
from qubes_fwd_qrexec.system import datagrams
from qubes_fwd_qrexec.system.datagrams import (
    MAX_DATAGRAM_BYTES,
    READ_MAX_BYTES,
    Address,
    Arrived,
    Control,
    Lost,
    reads,
)

from .connectionlog import FlowHow
from .flow import Flow
from .flowcounters import Dropped, FlowCounters
from .limits import NotAdmitted

# Where what comes in a burst waits for this program's next turn. The kernel gives as much as it may: with its
# default net.core.rmem_max room for 554 small datagrams, twice as many as a socket has that asks for none.
_RECEIVE_BYTES = 1 << 20
# docs/behaviours.md, 34: how long to wait until memory is free.
_PAUSE_S = 0.2
# docs/behaviours.md, 72: for how long what comes behind a refused flow begins no other one, and for how many
# flows. Most clients ask again after a second or more.
REFUSED_S = 1.0
REFUSED_MAX = 1024
# For how many addresses of this qube a port keeps what has its replies leave from them.
_FROM_MAX = 1024
# The target takes no more over this call.
_TRY_AGAIN = frozenset((FlowCode.LEASE_OVER, FlowCode.SHUTDOWN))
_REFUSALS = {
    FlowCode.REFUSED: "nothing listens on the server's port in the target",
    FlowCode.UNREACHABLE: "the server in the target cannot be reached",
    FlowCode.OVER_LIMIT: "the target takes no more flows",
}


def open_udp(address: IPAddress, port: int) -> socket.socket:
    """Return a non-blocking socket bound to exactly this; ``::`` means IPv6 alone. Raises `BindError`.

    No other program can have the port meanwhile: without SO_REUSEADDR and SO_REUSEPORT the kernel refuses it.
    """
    is_ipv6 = isinstance(address, IPv6Address)
    sock = None
    try:
        sock = socket.socket(socket.AF_INET6 if is_ipv6 else socket.AF_INET, socket.SOCK_DGRAM)
        sock.setblocking(False)
        if is_ipv6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        datagrams.tell_arrivals(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        sock.bind((str(address), port))
    except OSError as error:
        if sock is not None:
            sock.close()
        trouble = bind_trouble(error, address, port, Proto.UDP)
        raise BindError(f"{address_text(address, port)} (udp): {trouble}") from error
    return sock


class PortOwner(Protocol):
    """Who decides for a port, in the loop's thread."""

    counters: FlowCounters

    def newcomer(self, port: "UdpPort", arrived: Arrived, now: float) -> Flow | None:
        """Begin a flow for somebody who has none; None if the datagram is not let in."""

    def lets_in_by(self, interface: int) -> bool:
        """Whether datagrams may come by the interface with this index."""

    def port_failed(self, port: "UdpPort") -> None:
        """The port has closed itself after a bug."""

    def flow_over(self, flow: Flow, how: FlowHow) -> None:
        """A flow has ended."""

    def not_carried(self, flow: Flow, kind: str, error: str) -> None:
        """There is no call for a flow, which ends."""


class UdpPort:
    """Owns ``sock``, from `open_udp`, and closes it with `close`. It belongs to the loop's thread.

    ``is_open``: it takes new flows; otherwise it is there for those that it has, which `flows` has by sender
    and exposed address. Raises OSError when the kernel can watch no more sockets; ``sock`` is the caller's
    then.
    """

    def __init__(self, loop: Loop, binding: Binding, sock: socket.socket, owner: PortOwner) -> None:
        self.binding = binding
        self.port = binding[1]
        self.is_open = True
        self.flows: dict[tuple[Address, bytes], Flow] = {}
        self._loop = loop
        self._sock = sock
        self._owner = owner
        self.counters = owner.counters
        self._lost = Lost()
        self._turn = -1
        self._is_closed = False
        # Whose flow was refused, and until when it begins no other one; the oldest first.
        self._refused: dict[tuple[Address, bytes], float] = {}
        self._from: dict[tuple[bytes, int], tuple[Control]] = {}
        loop.watch(sock.fileno(), READ, self._on_readable, self._fail)

    def close(self) -> None:
        """Close the socket, which ends all flows; a second call changes nothing."""
        if not self._is_closed:
            self.count_lost()
            self._is_closed = True
            self._loop.unwatch(self._sock.fileno())
            self._sock.close()
        for flow in list(self.flows.values()):
            self.end(flow, FlowHow.CUT)

    def count_lost(self) -> None:
        """Count what the kernel had no room for since the last look; a closed port has been looked at."""
        if not self._is_closed:
            self.counters.dropped(Dropped.KERNEL, self._lost.more(self._sock))

    def _fail(self) -> None:
        self._owner.port_failed(self)
        self.close()

    # From clients

    def _on_readable(self, _events: int) -> None:
        now = time.monotonic()
        left_bytes = READ_MAX_BYTES
        # What comes after a pause is mostly one datagram, and looking for another one costs a system call. If
        # there are more, the next turn takes them together.
        most = 1 if self._loop.turn != self._turn + 1 else reads(self._loop.served)
        self._turn = self._loop.turn
        for _ in range(most):
            try:
                arrived = datagrams.receive(self._sock)
            except BlockingIOError:
                return
            except OSError:
                self._pause()
                return
            if "%" in arrived.sender[0]:
                arrived = arrived._replace(sender=_without_zone(arrived.sender))
            flow = self.flows.get((arrived.sender, arrived.local))
            end = _go_on if flow is None else flow.fail
            self._loop.guarded(end, self._take, flow, arrived, now)
            left_bytes -= len(arrived.data)
            if left_bytes <= 0 or self._is_closed:
                return

    def _pause(self) -> None:
        """The kernel has no memory, or something like that: do not ask it again at once."""
        self._loop.change(self._sock.fileno(), 0)
        self._loop.after(_PAUSE_S, self._resume, self._fail)

    def _resume(self) -> None:
        if not self._is_closed:
            self._loop.change(self._sock.fileno(), READ)

    def _take(self, flow: Flow | None, arrived: Arrived, now: float) -> None:
        """Let in what may come in, and send it on."""
        data, segment = arrived.data, arrived.segment
        if not arrived.is_for_one:
            self.counters.dropped(Dropped.TO_MANY, datagrams.count(len(data), segment))
            return
        if flow is None:
            name = arrived.sender, arrived.local
            if now < self._refused.get(name, now):
                self.counters.dropped(Dropped.REFUSED, datagrams.count(len(data), segment))
                return
            flow = self._owner.newcomer(self, arrived, now)
            if flow is None:
                return
            self.flows[name] = flow
        elif flow.interface != arrived.interface:
            if not self._owner.lets_in_by(arrived.interface):
                self.counters.refused(NotAdmitted.SIDE)
                return
            flow.interface = arrived.interface
        number = datagrams.count(len(data), segment)
        flow.moved_at = now
        flow.sent += len(data)
        flow.datagrams_sent += number
        self.counters.sent += len(data)
        self.counters.datagrams_sent += number
        if segment or len(data) <= MAX_DATAGRAM_BYTES:
            flow.carrier.carry(flow, data, segment, now)
        else:
            self.counters.dropped(Dropped.TOO_LONG, 1)

    # As the owner of flows

    def reply(self, flow: Flow, data: Buffer, segment: int) -> None:
        if flow.is_over:
            return
        flow.is_answered = True
        flow.moved_at = time.monotonic()
        if flow.call is not None:
            flow.call.moved_at = flow.moved_at
        sent = datagrams.send(self._sock, data, segment, flow.sender, self._control(flow))
        number = datagrams.count(len(data), segment)
        sent_bytes = len(data) if sent.datagrams == number else sent.datagrams * segment
        flow.received += sent_bytes
        flow.datagrams_received += sent.datagrams
        self.counters.received += sent_bytes
        self.counters.datagrams_received += sent.datagrams
        if sent.datagrams < number:
            self.counters.dropped(Dropped.UNSENT, number - sent.datagrams)
            if sent.problem is not None:
                self.counters.failed(f"cannot send to {flow.client}: {sent.problem.strerror}")

    def ended_there(self, flow: Flow, code: FlowCode) -> None:
        """It keeps its place if only its call is over: its next datagram gets another one."""
        call, flow.call = flow.call, None
        if call is None:
            return
        call.left(flow.flow_id)
        if call.is_revoked or code is FlowCode.REVOKED:
            self._over(flow, FlowHow.REVOKED)
        elif code in _TRY_AGAIN and not call.is_lost:
            call.give_up()
        elif not call.is_lost:
            if code in _REFUSALS:
                self.counters.refused(Refusal.SERVER)
                self.counters.failed(_REFUSALS[code])
                self._note_refusal(flow)
                self._over(flow, FlowHow.REFUSED)
            else:
                self._over(flow, FlowHow.IDLE if code is FlowCode.DONE else FlowHow.TARGET_ENDED)

    def end(self, flow: Flow, how: FlowHow) -> None:
        self._leave_call(flow)
        self._over(flow, how)

    def not_carried(self, flow: Flow, kind: str, error: str) -> None:
        self._owner.not_carried(flow, kind, error)
        self._note_refusal(flow)
        self.end(flow, FlowHow.REFUSED)

    def begin_anew(self, flow: Flow, proxy: ProxyVersion) -> None:
        """Have the flow begin again in the target with its next datagram, with this header."""
        self._leave_call(flow)
        flow.proxy = proxy

    def _leave_call(self, flow: Flow) -> None:
        call, flow.call = flow.call, None
        if call is not None:
            call.end(flow.flow_id, FlowCode.DONE)

    def _note_refusal(self, flow: Flow) -> None:
        """A client that goes on sending begins a flow that is refused once a second."""
        now = time.monotonic()
        name = flow.sender, flow.local
        self._refused.pop(name, None)
        while self._refused:
            oldest, until = next(iter(self._refused.items()))
            if now < until and len(self._refused) < REFUSED_MAX:
                break
            del self._refused[oldest]
        self._refused[name] = now + REFUSED_S

    def _over(self, flow: Flow, how: FlowHow) -> None:
        if not flow.is_over:
            flow.is_over = True
            self.flows.pop((flow.sender, flow.local), None)
            self._owner.flow_over(flow, how)

    def _control(self, flow: Flow) -> tuple[Control]:
        """What has a reply leave from the address that the client wrote to."""
        key = flow.local, flow.interface if _is_link_local(flow.local) else 0
        found = self._from.get(key)
        if found is None:
            if len(self._from) >= _FROM_MAX:
                self._from.clear()
            found = self._from[key] = (datagrams.from_address(self._sock, *key),)
        return found


def _without_zone(sender: Address) -> Address:
    """The zone of a link-local address is a number behind it, too. Its name would be looked up again for each
    reply, and where the interface is gone, in DNS."""
    return (sender[0].partition("%")[0], *sender[1:])


def _is_link_local(packed: bytes) -> bool:
    """Whether it is an address of one interface: fe80::/10."""
    return len(packed) == 16 and packed[0] == 0xFE and packed[1] & 0xC0 == 0x80


def _go_on() -> None:
    """A bug in what was done for a stranger costs its datagram and no more."""
