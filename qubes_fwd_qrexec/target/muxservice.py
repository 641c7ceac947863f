# SPDX-License-Identifier: GPL-2.0-or-later
"""The target's end of a mux call that carries TCP: it connects the streams that are asked for to the target's
own servers.

The call's argument fixes the ports, and the protocol refuses any other; where the servers are, `servers`
says. Lease, revocation and signals are `callservice`'s.
"""

import errno
import secrets
import socket

from qubes_fwd_qrexec.common.allowance import Calls
from qubes_fwd_qrexec.common.values import Proto, TargetPorts
from qubes_fwd_qrexec.mux import Connection, Hello, OpenReceived, ResetCode
from qubes_fwd_qrexec.relay.budget import STREAMS_MAX, WINDOW_MAX_BYTES, Budget
from qubes_fwd_qrexec.relay.copy import abort
from qubes_fwd_qrexec.relay.leg import Leg
from qubes_fwd_qrexec.relay.loop import Loop
from qubes_fwd_qrexec.relay.mux import Mux
from qubes_fwd_qrexec.system.bugs import Bugs
from qubes_fwd_qrexec.system.outlet import Outlet

from .callnotes import Kind
from .callservice import CallService, Lease, serve_call
from .callstart import CallStart
from .connecting import Connecting
from .permissionwatch import PermissionLike
from .proxyheader import header
from .servers import ServerAddress, Servers, ServersError

_REFUSALS = {
    errno.ECONNREFUSED: ResetCode.REFUSED,
    errno.ETIMEDOUT: ResetCode.TIMEOUT,
    errno.ECONNRESET: ResetCode.ABORTED,
    errno.EMFILE: ResetCode.OVER_LIMIT,
    errno.ENFILE: ResetCode.OVER_LIMIT,
}


def serve(calls: Calls, start: CallStart, stdin: socket.socket, stdout: socket.socket) -> int:
    """Serve a mux call over its two sockets until it is over. Returns the exit status.

    Raises `ServiceError`, and `RevocationError` if dom0 no longer allows the call or could not end it.
    """
    budget = Budget(streams_max=STREAMS_MAX)

    def make(lease: Lease, permission: PermissionLike, bugs: Bugs) -> MuxService:
        return MuxService(calls.ports, stdin, stdout, lease, permission, bugs, budget)

    return serve_call(Kind.MUX, calls, start, make)


class _Opening(Connecting):
    """A stream that was asked for, until a server has answered."""

    def __init__(self, service: "MuxService", event: OpenReceived) -> None:
        super().__init__(service.loop, event.port)
        self._service = service
        self._event = event

    def _connected(self, sock: socket.socket) -> None:
        event, mux = self._event, self._service.mux
        self._service.answered(event.stream_id)
        leg = mux.accept(event.stream_id, sock)
        if leg is None:
            abort(sock)
            return
        if told := header(event.proxy, event.origin):
            _tell(leg, told)
        if event.first and leg.ended is None:
            leg.deliver((event.first,))

    def _not_connected(self, trouble: OSError) -> None:
        self.refuse(_REFUSALS.get(trouble.errno or 0, ResetCode.UNREACHABLE))

    def fail(self) -> None:
        if (leg := self._service.mux.legs.get(self._event.stream_id)) is not None:
            leg.fail()
        else:
            self.give_up()
            self.refuse(ResetCode.INTERNAL)

    def refuse(self, code: ResetCode) -> None:
        self._service.answered(self._event.stream_id)
        self._service.mux.refuse(self._event.stream_id, code)


def _tell(leg: Leg, first: bytes) -> None:
    """Send what the server gets before its client's first byte; a new socket's buffer takes it at once."""
    try:
        is_told = leg.sock.send(first) == len(first)
    except OSError as error:
        leg.broken(error)
    else:
        if not is_told:
            leg.abort_from_here()


class MuxService(CallService):
    """One mux call that carries TCP; see `CallService`."""

    def __init__(
        self,
        ports: TargetPorts,
        stdin: socket.socket,
        stdout: socket.socket,
        lease: Lease,
        permission: PermissionLike,
        bugs: Bugs | None = None,
        budget: Budget | None = None,
    ) -> None:
        budget = budget or Budget()
        self._opening: dict[int, _Opening] = {}
        self._servers = Servers(Outlet().say)
        self._places: dict[int, tuple[ServerAddress, ...]] = {}
        self._placed_turn = 0
        hello = Hello(
            WINDOW_MAX_BYTES, secrets.token_bytes(16), max_streams=budget.streams_max, lease_s=lease.length_s
        )
        connection = Connection(hello, range(ports.first, ports.last + 1))
        loop = Loop(bugs)
        self.mux = Mux(loop, connection, stdin, stdout, budget, self)
        super().__init__(lease, permission, loop, self.mux)

    @property
    def is_connecting(self) -> bool:
        """Whether a server has been asked that has not answered yet."""
        return bool(self._opening)

    @property
    def carries_any(self) -> bool:
        return bool(self.mux.legs or self._opening)

    # As the owner of the mux

    def open_requested(self, event: OpenReceived) -> None:
        opening = self._opening[event.stream_id] = _Opening(self, event)
        try:
            addresses = self._addresses(event.port)
        except ServersError:
            opening.refuse(ResetCode.REFUSED)
        else:
            opening.start(addresses)

    def open_abandoned(self, stream_id: int) -> None:
        opening = self._opening.pop(stream_id, None)
        if opening is not None:
            opening.give_up()

    def refused(self, leg: Leg, code: ResetCode) -> None:
        """Never called: this end opens no streams."""

    def _let_go(self) -> None:
        for opening in self._opening.values():
            opening.give_up()
        self._opening.clear()

    # For the streams that are being opened

    def answered(self, stream_id: int) -> None:
        """A server has accepted it, or none will."""
        self._opening.pop(stream_id, None)

    def _addresses(self, port: int) -> tuple[ServerAddress, ...]:
        """Where the server may be: looked up once for all streams of a turn. Raises `ServersError`."""
        if self._placed_turn != self.loop.turn:
            self._places.clear()
            self._placed_turn = self.loop.turn
        if port not in self._places:
            self._places[port] = self._servers.addresses(Proto.TCP, port)
        return self._places[port]
