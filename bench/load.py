# SPDX-License-Identifier: GPL-2.0-or-later
"""The load: every client of the bench, in one process that obeys lines of JSON on its stdin.

Each function answers with what it measured, in seconds unless said otherwise. All are bounded: a
connection that does not answer in time is a failure, not a wait.
"""

import json
import select
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from qubes_fwd_qrexec.system.descriptors import raise_descriptor_limit

from .server import DOWNLOAD, ECHO, LENGTH_BYTES, UPLOAD

Address = tuple[str, int]
# Longer than any working peer takes; a connection that needs more counts as hung.
ANSWER_S = 5.0
_CHUNK = bytes(1 << 18)
_BUFFER = bytearray(1 << 20)
_DATAGRAM_BYTES, _WINDOW = 64, 32


class LoadError(Exception):
    """A connection failed where none should."""


def connect(address: Address, source: str = "") -> socket.socket:
    sock = socket.create_connection(address, ANSWER_S, (source, 0))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def echo(sock: socket.socket, data: bytes = ECHO) -> None:
    """Bytes there and back. Raises OSError or `LoadError`."""
    sock.send(data)
    left = len(data)
    while left:
        count = len(sock.recv(left))
        if not count:
            raise LoadError("the connection ended where an echo was due")
        left -= count


def _finish(sock: socket.socket) -> None:
    """End cleanly and wait for the other side, so that its work is not in the next sample."""
    with sock:
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass


_begun: list[socket.socket] = []


def begin(address: Address) -> dict[str, Any]:
    """Open the connection that later orders use if they name no address; it has moved a byte."""
    sock = connect(address)
    _upload(sock, 1)
    _begun.append(sock)
    return {}


def finish() -> dict[str, Any]:
    """End what `begin` has opened."""
    _finish(_begun.pop())
    return {}


@contextmanager
def _stream(address: Address | None) -> Iterator[socket.socket]:
    """A connection of its own, or the one that was begun."""
    if address is None:
        yield _begun[-1]
        return
    sock = connect(address)
    yield sock
    _finish(sock)


def connections(address: Address, count: int) -> dict[str, Any]:
    """New connections one at a time: from connect() to the first echoed byte."""
    seconds = []
    for _ in range(count):
        begun = time.perf_counter()
        sock = connect(address)
        echo(sock)
        seconds.append(time.perf_counter() - begun)
        _finish(sock)
    return {"seconds": seconds}


def _start(address: Address) -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    sock.connect_ex(address)
    return sock


def many(address: Address, clients: int, count: int, limit_s: float) -> dict[str, Any]:
    """``count`` connections by ``clients`` at once, each connect, one echoed byte, close.

    A failure is an error or an early end, a hang has no echo in time; what ``limit_s`` cuts off is neither.
    """
    epoll = select.epoll()
    live: dict[int, tuple[socket.socket, float]] = {}
    begun = time.perf_counter()
    started = done = failed = hung = 0
    while time.perf_counter() - begun < limit_s:
        while started < count and len(live) < clients:
            sock = _start(address)
            live[sock.fileno()] = sock, time.perf_counter()
            epoll.register(sock.fileno(), select.EPOLLOUT)
            started += 1
        if not live:
            break
        for fd, events in epoll.poll(0.1):
            sock = live[fd][0]
            try:
                if events == select.EPOLLOUT:
                    sock.send(ECHO)
                    epoll.modify(fd, select.EPOLLIN)
                    continue
                if sock.recv(1) == ECHO:
                    done += 1
                else:
                    failed += 1
            except OSError:
                failed += 1
            epoll.unregister(fd)
            live.pop(fd)[0].close()
        now = time.perf_counter()
        for fd, (sock, since) in list(live.items()):
            if now - since > ANSWER_S:
                hung += 1
                epoll.unregister(fd)
                del live[fd]
                sock.close()
    seconds = time.perf_counter() - begun
    for sock, _ in live.values():
        sock.close()
    epoll.close()
    return {"seconds": seconds, "done": done, "failed": failed, "hung": hung}


