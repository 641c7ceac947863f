# SPDX-License-Identifier: GPL-2.0-or-later
"""The service of the target as one long-living process: a qrexec socket service.

The agent connects to its UNIX socket for each call, says whom the call is for
(``qubes.ForwardTCP+8080 sys-net`` and a NUL), and passes bytes both ways. That saves starting a
program for each connection. What is lost: a socket service has no exit status, the caller is told 0
whatever happens (qubes-core-qrexec agent/qrexec-agent-data.c). A refused connection or a server's
abort is a clean end of file for the client; where endings must be right, use `service`.
"""

import argparse
import errno
import logging
import os
import select
import signal
import socket
import stat
import sys
from pathlib import Path

import trio

from .accepting import accept_until_closed, close_listening
from .descriptors import raise_descriptor_limit
from .errors import ForwardError, leaves
from .localserver import (
    CONNECT_TIMEOUT_S,
    LOCALHOSTS,
    SERVICE,
    check_answered,
    new_socket,
    not_connected,
    parse_argument,
    prepare,
)
from .logs import RateLimit, start_logging, warn
from .relay import Copy, CopyEnd, abort, close_cleanly, half_close
from .relaythread import RelayThread, open_relay_thread

_logger = logging.getLogger(__name__)

# qubes-core-qrexec libqrexec/qrexec.h: service names have at most 64 + 64 characters, qubes' names 31.
DESCRIPTOR_MAX = 1024
# The agent sends it in one write, at once.
DESCRIPTOR_TIMEOUT_S = 5.0
# qrexec has 128 calls for each pair of qubes at most; several qubes may call.
CONNECTIONS_MAX = 512
DRAIN_S = 60.0
_BACKLOG = 128
# sd_listen_fds(3): the first descriptor that systemd passes.
_LISTEN_FD = 3


class SocketError(ForwardError):
    """There is no socket to listen on; the text says why."""


class DescriptorError(ForwardError):
    """What came before the bytes of a call is not the service descriptor that it should be."""


def parse_descriptor(untrusted_descriptor: bytes) -> tuple[int, str]:
    """The port and the calling qube, which is only for the log. Raises `ForwardError`."""
    try:
        service, _, source = untrusted_descriptor.decode("ascii").partition(" ")
    except UnicodeDecodeError:
        raise DescriptorError(f"descriptor {untrusted_descriptor!a} is not ASCII") from None
    name, plus, argument = service.partition("+")
    if name != SERVICE or not plus or not source:
        raise DescriptorError(f"descriptor {untrusted_descriptor!a} is not {SERVICE}+PORT QUBE")
    request = parse_argument(argument)
    if request.is_tunnel:
        raise DescriptorError(f"{service}: tunnels are served by a process each, and not here")
    return request.ports.first, source


async def read_descriptor(call: socket.socket) -> bytes:
    """Everything before the first NUL; what follows stays unread. Raises `DescriptorError`."""
    untrusted = b""
    while True:
        await trio.lowlevel.wait_readable(call)
        try:
            # A look first: a byte of the stream that is read with it could not be given back.
            peeked = call.recv(DESCRIPTOR_MAX - len(untrusted), socket.MSG_PEEK)
            end = peeked.find(0)
            untrusted += call.recv(len(peeked) if end < 0 else end + 1)
        except BlockingIOError:
            continue
        except OSError as error:
            raise DescriptorError(f"no descriptor: {error.strerror}") from error
        if end >= 0:
            return untrusted[:-1]
        if not peeked or len(untrusted) >= DESCRIPTOR_MAX:
            raise DescriptorError(f"no descriptor in the first {len(untrusted)} bytes")


async def connect(port: int, timeout_s: float = CONNECT_TIMEOUT_S) -> socket.socket:
    """As `localserver.connect`, beside other tasks."""
    trouble: OSError | None = None
    with trio.move_on_after(timeout_s):
        for family, host in LOCALHOSTS:
            try:
                return await _connect_to(family, host, port)
            except ConnectionResetError as error:  # it was there
                raise not_connected(port, timeout_s, error) from None
            except OSError as error:
                trouble = trouble or error
        raise not_connected(port, timeout_s, trouble)
    raise not_connected(port, timeout_s, trouble or TimeoutError(errno.ETIMEDOUT, "timed out"))


