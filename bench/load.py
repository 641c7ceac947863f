# SPDX-License-Identifier: GPL-2.0-or-later
"""The load: every client of the bench, in one process that obeys lines of JSON on its stdin.

Each function answers with what it measured, in seconds unless said otherwise. All are bounded: a
connection that does not answer in time is a failure, not a wait.
"""

import json
import select
import socket
import struct
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
_ENDLESS = (1 << 40).to_bytes(LENGTH_BYTES, "big")
# By then all that holds bytes between server and client is full.
_FILLED_S = 0.3


class LoadError(Exception):
    """A connection failed where none should."""


def connect(address: Address, source: str = "") -> socket.socket:
    sock = socket.create_connection(address, ANSWER_S, (source, 0))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def echo(sock: socket.socket, data: bytes = ECHO) -> None:
    """Bytes there and back. Raises OSError or `LoadError`."""
    sock.sendall(data)
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


def begin(address: Address, count: int = 1) -> dict[str, Any]:
    """Open the connections of later orders that name no address. Each has moved a byte."""
    for _ in range(count):
        _begun.append(sock := connect(address))
        _upload(sock, 1)
    return {}


def finish() -> dict[str, Any]:
    """End what `begin` has opened."""
    while _begun:
        _finish(_begun.pop())
    return {}


def abort() -> dict[str, Any]:
    """Abort what `begin` has opened, whatever is under way; ``moved`` is in bytes."""
    moved = sum(each.moved for each in _floods)
    _floods.clear()
    while _begun:
        with _begun.pop() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return {"moved": moved}


@contextmanager
def _stream(address: Address | None) -> Iterator[socket.socket]:
    """A connection of its own, or the last that was begun."""
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


def transfer(way: str, size: int) -> dict[str, Any]:
    """``size`` bytes over all connections that were begun, at once: until the last is where it belongs.

    The way is "upload" or "download".
    """
    each = size // len(_begun)
    head = (UPLOAD if way == "upload" else DOWNLOAD) + each.to_bytes(LENGTH_BYTES, "big")
    begun = time.perf_counter()
    with select.epoll() as epoll:
        live = {sock.fileno(): sock for sock in _begun}
        left = dict.fromkeys(live, each)
        for fd, sock in live.items():
            sock.sendall(head)
            sock.setblocking(False)
            epoll.register(fd, select.EPOLLOUT if way == "upload" else select.EPOLLIN)
        while live:
            events = epoll.poll(ANSWER_S)
            if not events:
                raise LoadError(f"nothing moved for {ANSWER_S:g} s")
            for fd, _ in events:
                if _is_moved(epoll, live[fd], left, way):
                    epoll.unregister(fd)
                    live.pop(fd).settimeout(ANSWER_S)
    return {"seconds": time.perf_counter() - begun}


def _is_moved(epoll: select.epoll, sock: socket.socket, left: dict[int, int], way: str) -> bool:
    """Move some; returns whether that was the last of it, which an upload's server acknowledges."""
    fd = sock.fileno()
    if way == "upload" and left[fd]:
        left[fd] -= sock.send(memoryview(_CHUNK)[: min(left[fd], len(_CHUNK))])
        if not left[fd]:
            epoll.modify(fd, select.EPOLLIN)
        return False
    count = sock.recv_into(_BUFFER)
    if not count:
        raise LoadError("a transfer ended early")
    left[fd] -= count
    return left[fd] <= 0


class _Flood:
    """What moves on a connection while no order is obeyed."""

    def __init__(self, sock: socket.socket, way: str) -> None:
        self._sock = sock
        self._is_upload = way == "upload"
        self.moved = 0

    def move(self) -> None:
        """Some more. Raises OSError or `LoadError`."""
        count = self._sock.send(_CHUNK) if self._is_upload else self._sock.recv_into(_BUFFER)
        if not count:
            raise LoadError("a flood ended")
        self.moved += count


_floods: list[_Flood] = []


def flood(way: str) -> dict[str, Any]:
    """Move bytes on what was begun for ever, or until `abort`, which tells how many they were."""
    for sock in _begun:
        sock.sendall((UPLOAD if way == "upload" else DOWNLOAD) + _ENDLESS)
        _floods.append(_Flood(sock, way))
    return {}


def stall() -> dict[str, Any]:
    """Have the server send for ever on what was begun, which nobody reads; only `abort` ends it."""
    for sock in _begun:
        sock.sendall(DOWNLOAD + _ENDLESS)
    time.sleep(_FILLED_S)
    return {}


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
        *(connections, many, round_trips, upload, download, datagrams, hold, release),
        *(begin, finish, abort, transfer, flood, stall),
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
        _keep_moving()


def _keep_moving() -> None:
    """Until the next order waits."""
    try:
        while _floods and not select.select([sys.stdin], [], [], 0)[0]:
            for each in _floods:
                each.move()
    except (OSError, LoadError) as error:
        print(f"a flood failed: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
