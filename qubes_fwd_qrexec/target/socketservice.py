# SPDX-License-Identifier: GPL-2.0-or-later
"""The service of the target as one long-running process: a qrexec socket service.

For each call the agent connects to its UNIX socket, sends the service descriptor (``qubes.ForwardTCP+8080
sys-net`` and a NUL), and passes bytes both ways. That saves starting a program for each connection. The
price: a socket service has no exit status, and the caller always gets 0 (qubes-core-qrexec
agent/qrexec-agent-data.c). So a refused connection, or an abort of the server, is a clean end of file for
the client. Where endings must be exact, use `service`.

The socket serves all arguments of the service, so mux calls come here, too. Each is handed to a process of
its own, as if the agent had started it. Its memory is bounded by itself, and the protocol carries endings,
so that it needs no exit status.

The kernel says which process of the agent has connected, and so when dom0 allowed the call. Each call has its
note (`callnotes`), and on SIGUSR1 this process checks which calls dom0 still allows.
"""

import argparse
import errno
import itertools
import logging
import math
import os
import select
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path

import trio

from qubes_fwd_qrexec.common.allowance import Calls
from qubes_fwd_qrexec.common.errors import ForwardError, RefusedError, leaves
from qubes_fwd_qrexec.common.exitstatus import meaning
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.relay.acceptloop import accept_until_closed, close_listening
from qubes_fwd_qrexec.relay.copy import Copy, CopyEnd, abort, close_cleanly, half_close
from qubes_fwd_qrexec.relay.thread import RelayThread, open_relay_thread
from qubes_fwd_qrexec.system.bugs import Bugs
from qubes_fwd_qrexec.system.bugs import leave as leave_bug
from qubes_fwd_qrexec.system.descriptors import raise_descriptor_limit
from qubes_fwd_qrexec.system.logs import RateLimit, start_logging, warn
from qubes_fwd_qrexec.system.notify import notify

from .callnotes import Kind, directory
from .callstart import AGENT_PID_VARIABLE, call_start, peer_pid
from .localserver import (
    CONNECT_TIMEOUT_S,
    HALF_CLOSE_S,
    RETRY_S,
    addresses,
    check_answered,
    is_begun,
    new_socket,
    not_connected,
)
from .portions import VARIABLE, Portions
from .revocation import LOOK, Permission, permitted
from .servers import ServerAddress, Servers
from .servicesocket import (
    DESCRIPTOR_TIMEOUT_S,
    DescriptorError,
    listen_on,
    parse_descriptor,
    read_descriptor,
    take_activated,
)

_logger = logging.getLogger(__name__)

# qrexec allows 128 calls for each pair of qubes; several qubes may call.
CONNECTIONS_MAX = 512
DRAIN_S = 60.0
# How long a mux call may take to end before it is killed.
_MUX_END_S = 2.0
# trio's clock stops while the machine is suspended, but the deadline of a drain does not.
_LOOK_AT_DRAINS_S = 30.0
# Tells `callservice` to take no more streams.
_TAKE_NO_MORE = signal.SIGUSR2


async def connect(
    port: int, timeout_s: float = CONNECT_TIMEOUT_S, servers: Servers | None = None
) -> socket.socket:
    """Like `localserver.connect`, in a trio task."""
    trouble: OSError | None = None
    with trio.move_on_after(timeout_s):
        for address in addresses(servers or Servers(), port):
            try:
                return await _connect_to(address, port)
            except ConnectionResetError as error:  # it was there
                raise not_connected(port, timeout_s, error) from None
            except OSError as error:
                trouble = trouble or error
        raise not_connected(port, timeout_s, trouble)
    raise not_connected(port, timeout_s, trouble or TimeoutError(errno.ETIMEDOUT, "timed out"))


async def _connect_to(address: ServerAddress, port: int) -> socket.socket:
    server = new_socket(address.family)
    try:
        while not is_begun(server, address, port):  # noqa: ASYNC110 - there is no event for it
            await trio.sleep(RETRY_S)
        await trio.lowlevel.wait_writable(server)
        check_answered(server, port)
    except BaseException:
        abort(server)
        raise
    return server


