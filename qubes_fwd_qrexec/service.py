# SPDX-License-Identifier: GPL-2.0-or-later
"""The program of the target: it connects a qrexec call to the port of the target that its argument names, by
TCP or by UDP.

An invalid argument is refused with exit status 2 before any byte is read.

The agent starts this program for each call, with two sockets as stdin and stdout, and reads its exit status.
It does not use trio: importing that would take longer than everything else that is done for a connection. A
call for one connection comes here only where no process serves all of those (`singleservice`).
"""

import contextlib
import os
import signal
import socket
import stat
import sys

from .common.allowance import Calls
from .common.errors import TextError
from .common.exitstatus import ExitStatus
from .common.services import FORWARD_SERVICE, UDP_SERVICE
from .common.values import Proto, parse_qube_name
from .relay.callsigns import GREETING
from .relay.copy import Relay
from .relay.loop import Loop
from .system.bugs import Bugs
from .system.bugs import leave as leave_bug
from .system.cleanstart import start_clean
from .system.outlet import Outlet
from .target.callnotes import Kind, RevocationError, directory
from .target.callstart import AGENT_PID_VARIABLE, CallStartError, agent_pid, call_start
from .target.localserver import ServiceError, parse_argument
from .target.permissionwatch import called_on_signals
from .target.revocation import LOOK, Permission, permitted
from .target.servers import Servers
from .target.singlecall import SingleCall, complain, status_of

# Messages quote arguments of another qube, and go to a log.
_MESSAGE_MAX = 200
# What the file of the service qubes.ForwardUDP says in front of the call's argument; nothing then depends on
# how an agent names the service.
_UDP = "--udp"


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
        start = call_start(agent_pid(os.environ.get(AGENT_PID_VARIABLE, "")), stdin)
        signal.signal(LOOK, signal.SIG_IGN)  # until there is a loop, which looks first
        if proto is Proto.UDP:
            from .target import udpservice  # a call for one connection starts faster without these

            return udpservice.serve(calls, start, stdin, stdout)
        if request.is_mux:
            from .target import muxservice

            return muxservice.serve(calls, start, stdin, stdout)
        with permitted(Kind.SINGLE, calls, start, directory()) as permission:
            return _serve_single(request.ports.first, permission, stdin, stdout, outlet)
    except (ServiceError, RevocationError, CallStartError, TextError) as error:
        complain(outlet, error, UDP_SERVICE if proto is Proto.UDP else FORWARD_SERVICE)
        return status_of(error)
    except Exception as bug:  # noqa: BLE001 - the caller only learns that it failed
        Bugs(_count_bug).note(bug)
        return ExitStatus.TROUBLE


def _serve_single(
    port: int, permission: Permission, stdin: socket.socket, stdout: socket.socket, outlet: Outlet
) -> int:
    loop = Loop(Bugs(_count_bug))
    statuses: list[int] = []
    call = SingleCall(loop, Relay(loop), port, permission, stdin, stdout, outlet, statuses.append)
    with called_on_signals(loop, {LOOK: call.look}, call.fail):
        call.begin(Servers())
        while not statuses:
            loop.run_once()
    return statuses[0]


def main(arguments: list[str] | None = None) -> int:
    """Serve one call; with ``--udp`` in front of its argument it is one of ``qubes.ForwardUDP``. With
    ``--socket`` or ``--activated`` serve all calls for one connection. Returns the exit status.
    """
    start_clean()
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == [_UDP]:
        return _serve_call(arguments[1:], Proto.UDP)
    if arguments[:1] and arguments[0].startswith("--"):
        from .target import singleservice  # a program for one call starts faster without it

        return singleservice.main(arguments)
    return _serve_call(arguments)


if __name__ == "__main__":
    sys.exit(main())
