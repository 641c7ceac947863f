# SPDX-License-Identifier: GPL-2.0-or-later
"""One process for all calls for one connection, as starting a program for each takes longer than the rest.

What the agent starts for a call is a small program (handover/), which passes the call's stdin, stdout and
stderr to this process and waits for the exit status. So the agent sees what it would see of a program that
serves the call alone, with every ending as it is. systemd starts this process at the first call, and it ends
when there was none for a while.

Each call has its note (`callnotes`), and on SIGUSR1 this process checks which calls dom0 still allows. A bug
ends the call that it happens to.
"""

import argparse
import logging
import math
import os
import signal
import socket
import sys
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from qubes_fwd_qrexec.common.allowance import Calls
from qubes_fwd_qrexec.common.errors import ForwardError
from qubes_fwd_qrexec.common.exitstatus import ExitStatus
from qubes_fwd_qrexec.common.values import parse_qube_name
from qubes_fwd_qrexec.relay.callsigns import GREETING
from qubes_fwd_qrexec.relay.copy import Relay
from qubes_fwd_qrexec.relay.loop import READ, Loop, Timer
from qubes_fwd_qrexec.system.bugs import Bugs
from qubes_fwd_qrexec.system.bugs import leave as leave_bug
from qubes_fwd_qrexec.system.descriptors import raise_descriptor_limit
from qubes_fwd_qrexec.system.logs import RateLimit, start_logging, warn
from qubes_fwd_qrexec.system.notify import notify
from qubes_fwd_qrexec.system.outlet import Outlet

from .callnotes import Kind, directory
from .callstart import agent_pid, call_start
from .handover import Handed, HandoverError, SocketError, listen_on, receive, take_activated
from .localserver import ServiceError, parse_argument
from .permissionwatch import called_on_signals
from .revocation import LOOK, permitted
from .servers import Servers
from .singlecall import SingleCall, complain, status_of

_logger = logging.getLogger(__name__)

# qrexec allows some 127 calls at once to a qube (docs/facts.md, Q1).
CALLS_MAX = 512
DRAIN_S = 60.0
# Without a call for so long, a process that systemd has started ends; it starts the next one.
IDLE_S = 300.0
# The program sends everything in one message, at once.
HANDOVER_S = 5.0
# docs/behaviours.md, 34: how long to take no call after one could not be taken.
_PAUSE_S = 0.5


class _Handed:
    """A call from the program's connection to its exit status."""

    def __init__(self, service: "SingleService", control: socket.socket, number: int) -> None:
        self._service = service
        self._control = control
        self._number = number
        self._held = ExitStack()
        self._call: SingleCall | None = None
        self._patience: Timer | None = None

    def start(self) -> None:
        """Take the call, or wait for it."""
        try:
            self._service.loop.watch_for(self, self._control.fileno(), READ)
        except OSError as error:  # the kernel can watch no more
            self._control.close()
            self._service.warn(f"refused a call: {error.strerror}")
            self._service.forget(self._number)
            return
        self._patience = self._service.loop.after(HANDOVER_S, self.fail, self.fail)
        self.on_ready(READ)

    def on_ready(self, _events: int) -> None:
        """The call is here; or the program is gone, and with it everybody who waits for the status."""
        if self._call is not None:
            self._call.end()
            return
        try:
            handed = receive(self._control)
        except BlockingIOError:
            return
        except HandoverError as error:
            self._service.warn(f"refused a call: {error}")
            self.over(ExitStatus.TROUBLE)
            return
        if handed is None:  # the program is gone
            self.over(ExitStatus.TROUBLE)
            return
        self._held.enter_context(handed)
        self._stop_waiting()
        outlet = Outlet(handed.stderr)
        outlet.say(GREETING)
        try:
            self._begin(handed, outlet)
        except ForwardError as error:
            complain(outlet, error)
            self.over(status_of(error))

    def _begin(self, handed: Handed, outlet: Outlet) -> None:
        untrusted_argument, untrusted_caller, agent = handed.untrusted_words
        ports, is_mux = parse_argument(untrusted_argument)
        if is_mux:
            raise ServiceError(ExitStatus.BAD_ARGUMENT, "a mux call has a process of its own")
        calls = Calls(ports, parse_qube_name(untrusted_caller))
        stdin, stdout = handed.sockets()
        start = call_start(agent_pid(agent), stdin)
        allowed = permitted(Kind.SINGLE, calls, start, directory(), self._number)
        permission = self._held.enter_context(allowed)
        service = self._service
        self._call = SingleCall(
            service.loop, service.relay, ports.first, permission, stdin, stdout, outlet, self.over
        )
        service.loop.change(self._control.fileno(), 0)  # only its end is of interest from now on
        self._call.begin(service.servers)

    def look(self) -> None:
        """dom0 has sent a new list of what it allows."""
        if self._call is not None:
            self._call.look()

    def fail(self) -> None:
        """End it, whatever state it is in."""
        if self._call is not None:
            self._call.end()
        else:
            self.over(ExitStatus.TROUBLE)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()

    def over(self, status: int) -> None:
        """Let go of everything, and tell the program."""
        if self._control.fileno() < 0:
            return
        self._stop_waiting()
        self._service.loop.unwatch(self._control.fileno())
        self._held.close()
        with suppress(OSError):  # it is gone
            self._control.send(bytes([status]))
        self._control.close()
        self._service.forget(self._number)


