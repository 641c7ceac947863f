# SPDX-License-Identifier: GPL-2.0-or-later
"""Consumers that do not read, with each program as a process: memory is bounded, and nobody waits."""

import mmap
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from endings import pattern
from processes import BOUND_S, Connection, Way, World, open_world, wanted_cpu_s

from bench.memory import descendants, pss_kib

MIB = 1 << 20
# Nothing has moved for so long: it stands still.
QUIET_S = 0.3
_BLOCK = pattern(MIB + 13)


class Flow:
    """One direction of a connection; what is received is compared with what was sent."""

    def __init__(self, source: socket.socket, sink: socket.socket, seed: int) -> None:
        self.source = source
        self.sink = sink
        self.sent = self.received = 0
        self._first = seed * 1009
        for sock in (source, sink):
            sock.setblocking(False)

    def _piece(self, position: int, size: int) -> memoryview:
        at = (self._first + position) % len(_BLOCK)
        return memoryview(_BLOCK)[at : at + size]

    def send(self, total: int) -> None:
        """All that is taken now, up to so much altogether."""
        try:
            while self.sent < total:
                self.sent += self.source.send(self._piece(self.sent, min(total - self.sent, 65536)))
        except BlockingIOError:
            pass

    def receive(self) -> None:
        data = memoryview(self.sink.recv(65536))
        assert data, "an end of file"
        while data:
            piece = self._piece(self.received, len(data))
            assert data[: len(piece)] == piece, f"other bytes after {self.received}"
            self.received += len(piece)
            data = data[len(piece) :]


def both_ways(connections: Iterable[Connection]) -> list[Flow]:
    flows = []
    for number, connection in enumerate(connections):
        flows.append(Flow(connection.client, connection.far, 2 * number))
        flows.append(Flow(connection.far, connection.client, 2 * number + 1))
    return flows


def stall(flows: list[Flow], total: int = 1 << 40) -> None:
    """Send until nothing is taken any more, and nothing is read."""
    poll = select.poll()
    by_fd = {flow.source.fileno(): flow for flow in flows}
    for fd in by_fd:
        poll.register(fd, select.POLLOUT)
    deadline = time.monotonic() + BOUND_S
    while ready := poll.poll(QUIET_S * 1000):
        assert time.monotonic() < deadline, "it never blocks"
        for fd, events in ready:
            assert events == select.POLLOUT
            flow = by_fd[fd]
            flow.send(total)
            if flow.sent == total:
                poll.unregister(fd)


def finish(flows: list[Flow], total: int) -> None:
    """Send up to so much altogether on each, and receive it all."""
    poll = select.poll()
    sources = {flow.source.fileno(): flow for flow in flows}
    sinks = {flow.sink.fileno(): flow for flow in flows}

    def watch(fd: int) -> None:
        is_sending = fd in sources and sources[fd].sent < total
        is_receiving = fd in sinks and sinks[fd].received < total
        poll.register(fd, (select.POLLOUT if is_sending else 0) | (select.POLLIN if is_receiving else 0))

    for fd in sources.keys() | sinks.keys():
        watch(fd)
    deadline = time.monotonic() + BOUND_S
    while any(flow.received < total for flow in flows):
        assert time.monotonic() < deadline, "it does not go on"
        for fd, events in poll.poll(BOUND_S * 1000):
            assert not events & (select.POLLERR | select.POLLHUP)
            if events & select.POLLOUT:
                sources[fd].send(total)
            if events & select.POLLIN:
                sinks[fd].receive()
            watch(fd)


class Stalls:
    """A way whose server has small sockets, and what is asked of its processes."""

    def __init__(self, world: World, way: Way) -> None:
        self.world = world
        self.way = way

    @contextmanager
    def connections(self, count: int) -> Iterator[list[Connection]]:
        with ExitStack() as stack:
            connections = [stack.enter_context(self.way.connect()) for _ in range(count)]
            for connection in connections:
                connection.client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
                connection.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
                connection.far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
            yield connections

    @property
    def processes(self) -> dict[str, int]:
        # The agent's process waits for the service, which is its child.
        (service,) = (pid for pid in self.world.services if not descendants([pid]))
        return {"listener": self.world.listener, "service": service}

    def memory_kib(self) -> dict[str, float]:
        return {name: pss_kib(pid) for name, pid in self.processes.items()}

    def assert_grown_by_at_most(self, bound_kib: float, before: dict[str, float]) -> None:
        growth = {name: now - before[name] for name, now in self.memory_kib().items()}
        assert max(growth.values()) <= bound_kib, growth

    def assert_quiet(self) -> None:
        """No process is busy while nothing can be moved.

        Whoever does wants a processor all the time, and with other load waits for it then; so one window in
        which neither wants one is enough, and the first may still have had something to move.
        """
        deadline = time.monotonic() + BOUND_S
        while True:
            before = {name: wanted_cpu_s(pid) for name, pid in self.processes.items()}
            began = time.monotonic()
            select.select([], [], [], QUIET_S)
            took_s = time.monotonic() - began
            wanted = {
                name: (wanted_cpu_s(pid) - before[name]) / took_s for name, pid in self.processes.items()
            }
            if max(wanted.values()) < 0.3:
                return
            assert time.monotonic() < deadline, wanted


