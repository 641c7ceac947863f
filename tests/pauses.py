# SPDX-License-Identifier: GPL-2.0-or-later
"""Each part of the way stops for a minute, and no connection ends: ``python tests/pauses.py [SECONDS]``, with
the root of the sources in PYTHONPATH.

Streams run both ways as fast as they can, and one is idle, over a mux call and over calls, while the
listener, the target's services and the lab's daemon are stopped by SIGSTOP in turn. It takes minutes, so it
is no test of `make test`: the same is held there without waiting (tests/relay/test_mux.py).
"""

import os
import select
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from processes import Connection, World, open_world
from test_stalls import Flow

_BULK = {"mux": 8, "call": 4}
_AROUND_S = 3.0
_MIB = 1 << 20


class Traffic:
    """Connections over all ways, with as many bytes on their way as each takes."""

    def __init__(self, world: World, undo: ExitStack) -> None:
        ways = {transport: world.forward(transport) for transport in _BULK}
        world.start_listener()
        self.idle: list[Connection] = []
        self.flows: list[Flow] = []
        for transport, way in ways.items():
            for number in range(2 * _BULK[transport] + 1):
                connection = undo.enter_context(way.connect_again())
                if number == 0:
                    self.idle.append(connection)
                    continue
                one, other = connection.client, connection.far
                source, sink = (one, other) if number % 2 else (other, one)
                self.flows.append(Flow(source, sink, number))

    def run(self, seconds: float) -> int:
        """Move bytes for so long; how many. Raises when a connection ends, or other bytes come."""
        before = sum(flow.received for flow in self.flows)
        poll = select.poll()
        by_fd = {}
        for flow in self.flows:
            by_fd[flow.source.fileno()] = (flow, True)
            by_fd[flow.sink.fileno()] = (flow, False)
            poll.register(flow.source, select.POLLOUT)
            poll.register(flow.sink, select.POLLIN)
        ends_at = time.monotonic() + seconds
        while (left_s := ends_at - time.monotonic()) > 0:
            for fd, _ in poll.poll(left_s * 1000):
                flow, is_source = by_fd[fd]
                if is_source:
                    flow.send(flow.sent + 65536)
                else:
                    flow.receive()
        return sum(flow.received for flow in self.flows) - before

    def check(self) -> None:
        """All of them live: each bulk stream moves, and each idle one answers."""
        at = [flow.received for flow in self.flows]
        for _ in range(20):
            self.run(1.0)
            if all(flow.received > was for flow, was in zip(self.flows, at, strict=True)):
                break
        else:
            raise AssertionError("a stream does not move any more")
        for connection in self.idle:
            connection.echo()


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    with ExitStack() as undo:
        directory = Path(undo.enter_context(TemporaryDirectory()))
        world = undo.enter_context(open_world(directory))
        traffic = Traffic(world, undo)
        traffic.run(_AROUND_S)
        for what, pids in (
            ("the listener", [world.listener]),
            ("the services", world.services),
            ("the daemon", [world.broker]),
        ):
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            try:
                traffic.run(seconds)
            finally:
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
            moved = traffic.run(_AROUND_S)
            traffic.check()
            print(
                f"{what}: stopped for {seconds:g} s, and then {moved / _MIB / _AROUND_S:.0f} MiB/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
