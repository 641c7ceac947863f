# SPDX-License-Identifier: GPL-2.0-or-later
"""A call for one connection, in a plain loop: from its two sockets to a server, and back.

A clean end of either side is passed on as a half-close, and that of the server is also told on the call's
stderr (`callsigns`). An abort of the server becomes an exit status, as qrexec has no other way to pass it on;
an abort of the caller looks like a clean end (libqrexec/remote.c).
"""

import os
import socket
import time
from collections.abc import Callable

from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.services import FORWARD_SERVICE
from qubes_fwd_qrexec.relay.callsigns import clean_end
from qubes_fwd_qrexec.relay.copy import Copy, CopyEnd, Relay, abort, close_cleanly, half_close
from qubes_fwd_qrexec.relay.loop import Loop, Timer
from qubes_fwd_qrexec.system.outlet import Outlet

from .connecting import Connecting
from .localserver import CONNECT_TIMEOUT_S, HALF_CLOSE_S, ServiceError, addresses, not_connected
from .permissionwatch import PermissionLike, PermissionWatch
from .revocation import RevokedError
from .servers import Servers

# Messages may quote what another qube sent, and go to a log.
_MESSAGE_MAX = 200


def complain(outlet: Outlet, error: Exception, service: str = FORWARD_SERVICE) -> None:
    """Say on a call's stderr why it ends, for the caller, if that reads it."""
    outlet.say(f"{service}: {error}"[:_MESSAGE_MAX])


def status_of(error: Exception) -> ExitStatus:
    """The exit status that tells the caller of this error."""
    if isinstance(error, ServiceError):
        return error.status
    return ExitStatus.REVOKED if isinstance(error, RevokedError) else ExitStatus.TROUBLE


class SingleCall(Connecting):
    """One call, between ``stdin`` and ``stdout`` and the server of ``port``.

    ``over`` is called once, with the exit status, when nothing is watched any more and the connection to the
    server is closed. The call's sockets are the caller's.
    """

    def __init__(
        self,
        loop: Loop,
        relay: Relay,
        port: int,
        permission: PermissionLike,
        stdin: socket.socket,
        stdout: socket.socket,
        outlet: Outlet,
        over: Callable[[int], None],
    ) -> None:
        super().__init__(loop, port)
        self._relay = relay
        self._watch = PermissionWatch(loop, permission, self._revoked, end=self.fail)
        self._stdin = stdin
        self._stdout = stdout
        self._outlet = outlet
        self._over = over
        self._is_over = False
        self._server: socket.socket | None = None
        self._copies: tuple[Copy, ...] = ()
        self._open = 2
        self._down_over_at = 0.0
        self._half_closed: Timer | None = None
        self._has_lost = False

    def begin(self, servers: Servers) -> None:
        """Connect, unless dom0 has ended it already. Raises `ServiceError` if the port is refused."""
        where = addresses(servers, self._port)
        self.look()
        if not self._is_over:
            self.start(where)

    def look(self) -> None:
        """dom0 may have said something: end the call if it no longer allows it."""
        self._watch.look()

    def end(self, status: int = ExitStatus.TROUBLE) -> None:
        """End the call with this exit status, and its connection with an abort unless that is 0."""
        if self._is_over:
            return
        self._is_over = True
        self.give_up()
        self._watch.stop()
        if self._half_closed is not None:
            self._half_closed.cancel()
        for copy in self._copies:
            self._relay.stop(copy)
        if self._server is not None:
            (abort if status else close_cleanly)(self._server)
        self._over(status)

    def _revoked(self) -> None:
        self.end(ExitStatus.REVOKED)

    def fail(self) -> None:
        self.end()

    def _not_connected(self, trouble: OSError) -> None:
        error = not_connected(self._port, CONNECT_TIMEOUT_S, trouble)
        complain(self._outlet, error)
        self.end(error.status)

    def _connected(self, sock: socket.socket) -> None:
        self._server = sock
        up = Copy(self._stdin, sock, may_close=True)
        down = Copy(sock, self._stdout, looks=True)
        self._copies = up, down
        try:
            self._relay.start(up, self._upload_ended)
            self._relay.start(down, self._download_ended)
        except OSError as error:  # the kernel can watch no more sockets
            complain(self._outlet, error)
            self.end()

    def _upload_ended(self, how: CopyEnd) -> None:
        if how is CopyEnd.EOF:
            half_close(self._copies[0].sink)
        elif how is CopyEnd.SINK_BROKEN:
            self._has_lost = True  # what the server sent before is still delivered
        else:
            self.end()
            return
        self._one_way_less()

    def _download_ended(self, how: CopyEnd) -> None:
        if how is not CopyEnd.EOF:
            self.end(ExitStatus.SERVER_RESET if how is CopyEnd.SOURCE_RESET else ExitStatus.TROUBLE)
            return
        self._down_over_at = time.monotonic()
        self._outlet.say(clean_end(self._copies[1].moved))
        half_close(self._stdout)
        self._one_way_less()
        self._look_at_upload()

    def _one_way_less(self) -> None:
        self._open -= 1
        if not self._open:  # a server that ended its side first, and then took no more, has aborted
            self.end(ExitStatus.SERVER_RESET if self._has_lost else os.EX_OK)

    def _look_at_upload(self) -> None:
        """The server has ended its side. From then on the agent has no way left to end the call."""
        if self._is_over:
            return
        quiet_s = time.monotonic() - max(self._copies[0].moved_at, self._down_over_at)
        if quiet_s >= HALF_CLOSE_S:
            self.end()
        else:
            left_s = HALF_CLOSE_S - quiet_s
            self._half_closed = self._loop.after(left_s, self._look_at_upload, self.fail)