async def _connect_to(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    server = new_socket(family)
    try:
        prepare(server)
        try:
            server.connect((host, port))
        except BlockingIOError:
            await trio.lowlevel.wait_writable(server)
        check_answered(server, port)
    except BaseException:
        abort(server)
        raise
    return server


class ServiceServer:
    """Serves every call that comes to a listening socket, until `stop`."""

    def __init__(
        self, listening: socket.socket, *, connections_max: int = CONNECTIONS_MAX, drain_s: float = DRAIN_S
    ) -> None:
        self._listening = listening
        self._connections_max = connections_max
        self._drain_s = drain_s
        self._limit = RateLimit()
        self._calls = 0
        self._stopping = trio.Event()
        self._is_running = False
        self._relays: RelayThread
        self._tasks: trio.Nursery

    async def run(self, *, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
        """Accept until `stop`, then let calls finish, at most as long as the drain takes."""
        async with open_relay_thread() as self._relays, trio.open_nursery() as self._tasks:
            self._is_running = True
            try:
                self._tasks.start_soon(accept_until_closed, self._listening, self._accepted)
                task_status.started()
                await self._stopping.wait()
            finally:
                close_listening(self._listening, is_shared=True)  # with systemd, if that passed it
            self._tasks.cancel_scope.deadline = trio.current_time() + self._drain_s

    def stop(self) -> None:
        """Accept no more and let calls finish for a while; called again: abort them now."""
        if self._stopping.is_set() and self._is_running:
            self._tasks.cancel_scope.cancel()
        self._stopping.set()

    def _accepted(self, call: socket.socket) -> None:
        if self._calls >= self._connections_max:
            call.close()
            warn(_logger, self._limit, "full", f"refused a call: {self._connections_max} are under way")
            return
        self._calls += 1
        self._tasks.start_soon(self._serve, call)

    async def _serve(self, call: socket.socket) -> None:
        try:
            with trio.move_on_after(DESCRIPTOR_TIMEOUT_S) as reading:
                untrusted_descriptor = await read_descriptor(call)
            if reading.cancelled_caught:
                raise DescriptorError(f"no descriptor within {DESCRIPTOR_TIMEOUT_S:g} s")
            port, _ = parse_descriptor(untrusted_descriptor)
            await _join(call, await connect(port), self._relays)
        except ForwardError as error:
            warn(_logger, self._limit, type(error).__name__, f"refused a call: {error}")
        finally:
            self._calls -= 1
            call.close()


async def _join(call: socket.socket, server: socket.socket, relays: RelayThread) -> None:
    """Copy both ways until both are over, or one is aborted: then the other end is aborted too."""
    is_answered = False
    try:
        async with trio.open_nursery() as nursery:

            async def copy(source: socket.socket, sink: socket.socket) -> None:
                nonlocal is_answered
                try:
                    end = await relays.run(Copy(source, sink))
                except OSError:  # the kernel can watch no more sockets
                    end = CopyEnd.SOURCE_RESET
                if source is call and end is CopyEnd.EOF and not is_answered and _has_hung_up(call):
                    end = CopyEnd.SOURCE_RESET
                is_answered = is_answered or (source is server and end is CopyEnd.EOF)
                if end is CopyEnd.EOF:
                    half_close(sink)
                elif end is CopyEnd.SOURCE_RESET or sink is call:
                    nursery.cancel_scope.cancel()
                # else the server takes no more, and what it had sent before is still delivered

            nursery.start_soon(copy, call, server)
            await copy(server, call)
        if not nursery.cancel_scope.cancel_called:
            close_cleanly(server)
    finally:
        abort(server)


def _has_hung_up(call: socket.socket) -> bool:
    """Whether the agent has ended both ways at once, as it does when the caller or the link is gone."""
    poll = select.poll()
    poll.register(call, 0)
    return bool(poll.poll(0))


def listen_on(path: Path) -> socket.socket:
    """A UNIX socket of our own, in the place of one that an earlier process left. Raises `SocketError`."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_left_over(path):
            path.unlink()
        listening.bind(str(path))
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise SocketError(f"{path}: {error.strerror or error}") from error
    listening.setblocking(False)
    return listening


def _is_left_over(path: Path) -> bool:
    """A socket that nobody listens on. Anything else is somebody's, and stays."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(str(path))
    except ConnectionRefusedError:
        return True
    except FileNotFoundError:
        return False
    return False


def take_activated() -> socket.socket:
    """The one listening socket that systemd passed to this very process. Raises `SocketError`."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        raise SocketError("LISTEN_PID is not this process; --activated is for a systemd socket unit")
    if os.environ.get("LISTEN_FDS") != "1":
        raise SocketError("LISTEN_FDS is not 1; one ListenStream= in the socket unit would be right")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)  # nobody who is started by us may think they are meant
    try:
        return adopt(_LISTEN_FD)
    except OSError as error:
        raise SocketError(f"file descriptor {_LISTEN_FD}: {error.strerror}") from error


def adopt(fd: int) -> socket.socket:
    """Take over a listening UNIX stream socket. Raises `SocketError`, OSError where it is no socket."""
    listening = socket.socket(fileno=fd)
    is_right = (
        listening.family == socket.AF_UNIX
        and listening.type == socket.SOCK_STREAM
        and listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    )
    if not is_right:
        listening.close()
        raise SocketError(f"file descriptor {fd} is not a listening UNIX stream socket")
    listening.set_inheritable(False)
    listening.setblocking(False)
    return listening


async def _main(listening: socket.socket) -> None:
    server = ServiceServer(listening)
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:

            async def obey() -> None:
                async for _ in signals:
                    server.stop()

            nursery.start_soon(obey)
            await server.run()
            nursery.cancel_scope.cancel()


def main(arguments: list[str]) -> int:
    """``--socket PATH`` or ``--activated``; until SIGTERM. Returns the exit status."""
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
