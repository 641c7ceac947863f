# SPDX-License-Identifier: GPL-2.0-or-later
"""The target's end of a mux call: it connects the streams that are asked for to the target's own servers.

The call's argument fixes the ports, and the protocol refuses any other; the address is localhost. The lease
is kept here, whatever the other end thinks. It begins when dom0 allows this call, and begins anew when dom0
allows another call of the same caller for the same ports. Once it is over, the service takes no streams and
cuts its connections. So what dom0 no longer allows is over within the lease, even if no revocation arrives.
Only if dom0 has said that the mux call may drain do its connections go on, up to the deadline for that.

On SIGUSR1 it looks at the new list of what dom0 allows (`revocation`). On SIGUSR2 it takes no new streams. On
SIGTERM it ends every stream now.
"""

import contextlib
import errno
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable
from functools import partial

from qubes_fwd_qrexec.common.allowance import Calls
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.mux import Connection, GoawayCode, Hello, OpenReceived, ResetCode
from qubes_fwd_qrexec.relay.budget import WINDOW_MAX_BYTES, Budget
from qubes_fwd_qrexec.relay.copy import abort
from qubes_fwd_qrexec.relay.leg import Leg
from qubes_fwd_qrexec.relay.loop import WRITE, Loop
from qubes_fwd_qrexec.relay.mux import Mux
from qubes_fwd_qrexec.system.bugs import Bugs
from qubes_fwd_qrexec.system.bugs import leave as leave_bug
from qubes_fwd_qrexec.system.descriptors import raise_descriptor_limit

from .callnotes import Kind, directory
from .callstart import CallStart
from .localserver import CONNECT_TIMEOUT_S, LOCALHOSTS, ServiceError, check_answered, new_socket, prepare
from .permissionwatch import PermissionLike, PermissionWatch, called_on_signals
from .portions import own_budget
from .proxyheader import header
from .revocation import LOOK, RevokedError, allowed_s, permitted

# How long dom0's answer holds (docs/behaviours.md, 53).
LEASE_S = 300
TAKE_NO_MORE = signal.SIGUSR2
# How often a draining mux call checks whether dom0 still lets it drain.
_LOOK_AT_DRAIN_S = 30.0
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
    raise_descriptor_limit()
    budget = own_budget()
    place = directory()
    with permitted(Kind.MUX, calls, start, place) as permission:
        lease = Lease(LEASE_S, lambda: max(start.monotonic_s, allowed_s(calls, place)))
        if lease.left_s <= 0:
            raise RevokedError(f"{calls}: dom0 allowed this call more than {LEASE_S} s ago")
        bugs = Bugs(partial(leave_bug, place))
        service = MuxService(calls.ports, stdin, stdout, lease, permission, bugs, budget)
        with contextlib.closing(service):
            problem = service.run()
    if problem is not None:
        raise ServiceError(ExitStatus.TROUBLE, problem)
    return os.EX_OK


class Lease:
    """Holds for ``length_s`` seconds from when dom0 last allowed the call (``said_s``, `time.monotonic`)."""

    def __init__(self, length_s: int, said_s: Callable[[], float]) -> None:
        self.length_s = length_s
        self._said_s = said_s

    @property
    def left_s(self) -> float:
        return self._said_s() + self.length_s - time.monotonic()


class _Connecting:
    """A stream that was asked for, until a server has answered."""

    def __init__(self, mux: Mux, event: OpenReceived, over: Callable[[int], None]) -> None:
        self._mux = mux
        self._event = event
        self._over = over
        self._hosts = iter(LOCALHOSTS)
        self._sock: socket.socket | None = None
        self._refusal = ResetCode.UNREACHABLE
        self._timer = mux.loop.after(CONNECT_TIMEOUT_S, self._too_late, self._fail)

    def start(self) -> None:
        self._try_next()

    def give_up(self) -> None:
        """Stop connecting, without an answer to the peer: the stream is over."""
        self._timer.cancel()
        if self._sock is not None:
            self._mux.loop.unwatch(self._sock.fileno())
            abort(self._sock)
            self._sock = None

    def _try_next(self) -> None:
        for family, host in self._hosts:
            try:
                sock = new_socket(family)
            except OSError as error:
                self._note(error.errno)
                continue
            sock.setblocking(False)
            try:
                with contextlib.suppress(BlockingIOError):
                    sock.connect((host, self._event.port))
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


