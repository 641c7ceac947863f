# SPDX-License-Identifier: GPL-2.0-or-later
"""One end of UDP: the server, or a client. It obeys lines of JSON on its stdin, and between them takes what
comes.

A datagram that begins with ``e`` is sent back. The public methods of `End` are the orders.

``python -m bench.udpend [HOST PORT]``: the server is bound there.
"""

import json
import select
import socket
import sys
import time
from contextlib import suppress
from typing import Any

from qubes_fwd_qrexec.system import datagrams
from qubes_fwd_qrexec.system.descriptors import raise_descriptor_limit

from .load import ANSWER_S, Address, LoadError
from .server import ECHO

_TAKEN = b"t"
_NUMBER_BYTES = 8
# A datagram that is not answered within so long is sent again: nothing tells when a server of UDP is ready.
_AGAIN_S = 0.25
# How long the sender of a flood sleeps when nothing is due, and for how long it makes up for what it is late.
_PAUSE_S, _LATE_S = 0.0005, 0.01
# So much may wait for an end, so that what is missing was lost on its way. As root; others get less.
_SO_RCVBUFFORCE, _RECEIVE_BYTES = 33, 8 << 20
_READS = 64


class End:
    """``sock`` is not connected, and belongs to the caller. The other end is the one that wrote last."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._other: Any = None
        self._held: list[socket.socket] = []
        self._number = 0
        self.listen_for(0)
        sock.setblocking(False)
        datagrams.tell_arrivals(sock)
        with suppress(PermissionError):
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BYTES)

    def take(self) -> None:
        """Count what has come, and send back what asks for it."""
        with suppress(BlockingIOError):
            for _ in range(_READS):
                arrived = datagrams.receive(self._sock)
                self._other = arrived.sender
                if arrived.data.startswith(ECHO):
                    datagrams.send(self._sock, arrived.data, arrived.segment, arrived.sender)
                else:
                    self._count(len(arrived.data), arrived.segment)

    def _count(self, length: int, segment: int) -> None:
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self._bytes += length
        if self._size in (segment, length):
            self._whole += length // self._size

    def listen_for(self, size: int) -> dict[str, Any]:
        """Count anew what comes from now on, for `heard`."""
        self._size = size
        self._whole = self._bytes = 0
        self._first = self._last = 0.0
        return {}

    def heard(self) -> dict[str, Any]:
        """Datagrams of the size that is listened for, all bytes, and the seconds from first to last."""
        return {"whole": self._whole, "bytes": self._bytes, "seconds": self._last - self._first}

    def flood(
        self, rate: float, size: int, batch: int, for_s: float, address: Address | None = None
    ) -> dict[str, Any]:
        """Send ``rate`` datagrams a second to the other end, ``batch`` of them in one call of the kernel.

        ``sent`` is how many the kernel took. What it has no room for is not sent again.
        """
        data, segment = _TAKEN * (size * batch), size if batch > 1 else 0
        other = address or self._other
        due, sent = float(batch), 0
        begun = looked = now = time.perf_counter()
        while now < begun + for_s:
            due = min(due + rate * (now - looked), batch + rate * _LATE_S)
            looked = now
            if due < batch:
                time.sleep(_PAUSE_S)
            else:
                due -= batch
                sent += datagrams.send(self._sock, data, segment, other).datagrams
            now = time.perf_counter()
        return {"sent": sent, "seconds": now - begun}

    def round_trips(self, address: Address, count: int, size: int = 64) -> dict[str, Any]:
        """A datagram there and back, again and again. ``lost`` is how many had to be sent once more."""
        self._sock.settimeout(_AGAIN_S)
        tries = 0
        seconds = []
        try:
            for _ in range(count):
                taken, more = self._echo(self._sock, address, size)
                seconds.append(taken)
                tries += more
        finally:
            self._sock.setblocking(False)
        return {"seconds": seconds, "lost": tries - count}

    def hold(self, address: Address, count: int, limit_s: float) -> dict[str, Any]:
        """Begin flows, each with an answered datagram, until one has no answer or ``limit_s`` is over.

        ``alive`` is how many were answered once more when all had begun.
        """
        deadline = time.monotonic() + limit_s
        failure = f"none up to {count}, where the bench stops"
        try:
            while len(self._held) < count:
                if time.monotonic() > deadline:
                    raise LoadError(f"none within {limit_s:g} s, where the bench stops")
                sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                sock.settimeout(_AGAIN_S)
                self._held.append(sock)
                self._echo(sock, address)
        except (OSError, LoadError) as error:
            failure = str(error)
        alive = 0
        for sock in self._held:
            with suppress(OSError, LoadError):
                self._echo(sock, address)
                alive += 1
        return {"alive": alive, "failure": failure}

    def _echo(self, sock: socket.socket, address: Address, size: int = 64) -> tuple[float, int]:
        """Seconds from sending a datagram to its answer, and how often it was sent. Raises `LoadError`.

        What answers an earlier one is passed over.
        """
        self._number += 1
        data = (ECHO + self._number.to_bytes(_NUMBER_BYTES, "big")).ljust(size, b"\0")
        for tries in range(1, int(ANSWER_S / _AGAIN_S) + 1):
            begun = time.perf_counter()
            sock.sendto(data, address)
            with suppress(TimeoutError):
                while sock.recv(1 << 16) != data:
                    pass
                return time.perf_counter() - begun, tries
        raise LoadError(f"no answer within {ANSWER_S:g} s")


def main() -> None:
    raise_descriptor_limit()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((sys.argv[1], int(sys.argv[2])) if sys.argv[1:] else ("", 0))
        end = End(sock)
        if sys.argv[1:]:
            print(json.dumps({"port": sock.getsockname()[1]}), flush=True)
        watched = select.poll()
        watched.register(sock, select.POLLIN)
        watched.register(sys.stdin, select.POLLIN)
        while True:
            ready = [fd for fd, _ in watched.poll()]
            if sock.fileno() in ready:
                end.take()
            if sys.stdin.fileno() in ready and not _obey(end):
                return


def _obey(end: End) -> bool:
    """Do what the next line says; False if there is none."""
    line = sys.stdin.readline()
    if not line:
        return False
    order = json.loads(line)
    if "address" in order:
        order["address"] = tuple(order["address"])
    try:
        answer = getattr(end, order.pop("order"))(**order)
    except (OSError, LoadError) as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
    return True


if __name__ == "__main__":
    main()