class ServiceServer:
    """Serves all calls to a listening socket, until `stop`."""

    def __init__(
        self,
        listening: socket.socket,
        *,
        connections_max: int = CONNECTIONS_MAX,
        drain_s: float = DRAIN_S,
        descriptor_s: float = DESCRIPTOR_TIMEOUT_S,
    ) -> None:
        self._listening = listening
        self._connections_max = connections_max
        self._drain_s = drain_s
        self._descriptor_s = descriptor_s
        self._limit = RateLimit()
        self._bugs = Bugs(partial(leave_bug, directory()))
        self.calls = 0
        self._portions = Portions()
        self._numbers = itertools.count(1)
        self._servers = Servers()
        self._singles: dict[int, tuple[Permission, trio.CancelScope]] = {}
        self.mux_calls: set[trio.Process] = set()
        self._stopping = trio.Event()
        self._is_running = False
        self._relays: RelayThread
        self._tasks: trio.Nursery

    async def run(self, *, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
        """Accept calls until `stop`, then let them finish for at most ``drain_s`` seconds."""
        async with open_relay_thread(self._bugs) as self._relays, trio.open_nursery() as background:
            background.start_soon(self._look_at_drains)
            async with trio.open_nursery() as self._tasks:
                self._is_running = True
                try:
                    self._tasks.start_soon(
                        accept_until_closed, self._listening, self._accepted, self._limit, self._bugs
                    )
                    task_status.started()
                    notify("READY=1")
                    await self._stopping.wait()
                finally:
                    notify("STOPPING=1")
                    close_listening(self._listening, is_shared=True)  # with systemd, if that passed it
                for mux_call in self.mux_calls:
                    mux_call.send_signal(_TAKE_NO_MORE)
                self._tasks.cancel_scope.deadline = trio.current_time() + self._drain_s
            background.cancel_scope.cancel()

    def stop(self) -> None:
        """Accept no more and let calls finish for a while; called again: abort them now."""
        if self._stopping.is_set() and self._is_running:
            self._tasks.cancel_scope.cancel()
        self._stopping.set()

    def look(self) -> None:
        """dom0 has sent a new list of what it allows: end single calls that are not in it."""
        for permission, scope in tuple(self._singles.values()):
            _hold_to(permission, scope)

    async def _look_at_drains(self) -> None:
        while True:
            await trio.sleep(_LOOK_AT_DRAINS_S)
            for permission, scope in tuple(self._singles.values()):
                if permission.drain_left_s is not None:
                    _hold_to(permission, scope)

    def _accepted(self, call: socket.socket) -> None:
        if self.calls >= self._connections_max:
            call.close()
            warn(_logger, self._limit, "full", f"refused a call: {self._connections_max} are under way")
            return
        self.calls += 1
        self._tasks.start_soon(self._serve, call)

    async def _serve(self, call: socket.socket) -> None:
        try:
            with trio.move_on_after(self._descriptor_s) as reading:
                untrusted_descriptor = await read_descriptor(call)
            if reading.cancelled_caught:
                raise DescriptorError(f"no descriptor within {self._descriptor_s:g} s")
            argument, request, caller = parse_descriptor(untrusted_descriptor)
            if request.is_mux:
                await self._hand_over(call, argument, caller)
            else:
                await self._serve_single(call, Calls(request.ports, caller))
        except ForwardError as error:
            warn(_logger, self._limit, type(error).__name__, f"refused a call: {error}")
        except Exception as bug:
            if self._relays.has_failed:
                raise
            self._bugs.note(bug)
        finally:
            self.calls -= 1
            call.close()

    async def _serve_single(self, call: socket.socket, calls: Calls) -> None:
        start = call_start(peer_pid(call), call)
        number = next(self._numbers)
        with (
            permitted(Kind.SINGLE, calls, start, directory(), number) as permission,
            trio.CancelScope() as scope,
        ):
            self._singles[number] = permission, scope
            try:
                _hold_to(permission, scope)  # dom0 may have sent a list before this call was in `_singles`
                await _join(call, await connect(calls.ports.first, servers=self._servers), self._relays)
            finally:
                del self._singles[number]

    async def _hand_over(self, call: socket.socket, argument: str, caller: QubeName) -> None:
        """Have a process serve a mux call until its end; if cancelled, it gets SIGTERM."""
        if self._stopping.is_set():
            raise RefusedError("a mux call came too late: this server is ending")
        with self._portions.taken(caller, argument) as parts:
            await self._serve_in_process(call, argument, caller, parts)

    async def _serve_in_process(
        self, call: socket.socket, argument: str, caller: QubeName, parts: int
    ) -> None:
        command = [sys.executable, "-I", "-m", "qubes_fwd_qrexec.service", argument]
        environment = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"} | {
            "QREXEC_REMOTE_DOMAIN": caller,
            AGENT_PID_VARIABLE: str(peer_pid(call)),
            VARIABLE: str(parts),
        }
        try:
            # stderr is that of this process: why a port is refused belongs in its log.
            process = await trio.lowlevel.open_process(
                command, stdin=call.fileno(), stdout=call.fileno(), env=environment
            )
        except OSError as error:
            raise RefusedError(f"no process for a mux call: {error.strerror}") from error
        call.close()  # it ends with the process
        self.mux_calls.add(process)
        try:
            status = await process.wait()
        finally:
            self.mux_calls.discard(process)
            await _end(process)
        if status != os.EX_OK:
            warn(_logger, self._limit, "mux", f"a mux call of {caller} ended: {meaning(status)}")


