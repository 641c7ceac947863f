# SPDX-License-Identifier: GPL-2.0-or-later
"""The program of the target: it connects a qrexec call to the port of the target that its argument names, by
TCP or by UDP.

An invalid argument is refused with exit status 2 before any byte is read.

The agent starts this program for each call, with two sockets as stdin and stdout, and reads its exit status.
It does not use trio: importing that would take longer than everything else that is done for a connection.
"""

import contextlib
import os
import signal
import socket
import stat
import sys
import time

from .common.allowance import Calls
from .common.errors import TextError
from .common.exitstatus import ExitStatus
from .common.services import FORWARD_SERVICE, UDP_SERVICE
from .common.values import Proto, parse_qube_name
from .relay.callsigns import GREETING, clean_end
from .relay.copy import Copy, CopyEnd, Relay, abort, close_cleanly, half_close
from .relay.loop import Loop
from .system.bugs import Bugs
from .system.bugs import leave as leave_bug
from .system.cleanstart import start_clean
from .system.outlet import Outlet
from .target.callnotes import Kind, RevocationError, directory
from .target.callstart import CallStartError, agent_pid, call_start
from .target.localserver import HALF_CLOSE_S, ServiceError, connect, parse_argument
from .target.permissionwatch import PermissionWatch, called_on_signals
from .target.revocation import LOOK, Permission, RevokedError, permitted

# Messages quote arguments of another qube, and go to a log.
_MESSAGE_MAX = 200
# What the file of the service qubes.ForwardUDP says in front of the call's argument; nothing then depends on
# how an agent names the service.
_UDP = "--udp"


class _Joined:
    """A call's two sockets joined with the server's one, until both directions have ended.

    A clean end is passed on as a half-close, and reported on ``outlet``. An abort of the server becomes an
    exit status, as qrexec has no other way to pass it on; an abort of the caller looks like a clean end
    (libqrexec/remote.c).
    """

    def __init__(
        self,
        stdin: socket.socket,
        stdout: socket.socket,
        server: socket.socket,
        permission: Permission,
        outlet: Outlet,
    ) -> None:
        self._loop = Loop(Bugs(_count_bug))
        self._watch = PermissionWatch(self._loop, permission, self._revoked, end=self._failed)
        self._outlet = outlet
        relay = Relay(self._loop)
        self._stdout = stdout
        self._server = server
        self._has_lost = False
        self._status: ExitStatus | None = None
        self._up = Copy(stdin, server, may_close=True)
        self._open = 2
        self._down_over_at = 0.0
        relay.start(self._up, self._upload_ended)
        self._down = Copy(server, stdout, looks=True)
        relay.start(self._down, self._download_ended)

    def run(self) -> int:
        """Run until both directions have ended or one is aborted. Returns the exit status."""
        with called_on_signals(self._loop, {LOOK: self._watch.look}, self._failed):
            self._watch.look()  # dom0 may have said something before the signals had handlers
            while self._open and self._status is None:
                self._loop.run_once()
        if self._status is None and self._has_lost:
            self._status = ExitStatus.SERVER_RESET  # it ended its side first, and then took no more
        if self._status is None:
            close_cleanly(self._server)
            return os.EX_OK
        abort(self._server)
        return self._status

    def _failed(self) -> None:
        self._status = ExitStatus.TROUBLE

    def _revoked(self) -> None:
        self._status = ExitStatus.REVOKED

    def _look_at_upload(self) -> None:
        """The server has ended its side. From then on the agent has no way left to end the call."""
        quiet_s = time.monotonic() - max(self._up.moved_at, self._down_over_at)
        if quiet_s >= HALF_CLOSE_S:
            self._failed()
        else:
            self._loop.after(HALF_CLOSE_S - quiet_s, self._look_at_upload, self._failed)

    def _upload_ended(self, how: CopyEnd) -> None:
        self._open -= 1
        if how is CopyEnd.EOF:
            half_close(self._server)
        elif how is not CopyEnd.SINK_BROKEN:
            self._status = ExitStatus.TROUBLE
        else:
            self._has_lost = True  # what the server sent before is still delivered

    def _download_ended(self, how: CopyEnd) -> None:
        self._open -= 1
        self._down_over_at = time.monotonic()
        if how is CopyEnd.EOF:
            self._outlet.say(clean_end(self._down.moved))
            half_close(self._stdout)
            self._look_at_upload()
        else:
            self._status = ExitStatus.SERVER_RESET if how is CopyEnd.SOURCE_RESET else ExitStatus.TROUBLE


