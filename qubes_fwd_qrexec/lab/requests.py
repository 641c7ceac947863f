# SPDX-License-Identifier: GPL-2.0-or-later
"""What comes to an agent's socket: a client's request, its descriptors, and the end of the client.

It decides nothing about a call, but refuses what no client stand-in sends.
"""

import array
import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import trio

from qubes_fwd_qrexec.common.errors import StoreError
from qubes_fwd_qrexec.system.unixsockets import socket_address

from . import wire
from .evaluator import Request
from .join import CallerEnds

# Everything else becomes an underscore: docs/facts.md, Q18.
_NOT_IN_SERVICE = re.compile(r"[^A-Za-z0-9@_.+-]", re.ASCII)
_NOT_IN_TARGET = re.compile(r"[^A-Za-z0-9@:_.-]", re.ASCII)
_BACKLOG = 128
# One client brings two descriptors at most; room for a few more, so that a surplus is seen and closed.
_ANCILLARY_BYTES = socket.CMSG_SPACE(8 * 4)


class CallRefusedError(Exception):
    """The call ends as a refused one does: the caller's status is 126 and its bytes are not looked at."""


@contextmanager
def bind_packets(path: Path) -> Iterator[trio.socket.SocketType]:
    """A listening SOCK_SEQPACKET socket at ``path`` for the length of a block; raises `StoreError`."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        try:
            with socket_address(path) as address:
                sock.bind(address)
            sock.listen(_BACKLOG)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror}") from error
        try:
            with trio.socket.from_stdlib_socket(sock) as listener:
                yield listener
        finally:
            path.unlink(missing_ok=True)


def parse_request(source: str, call: wire.Call) -> Request:
    """A caller's request, sanitized as the daemons do it; raises `CallRefusedError`."""
    if call.source:
        raise CallRefusedError(f"{call.source!a} as the source: a lab has no RemoteVM")
    name, plus, argument = _NOT_IN_SERVICE.sub("_", call.service).partition("+")
    if not name:
        raise CallRefusedError("no service is named")
    return Request(
        service=name,
        argument=plus + argument or "+",
        source=source,
        target=_NOT_IN_TARGET.sub("_", call.target),
    )


async def receive_call(agent: trio.socket.SocketType) -> tuple[wire.Call, CallerEnds]:
    """Raises `CallRefusedError` for what no client stand-in sends."""
    untrusted_packet, ancillary, _, _ = await agent.recvmsg(
        wire.CALL_MAX, _ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
    )
    sockets: list[socket.socket] = []
    with ExitStack() as undo:
        fds = array.array("i")
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        for fd in fds:
            try:
                sockets.append(undo.enter_context(socket.socket(fileno=fd)))
            except OSError:
                undo.callback(os.close, fd)
        if len(sockets) != len(fds) or len(fds) not in (1, 2):
            raise CallRefusedError("the client must bring one or two sockets")
        if any(sock.type != socket.SOCK_STREAM for sock in sockets):
            raise CallRefusedError("the client's sockets must be streams")
        try:
            call = wire.Call.decode(untrusted_packet)
        except ValueError as error:
            raise CallRefusedError("the client's request is garbled") from error
        undo.pop_all()
    return call, CallerEnds(sockets)


async def cancel_at_end(agent: trio.socket.SocketType, scope: trio.CancelScope) -> None:
    """Cancel the call when its client is gone, and the vchan with it. A client sends nothing after its
    request, so whatever arrives means that.
    """
    with suppress(OSError):
        await agent.recv(1)
    scope.cancel()


async def send_quietly(agent: trio.socket.SocketType, packet: bytes) -> None:
    with suppress(OSError):  # a client that is gone is noticed by `cancel_at_end`
        await agent.send(packet)