def _hold_to(permission: Permission, scope: trio.CancelScope) -> None:
    """End the call if dom0 no longer allows it, or at its deadline if it drains."""
    is_allowed = permission.look()
    left_s = permission.drain_left_s
    if not is_allowed or left_s == 0:
        scope.cancel()
    else:
        scope.deadline = math.inf if left_s is None else trio.current_time() + left_s


async def _end(process: trio.Process) -> None:
    """Ask a process to end, and kill it if it does not."""
    with trio.CancelScope(shield=True):
        if process.returncode is None:
            process.terminate()
            with trio.move_on_after(_MUX_END_S):
                await process.wait()
            process.kill()
            await process.wait()


async def _join(call: socket.socket, server: socket.socket, relays: RelayThread) -> None:
    """Copy both ways until both have ended, or one end aborts: then abort the other end, too."""
    is_answered = False
    try:
        async with trio.open_nursery() as nursery:

            async def copy(copied: Copy) -> None:
                nonlocal is_answered
                source, sink = copied.source, copied.sink
                try:
                    end = await relays.run(copied)
                except OSError:  # the kernel can watch no more sockets
                    end = CopyEnd.SOURCE_RESET
                if source is call and end is CopyEnd.EOF and not is_answered and _has_hung_up(call):
                    end = CopyEnd.SOURCE_RESET
                is_answered = is_answered or (source is server and end is CopyEnd.EOF)
                if end is CopyEnd.EOF:
                    half_close(sink)
                elif end is not CopyEnd.SINK_BROKEN or sink is call:
                    nursery.cancel_scope.cancel()
                # else the server takes no more, but what it sent before is still delivered

            async def upload() -> None:
                await copy(up)
                waiting.cancel()

            up, waiting = Copy(call, server, may_close=True), trio.CancelScope()
            nursery.start_soon(upload)
            await copy(Copy(server, call, looks=True))
            with waiting:
                await _stands_still(up)
                nursery.cancel_scope.cancel()
        if not nursery.cancel_scope.cancel_called:
            close_cleanly(server)
    finally:
        abort(server)


async def _stands_still(copy: Copy) -> None:
    """Return once nothing has moved for too long: the agent may have no way left to end the call."""
    began = time.monotonic()
    while True:
        quiet_s = time.monotonic() - max(began, copy.moved_at)
        if quiet_s >= HALF_CLOSE_S:
            return
        await trio.sleep(HALF_CLOSE_S - quiet_s)


def _has_hung_up(call: socket.socket) -> bool:
    """Whether the agent closed both ways at once, as it does when the caller or the link is gone."""
    poll = select.poll()
    poll.register(call, 0)
    return bool(poll.poll(0))


async def _main(listening: socket.socket) -> None:
    server = ServiceServer(listening)
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, LOOK) as signals:

            async def obey() -> None:
                async for number in signals:
                    if number == LOOK:
                        server.look()
                    else:
                        server.stop()

            nursery.start_soon(obey)
            await server.run()
            nursery.cancel_scope.cancel()


def main(arguments: list[str]) -> int:
    """Run with ``--socket PATH`` or ``--activated`` until SIGTERM. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="qubes-forward-service", description="Serve all calls of qubes.ForwardTCP in one process."
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--socket", type=Path, metavar="PATH", help="make and listen on this UNIX socket")
    where.add_argument("--activated", action="store_true", help="listen on the socket that systemd passes")
    args = parser.parse_args(arguments)
    start_logging()
    raise_descriptor_limit()
    status = 0
    try:
        listening = take_activated() if args.activated else listen_on(args.socket)
        trio.run(_main, listening, strict_exception_groups=True)
    except* ForwardError as errors:
        for error in leaves(errors):
            _logger.error("%s", error)
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