def round_trips(count: int, size: int = 1, address: Address | None = None) -> dict[str, Any]:
    """So many bytes there and back on one open connection, again and again."""
    seconds, data = [], ECHO * size
    with _stream(address) as sock:
        echo(sock, data)
        for _ in range(count):
            begun = time.perf_counter()
            echo(sock, data)
            seconds.append(time.perf_counter() - begun)
    return {"seconds": seconds}


def upload(size: int, address: Address | None = None) -> dict[str, Any]:
    """From sending the first byte to the server's answer that it has all ``size`` bytes."""
    with _stream(address) as sock:
        begun = time.perf_counter()
        _upload(sock, size)
        return {"seconds": time.perf_counter() - begun}


def _upload(sock: socket.socket, size: int) -> None:
    sock.sendall(UPLOAD + size.to_bytes(LENGTH_BYTES, "big"))
    for left in range(size, 0, -len(_CHUNK)):
        sock.sendall(memoryview(_CHUNK)[: min(left, len(_CHUNK))])
    if sock.recv(1) != UPLOAD:
        raise LoadError("the upload ended early")


def download(size: int, address: Address | None = None) -> dict[str, Any]:
    """From the request to the last of ``size`` bytes."""
    with _stream(address) as sock:
        begun = time.perf_counter()
        _download(sock, size)
        return {"seconds": time.perf_counter() - begun}


def _download(sock: socket.socket, size: int) -> None:
    sock.sendall(DOWNLOAD + size.to_bytes(LENGTH_BYTES, "big"))
    while size > 0:
        count = sock.recv_into(_BUFFER)
        if not count:
            raise LoadError("the download ended early")
        size -= count


def datagrams(address: Address, count: int) -> dict[str, Any]:
    """So many datagrams of 64 bytes, of which every 32nd is answered, and the answer waited for.

    ``used`` is this process's processor time, in which the kernel also carries what is sent to the server.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(ANSWER_S)
        sock.connect(address)
        taken, answered = bytes(_DATAGRAM_BYTES), ECHO + bytes(_DATAGRAM_BYTES - 1)
        begun, used = time.perf_counter(), time.process_time()
        for _ in range(count // _WINDOW):
            for _ in range(_WINDOW - 1):
                sock.send(taken)
            sock.send(answered)
            if sock.recv(_DATAGRAM_BYTES) != answered:
                raise LoadError("an answer is not what was sent")
        return {"seconds": time.perf_counter() - begun, "used": time.process_time() - used}


_held: list[socket.socket] = []


def hold(address: Address, count: int, limit_s: float, moved: int = 0, addresses: int = 0) -> dict[str, Any]:
    """Open connections and keep them, until one fails, ``count`` are open or ``limit_s`` is over.

    They come from so many ``addresses``, if any, and each moves ``moved`` bytes each way first. ``opened``
    got their echo when new, ``alive`` got one more when all were open.
    """
    deadline = time.monotonic() + limit_s
    failure = f"none up to {count}, where the bench stops"
    while len(_held) < count:
        if time.monotonic() > deadline:
            failure = f"none within {limit_s:g} s, where the bench stops"
            break
        try:
            sock = connect(address, _source(len(_held) % addresses) if addresses else "")
        except OSError as error:
            failure = str(error)
            break
        try:
            if moved:
                _upload(sock, moved)
                _download(sock, moved)
            echo(sock)
            _held.append(sock)
        except (OSError, LoadError) as error:
            sock.close()
            failure = str(error)
            break
    alive = 0
    for sock in _held:
        try:
            echo(sock)
            alive += 1
        except (OSError, LoadError):
            continue
    return {"opened": len(_held), "alive": alive, "failure": failure}


def _source(place: int) -> str:
    """One of many addresses of loopback."""
    return f"127.1.{place >> 8}.{place & 255}"


def release() -> dict[str, Any]:
    """Close what `hold` holds."""
    while _held:
        _held.pop().close()
    return {}


ORDERS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function
    for function in (
        *(begin, finish, connections, many, round_trips, upload, download, datagrams, hold, release),
    )
}


def main() -> None:
    raise_descriptor_limit()
    for line in sys.stdin:
        order = json.loads(line)
        if "address" in order:
            order["address"] = tuple(order["address"])
        try:
            answer = ORDERS[order.pop("order")](**order)
        except (OSError, LoadError) as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
