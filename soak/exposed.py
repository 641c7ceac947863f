# SPDX-License-Identifier: GPL-2.0-or-later
"""The listener in a process of its own, which can be asked what it holds.

``python -m soak.exposed CONFIG_DIRECTORY CLIENT...``: a line of JSON on stdin is answered by another, and the
end of stdin ends it. With ``"look"`` it looks at its configuration first, as it does when dom0 asks.
"""

import json
import os
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import trio

from bench.memory import open_files, pss_kib
from qubes_fwd_qrexec.exposed.listener import Listener
from qubes_fwd_qrexec.exposed.muxpool import MuxPool
from qubes_fwd_qrexec.exposed.udpforward import OpenUdpForward
from qubes_fwd_qrexec.system.configsource import FileSource
from qubes_fwd_qrexec.system.descriptors import raise_descriptor_limit
from qubes_fwd_qrexec.system.logs import start_logging

# Threads that trio keeps for ten seconds after they were used; they come and go. Trio names them "Trio
# thread 1", and before 0.23 "Trio worker thread 1".
_CACHED = ("Trio thread ", "Trio worker thread ")


@dataclass(frozen=True, slots=True)
class Held:
    """What the listener holds. When nothing is carried, only the memory may be more than before."""

    mux_calls: int
    streams: int
    flows: int
    waiting: int
    slots: int
    budget_streams: int
    budget_used: int
    tasks: int
    threads: int
    files: int
    memory_kib: float


def held(listener: Listener) -> Held:
    """Reads private state, since no interface shows a leak."""
    transports = listener.transports
    pools = list(transports.pools.values())
    flow_pools = list(transports.flow_pools.values())
    every: list[MuxPool[Any]] = [*pools, *flow_pools]
    mux_calls = [mux_call for pool in every for mux_call in pool.mux_calls]
    forwards = [forward for forward in listener.forwards.values() if isinstance(forward, OpenUdpForward)]
    return Held(
        mux_calls=len(mux_calls),
        streams=sum(mux_call.carries for mux_call in mux_calls),
        flows=sum(forward.connections for forward in forwards),
        waiting=sum(pool.waiting for pool in pools) + sum(bool(pool._waiting) for pool in flow_pools),
        slots=listener.process.connections,
        budget_streams=transports._budget.streams,
        budget_used=transports._budget.total - transports._budget.shared_left,
        tasks=trio.lowlevel.current_statistics().tasks_living,
        threads=sum(not thread.name.startswith(_CACHED) for thread in threading.enumerate()),
        files=open_files(os.getpid()),
        memory_kib=pss_kib(os.getpid()),
    )


async def _run(directory: str, client: list[str]) -> None:
    listener = Listener(FileSource(Path(directory)), tuple(client), drain_s=1.0)
    async with trio.open_nursery() as nursery:
        await nursery.start(listener.run)
        print("{}", flush=True)
        while True:
            await trio.lowlevel.wait_readable(sys.stdin)
            line = os.read(sys.stdin.fileno(), 4096)
            if not line:
                break
            if "look" in json.loads(line):
                listener.look()
            reports = [forward.as_json() for forward in listener.report().forwards]
            print(json.dumps(asdict(held(listener)) | {"reports": reports}), flush=True)
        listener.stop()
        listener.stop()


def main() -> None:
    start_logging()
    raise_descriptor_limit()
    trio.run(_run, sys.argv[1], sys.argv[2:])


if __name__ == "__main__":
    main()