class MuxService:
    """One mux call, from its first byte to its last; ``permission`` is what dom0 says of it.

    ``is_over``: no stream can come any more; those that are there may still write their last bytes.
    ``problem`` is why, unless that was agreed.
    """

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
        self._ports = ports
        self.lease = lease
        self.loop = Loop(bugs)
        self._connecting: dict[int, _Connecting] = {}
        self.is_over = False
        self.problem: str | None = None
        hello = Hello(
            WINDOW_MAX_BYTES, secrets.token_bytes(16), max_streams=budget.streams_max, lease_s=lease.length_s
        )
        connection = Connection(hello, range(ports.first, ports.last + 1))
        self.mux = Mux(self.loop, connection, stdin, stdout, budget, self)
        self._watch = PermissionWatch(
            self.loop, permission, self.revoke, self.take_no_more, end=self.mux.fail
        )
        self.loop.after(lease.left_s, self._look_at_lease, self.mux.fail)

    def run(self) -> str | None:
        """Serve until the mux call and its last connection are over.

        Returns why it ended, or None if it ended as agreed.
        """
        meanings = {
            LOOK: self.look,
            TAKE_NO_MORE: self.take_no_more,
            signal.SIGTERM: self.revoke,
        }
        with called_on_signals(self.loop, meanings, self.mux.fail):
            self.look()  # dom0 may have said something before the signals had handlers
            while not self.is_over or self.mux.legs:
                self.loop.run_once()
        return self.problem

    @property
    def is_connecting(self) -> bool:
        """Whether a server has been asked that has not answered yet."""
        return bool(self._connecting)

    def close(self) -> None:
        """Let go of what `run` has left, which is nothing where it returned."""
        self._give_up_connecting()
        self.loop.close()

    def look(self) -> None:
        """Do as dom0 says now."""
        self._watch.look()

    def _look_at_lease(self) -> None:
        """End the mux call if its lease is over, unless dom0 lets it drain."""
        left_s = self.lease.left_s
        if self._watch.drains:
            left_s = max(left_s, _LOOK_AT_DRAIN_S)  # until its deadline, or until dom0 decides otherwise
        if left_s > 0:
            self.loop.after(left_s, self._look_at_lease, self.mux.fail)
        elif not self.is_over:
            self.take_no_more()
            if self.mux.legs or self._connecting:
                self._cut(GoawayCode.LEASE_OVER)

    def take_no_more(self) -> None:
        """Refuse new streams from now on, and end with the last one there is."""
        if not self.is_over:
            self.mux.drain(GoawayCode.LEASE_OVER)

    def revoke(self) -> None:
        """dom0 does not allow it any more: abort all streams."""
        self._cut(GoawayCode.REVOKED)

    def _cut(self, code: GoawayCode) -> None:
        if not self.is_over:
            self._give_up_connecting()
            self.mux.close(code)

    # As the owner of the mux

    def ready(self) -> None:
        """Nothing to do: the other end opens streams."""

    def open_requested(self, event: OpenReceived) -> None:
        connecting = self._connecting[event.stream_id] = _Connecting(self.mux, event, self._answered)
        connecting.start()

    def open_abandoned(self, stream_id: int) -> None:
        connecting = self._connecting.pop(stream_id, None)
        if connecting is not None:
            connecting.give_up()

    def refused(self, leg: Leg, code: ResetCode) -> None:
        """Never called: this end opens no streams."""

    def draining(self, code: GoawayCode) -> None:
        """Nothing to do: the mux closes by itself after the last stream."""

    def over(self, problem: str | None) -> None:
        self.is_over = True
        self.problem = problem
        self._give_up_connecting()

    def _give_up_connecting(self) -> None:
        for connecting in self._connecting.values():
            connecting.give_up()
        self._connecting.clear()

    def _answered(self, stream_id: int) -> None:
        self._connecting.pop(stream_id, None)
