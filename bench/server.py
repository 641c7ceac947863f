# SPDX-License-Identifier: GPL-2.0-or-later
"""The server behind every peer: one thread and one epoll, so that it is no peer's bottleneck.

The first byte of a connection says what it is for: ``e`` is echoed, and so is all that follows;
``u`` and eight bytes of length: that many bytes are read and then acknowledged by one; ``d`` and a
length: that many bytes are sent. No ending is part of it, since peers differ in what they do to endings.
A datagram that begins with ``e`` is sent back, and others are taken.

``python -m bench.server [HOST PORT]``: without, a port of 127.0.0.1 that is free.
"""

import json
import os
import select
import socket
import sys
from collections.abc import Callable
from contextlib import suppress

from qubes_fwd_qrexec.system.descriptors import raise_descriptor_limit

ECHO, UPLOAD, DOWNLOAD = b"e", b"u", b"d"
LENGTH_BYTES = 8
_BUFFER_BYTES = 1 << 20


class _Connection:
    __slots__ = ("head", "rest", "sock", "to_read", "to_send")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.head = b""
        # Of an echo, what the socket has not taken yet. Nothing is read meanwhile.
        self.rest = b""
        self.to_read = 0
        self.to_send = 0


class Server:
    """Serves until ``stdin`` ends, which is when whoever started it has gone."""

    def __init__(self, listening: socket.socket, datagrams: socket.socket) -> None:
        self._listening = listening
        self._datagrams = datagrams
        self._epoll = select.epoll()
        self._connections: dict[int, _Connection] = {}
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._is_over = False

    def run(self, stdin_fd: int) -> None:
        special: dict[int, Callable[[], None]] = {
            self._listening.fileno(): self._accept,
            self._datagrams.fileno(): self._take_datagrams,
            stdin_fd: self._stop,
        }
        for fd in special:
            self._epoll.register(fd, select.EPOLLIN)
        while not self._is_over:
            for fd, events in self._epoll.poll():
                if fd in special:
                    special[fd]()
                elif (connection := self._connections.get(fd)) is not None:
                    self._serve(connection, events)

    def _stop(self) -> None:
        self._is_over = True

    def _take_datagrams(self) -> None:
        with suppress(BlockingIOError):
            while True:
                count, peer = self._datagrams.recvfrom_into(self._buffer)
                if count and self._buffer[0] == ECHO[0]:
                    self._datagrams.sendto(self._buffer[:count], peer)

    def _accept(self) -> None:
        try:
            sock, _ = self._listening.accept()
        except OSError:  # gone again, or no descriptor is left: the client will say which
            return
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections[sock.fileno()] = _Connection(sock)
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def _serve(self, connection: _Connection, events: int) -> None:
        try:
            if connection.to_send:
                self._send(connection)
            elif connection.rest:
                self._echo(connection, connection.rest)
            else:
                self._receive(connection)
        except BlockingIOError:
            return
        except OSError:
            self._close(connection)

    def _send(self, connection: _Connection) -> None:
        connection.to_send -= connection.sock.send(self._buffer[: min(connection.to_send, _BUFFER_BYTES)])
        if not connection.to_send:
            self._epoll.modify(connection.sock.fileno(), select.EPOLLIN)

    def _receive(self, connection: _Connection) -> None:
        count = connection.sock.recv_into(self._buffer)
        if not count:
            self._close(connection)
        elif connection.to_read:
            self._take(connection, count)
        elif connection.head == ECHO:
            self._echo(connection, self._buffer[:count])
        else:
            self._begin(connection, bytes(self._buffer[:count]))

    def _begin(self, connection: _Connection, data: bytes) -> None:
        """Learn what a connection is for."""
        connection.head += data
        if connection.head.startswith(ECHO):
            connection.head = ECHO
            self._echo(connection, data)
            return
        what, length = connection.head[:1], connection.head[1 : 1 + LENGTH_BYTES]
        rest = connection.head[1 + LENGTH_BYTES :]
        if len(length) < LENGTH_BYTES:
            return
        connection.head = b""
        if what == UPLOAD:
            connection.to_read = int.from_bytes(length, "big")
            self._take(connection, len(rest))
        elif what == DOWNLOAD:
            connection.to_send = int.from_bytes(length, "big")
            self._epoll.modify(connection.sock.fileno(), select.EPOLLOUT)
        else:
            self._close(connection)

    def _take(self, connection: _Connection, count: int) -> None:
        connection.to_read -= count
        if not connection.to_read:
            connection.sock.send(UPLOAD)

    def _echo(self, connection: _Connection, data: bytes | memoryview) -> None:
        was_waiting = bool(connection.rest)
        connection.rest = bytes(memoryview(data)[connection.sock.send(data) :])
        if was_waiting != bool(connection.rest):
            events = select.EPOLLOUT if connection.rest else select.EPOLLIN
            self._epoll.modify(connection.sock.fileno(), events)

    def _close(self, connection: _Connection) -> None:
        del self._connections[connection.sock.fileno()]
        connection.sock.close()


def main() -> None:
    raise_descriptor_limit()
    host, port = (sys.argv[1], int(sys.argv[2])) if sys.argv[1:] else ("127.0.0.1", 0)
    with (
        socket.create_server((host, port), backlog=4096) as listening,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
    ):
        port = listening.getsockname()[1]
        datagrams.bind((host, port))
        for sock in (listening, datagrams):
            sock.setblocking(False)
        print(json.dumps({"port": port}), flush=True)
        Server(listening, datagrams).run(sys.stdin.fileno())
    os._exit(0)  # with thousands of connections, saying farewell to each takes longer than measuring them


if __name__ == "__main__":
    main()