class SingleService:
    """Serves what is handed over on a listening socket, until `stop`."""

    def __init__(
        self,
        listening: socket.socket,
        *,
        calls_max: int = CALLS_MAX,
        drain_s: float = DRAIN_S,
        idle_s: float = math.inf,
    ) -> None:
        """``idle_s``: it stops when it has had no call for so long."""
        self.loop = Loop(Bugs(partial(leave_bug, directory())))
        self.relay = Relay(self.loop)
        self.servers = Servers()
        self._listening = listening
        self._calls_max = calls_max
        self._drain_s = drain_s
        self._idle_s = idle_s
        self._idle: Timer | None = None
        self._is_stopping = False
        self._limit = RateLimit()
        self._calls: dict[int, _Handed] = {}
        self._last = 0
        self.loop.watch(listening.fileno(), READ, self._accept, self.stop)
        self._rest()

    def run(self) -> None:
        """Serve until `stop`, and then until every call has ended, or for ``drain_s`` seconds."""
        meanings = {LOOK: self._look, signal.SIGTERM: self.stop, signal.SIGINT: self.stop}
        with called_on_signals(self.loop, meanings, self.stop):
            notify("READY=1")
            while self._calls or not self._is_stopping:
                self.loop.run_once()
        self.loop.close()

    def stop(self) -> None:
        """Take no more, and let calls finish for a while; called again: abort them now."""
        if self._is_stopping:
            self._abort_all()
            return
        self._is_stopping = True
        notify("STOPPING=1")
        self.loop.unwatch(self._listening.fileno())
        self._listening.close()
        self.loop.after(self._drain_s, self._abort_all, self._abort_all)

    def warn(self, text: str) -> None:
        warn(_logger, self._limit, "refused", text)

    def forget(self, number: int) -> None:
        """A call is over."""
        self._calls.pop(number, None)
        if not self._calls:
            self._rest()

    def _rest(self) -> None:
        if self._idle_s < math.inf and not self._is_stopping:
            self._idle = self.loop.after(self._idle_s, self.stop, self.stop)

    def _look(self) -> None:
        for handed in tuple(self._calls.values()):
            self.loop.guarded(handed.fail, handed.look)

    def _abort_all(self) -> None:
        for handed in tuple(self._calls.values()):
            self.loop.guarded(handed.fail, handed.fail)

    def _accept(self, _events: int) -> None:
        try:
            control, _ = self._listening.accept()
        except BlockingIOError:
            return
        except OSError as error:
            self.warn(f"no call can be taken: {error.strerror}")
            self.loop.change(self._listening.fileno(), 0)
            self.loop.after(_PAUSE_S, self._go_on, self.stop)
            return
        if len(self._calls) >= self._calls_max:
            control.close()
            self.warn(f"refused a call: {self._calls_max} are under way")
            return
        if self._idle is not None:
            self._idle.cancel()
        control.setblocking(False)
        self._last += 1
        handed = self._calls[self._last] = _Handed(self, control, self._last)
        self.loop.guarded(handed.fail, handed.start)

    def _go_on(self) -> None:
        if not self._is_stopping:
            self.loop.change(self._listening.fileno(), READ)


def main(arguments: list[str]) -> int:
    """Run with ``--socket PATH`` or ``--activated`` until SIGTERM. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="qubes-forward-service", description="Serve all calls for one connection in one process."
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--socket", type=Path, metavar="PATH", help="make and listen on this UNIX socket")
    where.add_argument("--activated", action="store_true", help="listen on the socket that systemd passes")
    args = parser.parse_args(arguments)
    start_logging()
    raise_descriptor_limit()
    try:
        listening = take_activated() if args.activated else listen_on(args.socket)
    except SocketError as error:
        _logger.error("%s", error)
        return 1
    SingleService(listening, idle_s=IDLE_S if args.activated else math.inf).run()
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
