# SPDX-License-Identifier: GPL-2.0-or-later
"""The program of the target: a qrexec call's argument in, a connection to the target's own server out.

The argument alone says what may be reached, so that dom0's policy covers it: ``8080`` is port 8080 of
127.0.0.1, or of ::1 where 127.0.0.1 refuses, and nothing else. An argument that is not exactly that is
refused with exit status 2 before a byte is read.

The agent starts this program for each call, with two sockets as stdin and stdout, and reads its exit
status. It uses no trio: importing it would take longer than all else that is done for a connection.
"""

import os
import socket
import stat
import sys
import time

from .errors import ForwardError, TextError
from .exitstatus import ExitStatus
from .relay import Copy, CopyEnd, RelayLoop, abort, half_close
from .values import parse_port

SERVICE = "qubes.ForwardTCP"
# Where a server in the target may listen; tried in this order, and nowhere else.
LOCALHOSTS = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
# relay-behaviours 22: how long a server may take to accept.
CONNECT_TIMEOUT_S = 10.0


class ServiceError(ForwardError):
    """The call cannot be served; ``status`` is what the caller's qrexec client will exit with."""

    def __init__(self, status: ExitStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


def parse_argument(untrusted_argument: str) -> int:
    """The one port that a call may reach. Raises `ServiceError` with exit status 2 for all else."""
    if untrusted_argument.endswith("+tunnel"):
        raise ServiceError(ExitStatus.BAD_ARGUMENT, "tunnels are not in this version of the service")
    try:
        return parse_port(untrusted_argument)
    except TextError as error:
        raise ServiceError(ExitStatus.BAD_ARGUMENT, f"argument {error}") from None


def connect(port: int, timeout_s: float = CONNECT_TIMEOUT_S) -> socket.socket:
    """A non-blocking connection to the target's own server. Raises `ServiceError`."""
    deadline = time.monotonic() + timeout_s
    trouble: OSError | None = None
    for family, host in LOCALHOSTS:
        try:
            server = socket.socket(family, socket.SOCK_STREAM)
        except OSError:  # no IPv6 here
            continue
        try:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            server.connect((host, port))
        except OSError as error:
            server.close()
            trouble = trouble or error
        else:
            server.setblocking(False)
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return server
    if isinstance(trouble, TimeoutError):
        raise ServiceError(ExitStatus.SERVER_TIMEOUT, f"port {port}: no answer within {timeout_s:g} s")
    reason = trouble.strerror if trouble else "no IP at all"
    raise ServiceError(ExitStatus.SERVER_REFUSED, f"port {port}: {reason}")


class _Joined:
    """A call's two sockets and the server's one, joined until both directions are over.

    A clean end passes on as a half-close. The server's abort becomes an exit status, since qrexec has
    no other way to tell; the caller's abort cannot be told from a clean end (libqrexec/remote.c).
    """

    def __init__(self, stdin: socket.socket, stdout: socket.socket, server: socket.socket) -> None:
        self._loop = RelayLoop()
        self._stdout = stdout
        self._server = server
        self._open = 2
        self._status: ExitStatus | None = None
        self._loop.start(Copy(stdin, server), self._upload_ended)
        self._loop.start(Copy(server, stdout), self._download_ended)

    def run(self) -> int:
        """Until both directions are over, or one of them is aborted; the exit status that tells."""
        while self._open and self._status is None:
            self._loop.run_once()
        if self._status is None:
            self._server.close()
            return os.EX_OK
        abort(self._server)
        return self._status

    def _upload_ended(self, how: CopyEnd) -> None:
        self._open -= 1
        if how is CopyEnd.EOF:
            half_close(self._server)
        elif how is CopyEnd.SOURCE_RESET:
            self._status = ExitStatus.TROUBLE
        elif not self._open:  # the server took no more after its own end: an abort, if a late one
            self._status = ExitStatus.SERVER_RESET

    def _download_ended(self, how: CopyEnd) -> None:
        self._open -= 1
        if how is CopyEnd.EOF:
            half_close(self._stdout)
        else:
            self._status = ExitStatus.SERVER_RESET if how is CopyEnd.SOURCE_RESET else ExitStatus.TROUBLE


def _standard_socket(fd: int) -> socket.socket:
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        raise ServiceError(
            ExitStatus.BAD_ARGUMENT, f"file descriptor {fd} is no socket; this program is started by qrexec"
        )
    sock = socket.socket(fileno=os.dup(fd))
    os.close(fd)
    sock.setblocking(False)
    return sock


def main() -> int:
    """Serve one call: ``argv[1]`` is its argument, stdin and stdout are its sockets."""
    try:
        port = parse_argument(sys.argv[1] if len(sys.argv) == 2 else "")
        stdin, stdout = _standard_socket(0), _standard_socket(1)
        server = connect(port)
    except ServiceError as error:
        print(f"{SERVICE}: {error}", file=sys.stderr)
        return error.status
    return _Joined(stdin, stdout, server).run()


if __name__ == "__main__":
    sys.exit(main())