@pytest.fixture(scope="module")
def stalls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stalls]:
    with open_world(tmp_path_factory.mktemp("stalls")) as world:
        way = world.forward(receive_buffer_bytes=65536)
        world.start_listener()
        with way.connect() as first:
            first.echo()
        yield Stalls(world, way)


def test_a_server_that_never_reads_costs_a_mebibyte_and_gets_all_in_the_end(stalls: Stalls) -> None:
    """docs/behaviours.md, 15, and 17: what the kernel holds on the way is bounded too."""
    with stalls.connections(1) as (connection,):
        flow = Flow(connection.client, connection.far, 1)
        before = stalls.memory_kib()
        stall([flow])
        stalls.assert_quiet()
        stalls.assert_grown_by_at_most(1024, before)
        assert flow.sent <= 2 * MIB
        finish([flow], 64 * MIB)


def test_a_client_that_never_reads_is_bounded_like_a_server_that_never_reads(stalls: Stalls) -> None:
    with stalls.connections(1) as (connection,):
        flow = Flow(connection.far, connection.client, 1)
        before = stalls.memory_kib()
        stall([flow])
        stalls.assert_quiet()
        stalls.assert_grown_by_at_most(1024, before)
        assert flow.sent <= 2 * MIB
        finish([flow], 8 * MIB)


def test_64_streams_stalled_both_ways_cost_32_mebibytes_and_go_on_to_the_last_byte(stalls: Stalls) -> None:
    """docs/behaviours.md, 16 and 18: the windows have grown before, to all that there is to share."""
    before = stalls.memory_kib()
    with stalls.connections(64) as connections:
        flows = both_ways(connections)
        finish(flows, MIB // 2)
        stall(flows)
        stalls.assert_quiet()
        stalls.assert_grown_by_at_most(32 * 1024, before)
        with stalls.way.connect() as another:
            another.echo()
        finish(flows, max(flow.sent for flow in flows) + MIB // 8)


# Sends on one descriptor and reads on the other until SIGTERM; how much it has read is in a shared file.
_BULK = """
import mmap, os, select, signal, struct, sys
source, sink, file, place = map(int, sys.argv[1:])
over, moved, some = [], 0, bytes(65536)
shared = mmap.mmap(file, mmap.PAGESIZE)
signal.signal(signal.SIGTERM, lambda *_: over.append(1))
for fd in (source, sink):
    os.set_blocking(fd, False)
while not over:
    readable, writable, _ = select.select([sink], [source], [], 1)
    if writable:
        os.write(source, some)
    if readable:
        if not moved:
            print("flows", flush=True)
        moved += len(os.read(sink, 65536))
        struct.pack_into("@Q", shared, 8 * place, moved)
"""


def test_a_small_answer_beside_bulk_streams_is_soon_there(stalls: Stalls, tmp_path: Path) -> None:
    """docs/behaviours.md, 20, counted in what the others move meanwhile, which no other load makes more: a
    hundred MiB a second is 2 MiB in 20 ms. tests/relay/test_backlog.py counts the turns."""
    with stalls.connections(5) as (small, *bulk), ExitStack() as stack:
        file = stack.enter_context((tmp_path / "moved").open("w+b"))
        file.truncate(mmap.PAGESIZE)
        shared = stack.enter_context(mmap.mmap(file.fileno(), mmap.PAGESIZE))

        def moved() -> tuple[int, ...]:
            return struct.unpack_from(f"@{len(bulk)}Q", shared)

        children = []
        for place, connection in enumerate(bulk):
            fds = connection.client.fileno(), connection.far.fileno(), file.fileno()
            child = subprocess.Popen(
                [sys.executable, "-c", _BULK, *map(str, (*fds, place))],
                pass_fds=fds,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(child)
            stack.callback(child.kill)
            children.append(child)
        for child in children:
            assert child.stdout is not None
            assert select.select([child.stdout], [], [], BOUND_S)[0]
            assert child.stdout.readline() == "flows\n"
        meanwhile = []
        deadline = time.monotonic() + BOUND_S
        while len(meanwhile) < 200 or min(moved()) < MIB:
            assert time.monotonic() < deadline, moved()
            before = sum(moved())
            small.echo()
            meanwhile.append(sum(moved()) - before)
        for child in children:
            child.terminate()
        meanwhile.sort()
        assert meanwhile[len(meanwhile) // 2] <= 2 * MIB
        assert meanwhile[-len(meanwhile) // 20] <= 8 * MIB
