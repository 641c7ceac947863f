# SPDX-License-Identifier: GPL-2.0-or-later
"""The target's end of a mux call that carries TCP: it connects the streams that are asked for to the target's
own servers.

The call's argument fixes the ports, and the protocol refuses any other; where the servers are, `servers`
says. Lease, revocation and signals are `callservice`'s.
"""

import errno
import secrets
import socket
from collections.abc import Callable, Iterator

from qubes_fwd_qrexec.common.allowance import Calls
from qubes_fwd_qrexec.common.values import Proto, TargetPorts
from qubes_fwd_qrexec.mux import Connection, Hello, OpenReceived, ResetCode
from qubes_fwd_qrexec.relay.budget import WINDOW_MAX_BYTES, Budget
from qubes_fwd_qrexec.relay.copy import abort
from qubes_fwd_qrexec.relay.leg import Leg
from qubes_fwd_qrexec.relay.loop import WRITE, Loop, Timer
from qubes_fwd_qrexec.relay.mux import Mux
from qubes_fwd_qrexec.system.bugs import Bugs
from qubes_fwd_qrexec.system.outlet import Outlet

from .callnotes import Kind
from .callservice import CallService, Lease, serve_call
from .callstart import CallStart
from .localserver import CONNECT_TIMEOUT_S, RETRY_S, check_answered, is_begun, new_socket, prepare
from .permissionwatch import PermissionLike
from .portions import own_budget
from .proxyheader import header
from .servers import ServerAddress, Servers, ServersError

_REFUSALS = {
    errno.ECONNREFUSED: ResetCode.REFUSED,
    errno.ETIMEDOUT: ResetCode.TIMEOUT,
    errno.EMFILE: ResetCode.OVER_LIMIT,
    errno.ENFILE: ResetCode.OVER_LIMIT,
}


def serve(calls: Calls, start: CallStart, stdin: socket.socket, stdout: socket.socket) -> int:
    """Serve a mux call over its two sockets until it is over. Returns the exit status.

    Raises `ServiceError`, and `RevocationError` if dom0 no longer allows the call or could not end it.
    """
    budget = own_budget()

    def make(lease: Lease, permission: PermissionLike, bugs: Bugs) -> MuxService:
        return MuxService(calls.ports, stdin, stdout, lease, permission, bugs, budget)

    return serve_call(Kind.MUX, calls, start, make)


class _Connecting:
    """A stream that was asked for, until a server has answered."""

    def __init__(self, mux: Mux, event: OpenReceived, servers: Servers, over: Callable[[int], None]) -> None:
        self._mux = mux
        self._event = event
        self._servers = servers
        self._over = over
        self._addresses: Iterator[ServerAddress] = iter(())
        self._retry: Timer | None = None
        self._sock: socket.socket | None = None
        self._refusal = ResetCode.UNREACHABLE
        self._timer = mux.loop.after(CONNECT_TIMEOUT_S, self._too_late, self._fail)

    def start(self) -> None:
        try:
            self._addresses = iter(self._servers.addresses(Proto.TCP, self._event.port))
        except ServersError:
            self._refuse(ResetCode.REFUSED)
        else:
            self._try_next()

    def give_up(self) -> None:
        """Stop connecting, without an answer to the peer: the stream is over."""
        self._timer.cancel()
        if self._retry is not None:
            self._retry.cancel()
        if self._sock is not None:
            self._mux.loop.unwatch(self._sock.fileno())
            abort(self._sock)
            self._sock = None

    def _try_next(self) -> None:
        for address in self._addresses:
            try:
                sock = new_socket(address.family)
            except OSError as error:
                self._note(error.errno)
                continue
            try:
                if not is_begun(sock, address, self._event.port):
                    sock.close()
                    self._addresses = iter((address,))
                    self._retry = self._mux.loop.after(RETRY_S, self._try_next, self._fail)
                    return
                self._mux.loop.watch(sock.fileno(), WRITE, self._on_answer, self._fail)
            except OSError as error:
                sock.close()
                self._note(error.errno)
            else:
                self._sock = sock
                return
        self._refuse(self._refusal)

    def _on_answer(self, events: int) -> None:
        sock = self._sock
        if sock is None:
            return
        self._mux.loop.unwatch(sock.fileno())
        self._sock = None
        try:
            check_answered(sock, self._event.port)
            prepare(sock)
        except ConnectionResetError:  # it was there, so no other is tried
            abort(sock)
            self._refuse(ResetCode.ABORTED)
        except OSError as error:
            abort(sock)
            self._note(error.errno)
            self._try_next()
        else:
            self._connected(sock)

    def _connected(self, sock: socket.socket) -> None:
        self._timer.cancel()
        self._over(self._event.stream_id)
        leg = self._mux.accept(self._event.stream_id, sock)
        if leg is None:
            abort(sock)
        elif first := header(self._event.proxy, self._event.origin):
            _tell(leg, first)

    def _note(self, error_number: int | None) -> None:
        """Remember the first reason: that of 127.0.0.1 counts more than a missing ::1."""
        if self._refusal is ResetCode.UNREACHABLE and error_number is not None:
            self._refusal = _REFUSALS.get(error_number, ResetCode.UNREACHABLE)

    def _too_late(self) -> None:
        self.give_up()
        self._refuse(ResetCode.TIMEOUT)

    def _fail(self) -> None:
        """A bug ends it."""
        if (leg := self._mux.legs.get(self._event.stream_id)) is not None:
            leg.fail()
        else:
            self.give_up()
            self._refuse(ResetCode.INTERNAL)

    def _refuse(self, code: ResetCode) -> None:
        self._timer.cancel()
        self._over(self._event.stream_id)
        self._mux.refuse(self._event.stream_id, code)


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
        self._connecting: dict[int, _Connecting] = {}
        self._servers = Servers(Outlet().say)
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
        return bool(self._connecting)

    @property
    def carries_any(self) -> bool:
        return bool(self.mux.legs or self._connecting)

    # As the owner of the mux

    def open_requested(self, event: OpenReceived) -> None:
        connecting = _Connecting(self.mux, event, self._servers, self._answered)
        self._connecting[event.stream_id] = connecting
        connecting.start()

    def open_abandoned(self, stream_id: int) -> None:
        connecting = self._connecting.pop(stream_id, None)
        if connecting is not None:
            connecting.give_up()

    def refused(self, leg: Leg, code: ResetCode) -> None:
        """Never called: this end opens no streams."""

    def _let_go(self) -> None:
        for connecting in self._connecting.values():
            connecting.give_up()
        self._connecting.clear()

    def _answered(self, stream_id: int) -> None:
        self._connecting.pop(stream_id, None)