def _standard_socket(fd: int) -> socket.socket:
    is_socket = False
    with contextlib.suppress(OSError):  # it is closed
        is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)
    if not is_socket:
        raise ServiceError(
            ExitStatus.BAD_ARGUMENT,
            f"file descriptor {fd} is not a socket; this program is started by qrexec",
        )
    sock = socket.socket(fileno=os.dup(fd))
    with open(os.devnull, "r+b", buffering=0) as nothing:
        os.dup2(nothing.fileno(), fd)  # otherwise the next socket would get its number
    sock.setblocking(False)
    return sock


def _count_bug() -> None:
    """Count a bug where `statusservice` finds it."""
    leave_bug(directory())


def _serve_call(arguments: list[str], proto: Proto = Proto.TCP) -> int:
    """Serve one call, whose argument is the only one, and whose sockets are stdin and stdout."""
    outlet = Outlet()
    try:
        request = parse_argument(arguments[0] if len(arguments) == 1 else "", proto)
        if not request.is_mux:
            outlet.say(GREETING)
        caller = parse_qube_name(os.environ.get("QREXEC_REMOTE_DOMAIN", ""))
        stdin, stdout = _standard_socket(0), _standard_socket(1)
        calls = Calls(request.ports, caller, proto)
        start = call_start(agent_pid(), stdin)
        signal.signal(LOOK, signal.SIG_IGN)  # until there is a loop, which looks first
        if proto is Proto.UDP:
            from .target import udpservice  # a call for one connection starts faster without these

            return udpservice.serve(calls, start, stdin, stdout)
        if request.is_mux:
            from .target import muxservice

            return muxservice.serve(calls, start, stdin, stdout)
        with permitted(Kind.SINGLE, calls, start, directory()) as permission:
            return _Joined(stdin, stdout, connect(request.ports.first), permission, outlet).run()
    except ServiceError as error:
        return _refuse(outlet, proto, error, error.status)
    except RevokedError as error:
        return _refuse(outlet, proto, error, ExitStatus.REVOKED)
    except (RevocationError, CallStartError, TextError) as error:
        return _refuse(outlet, proto, error, ExitStatus.TROUBLE)
    except Exception as bug:  # noqa: BLE001 - the caller only learns that it failed
        Bugs(_count_bug).note(bug)
        return ExitStatus.TROUBLE


def _refuse(outlet: Outlet, proto: Proto, error: Exception, status: ExitStatus) -> int:
    service = UDP_SERVICE if proto is Proto.UDP else FORWARD_SERVICE
    outlet.say(f"{service}: {error}"[:_MESSAGE_MAX])  # for the caller, if it reads stderr
    return status


def main(arguments: list[str] | None = None) -> int:
    """Serve one call; with ``--udp`` in front of its argument it is one of ``qubes.ForwardUDP``. With
    ``--socket`` or ``--activated`` serve all calls of ``qubes.ForwardTCP``. Returns the exit status.
    """
    start_clean()
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == [_UDP]:
        return _serve_call(arguments[1:], Proto.UDP)
    if arguments[:1] and arguments[0].startswith("--"):
        from .target import socketservice  # it needs trio

        return socketservice.main(arguments)
    return _serve_call(arguments)


if __name__ == "__main__":
    sys.exit(main())
