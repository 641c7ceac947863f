# SPDX-License-Identifier: GPL-2.0-or-later
"""``python -m bench held``: what connections cost that only wait, from ten to 50,000 in one listener.

They come from a thousand addresses, go to several ports of the target over a mux call or two for each, and
are idle but for an echo when they are new and one when all are held. One end of a connection has 28,000 ports
at one address, so each port of the target is asked for fewer.
"""

import argparse
import json
import resource
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qubes_fwd_qrexec.common.config import ListenerConfig, Service, Side
from qubes_fwd_qrexec.common.rules import Limits, Transport
from qubes_fwd_qrexec.common.values import ListenPorts, QubeName, RuleName, Sources, TargetPorts
from qubes_fwd_qrexec.exposed.limits import Process, process_max
from qubes_fwd_qrexec.system.descriptors import raise_descriptor_limit

from . import machine
from .labprocess import TARGET
from .memory import Members, members, pss_kib
from .peers import free_port
from .processes import BenchError, Child
from .processor import used_s
from .table import markdown, number

COUNT = 50_000
STEPS = (10, 100, 1000, 3000, 10_000)
_HOST = "127.0.0.1"
# A mux call takes 16,384, so that with three ports a full one is followed by another.
_EACH_PORT = 20_000
_ADDRESSES = 1000
_LIMITS = Limits(connections=100_000, per_source=10_000, rate=100_000)
_LIMIT_S = 300.0
_READY_S = 60.0
_RETRY_S = 0.05
# Every 5 s all connections are looked at.
IDLE_S = 5.0
_SETTLE_S = 2.0


@dataclass(frozen=True, slots=True)
class Held:
    """``held`` connections, of which ``alive`` echoed at the end: the memory that they added, in KiB, and
    what the processes use of a processor while nothing moves, in percent. ``calls``: how many services there
    are.
    """

    held: int
    alive: int
    listener_kib: float
    service_kib: float
    listener_idle_percent: float
    service_idle_percent: float
    calls: int

    @property
    def each_kib(self) -> float:
        return (self.listener_kib + self.service_kib) / self.held


def room(count: int) -> tuple[int, str | None]:
    """How many of ``count`` one listener may hold here, and why not all, after trying to raise the limits."""
    why = ""
    files = count * 4 // 3 + 1000
    try:
        if 0 <= resource.getrlimit(resource.RLIMIT_NOFILE)[1] < files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    except (OSError, ValueError) as error:
        why = f", which was not to be raised: {error}"
    files = raise_descriptor_limit()
    by_files, by_memory = process_max(files), Process().connections_max
    if count <= min(by_files, by_memory):
        return count, None
    if by_files < by_memory:
        return by_files, f"{by_files} and not {count}: a process may have {files} open files{why}"
    return by_memory, f"{by_memory} and not {count}: the machine has too little memory"


class _Crowd:
    """All processes, up and ready: a server and a load for each port."""

    def __init__(self, listener: Child, broker: Child, client: str, loads: dict[int, Child]) -> None:
        self._listener = listener
        self._broker = broker
        self._client = client
        self._loads = loads

    def hold(self, count: int) -> tuple[int, int]:
        """Hold so many in all; how many are, and how many echo. Raises `BenchError`."""
        found = []
        for place, (port, load) in enumerate(self._loads.items()):
            share = (count + len(self._loads) - 1 - place) // len(self._loads)
            order = {"order": "hold", "address": (_HOST, port), "count": share, "limit_s": _LIMIT_S}
            found.append(load.ask({**order, "addresses": _ADDRESSES}, 2 * _LIMIT_S))
        opened, alive = (sum(answer[what] for answer in found) for what in ("opened", "alive"))
        if opened < count:
            raise self._listener.failure("; ".join(answer["failure"] for answer in found))
        return opened, alive

    def members(self) -> Members:
        return members([self._listener.pid], self._broker.pid, self._client)


def steps(counts: Sequence[int], idle_s: float = IDLE_S) -> Iterator[Held]:
    """One after another, in the same listener. Raises `BenchError` where it cannot hold what it should.

    After each it waits, and then looks for so many seconds at what the processes use.
    """
    with _open(max(2, -(-max(counts) // _EACH_PORT))) as crowd:
        crowd.hold(0)
        before = _kib(crowd.members())
        for count in counts:
            opened, alive = crowd.hold(count)
            time.sleep(min(_SETTLE_S, idle_s))
            used, found = _used_s(crowd, idle_s), crowd.members()
            listener, service = (now - then for now, then in zip(_kib(found), before, strict=True))
            percent = [100 * each / idle_s for each in used]
            yield Held(opened, alive, listener, service, *percent, len(found.service))


def _kib(found: Members) -> tuple[float, float]:
    return sum(map(pss_kib, found.peer)), sum(map(pss_kib, found.service))


def _used_s(crowd: _Crowd, idle_s: float) -> tuple[float, float]:
    """The processor time of listener and services while nothing moves."""
    found = crowd.members()

    def used() -> list[float]:
        return [sum(map(used_s, pids)) for pids in (found.peer, found.service)]

    before = used()
    time.sleep(idle_s)
    listener, service = (now - then for now, then in zip(used(), before, strict=True))
    return listener, service


@contextmanager
def _open(ports: int) -> Iterator[_Crowd]:
    """Start it all, with one connection to each port; end it all with the block. Raises `BenchError`."""
    with ExitStack() as undo:
        directory = Path(undo.enter_context(TemporaryDirectory(prefix="fwd-bench-")))

        def start(module: str, *arguments: str, name: str = "") -> Child:
            command = [sys.executable, "-m", module, *arguments]
            child = Child(module, command, directory / f"{module}{name}.log")
            undo.callback(child.end)
            return child

        servers = [start("bench.server", name=str(place)) for place in range(ports)]
        server_ports = [int(server.answer(_READY_S)["port"]) for server in servers]
        allowed = ",".join(map(str, server_ports))
        broker = start("bench.labprocess", str(directory / "lab"), allowed, "{}")
        client = broker.answer(_READY_S)["client"]
        config = directory / "config"
        config.mkdir()
        loads = {}
        for server_port in server_ports:
            listen_port = free_port()
            _write(config, listen_port, server_port)
            loads[listen_port] = start("bench.load", name=str(server_port))
        options = ["--config", str(config), "--qrexec-client", shlex.join(client)]
        crowd = _Crowd(start("qubes_fwd_qrexec.listener", *options), broker, client[0], loads)
        _wait_until_ready(crowd, ports)
        yield crowd


def _write(directory: Path, listen_port: int, target_port: int) -> None:
    """A forward's configuration."""
    config = ListenerConfig(
        target=QubeName(TARGET),
        name=RuleName(f"held-{target_port}"),
        side=Side.OUTER,
        listen=(ip_address(_HOST),),
        listen_ports=ListenPorts(listen_port, listen_port),
        target_ports=TargetPorts(target_port, target_port),
        sources=Sources.parse("127.0.0.0/8"),
        service=Service.FORWARD_TCP,
        transport=Transport.MUX,
        limits=_LIMITS,
    )
    (directory / config.key).write_text(f"{config}\n", encoding="ascii")


def _wait_until_ready(crowd: _Crowd, ports: int) -> None:
    """Until one connection to each port echoes."""
    deadline = time.monotonic() + _READY_S
    while True:
        try:
            crowd.hold(ports)
            return
        except BenchError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_S)


_COLUMNS = ("held", "alive", "calls", "each", "in the listener", "in the services", "idle", "idle services")


def render(found: Sequence[Held]) -> str:
    """A Markdown table."""
    rows = [_COLUMNS]
    for step in found:
        each = (step.each_kib, step.listener_kib / step.held, step.service_kib / step.held)
        idle = (step.listener_idle_percent, step.service_idle_percent)
        rows.append(
            (
                *map(str, (step.held, step.alive, step.calls)),
                *(f"{number(kib)} KiB" for kib in each),
                *(f"{number(percent)} %" for percent in idle),
            )
        )
    return markdown(rows)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench held", description=__doc__)
    parser.add_argument("--count", type=int, default=COUNT, metavar="N", help="how many in the end")
    parser.add_argument("--idle", type=float, default=IDLE_S, metavar="SECONDS", help="how long to look then")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    args = parser.parse_args(arguments)
    facts = machine.describe()
    most, reason = room(args.count)
    if reason is not None:
        print(f"held: {reason}", file=sys.stderr)
    found: list[Held] = []
    try:
        for step in steps([*(count for count in STEPS if count < most), most], args.idle):
            print(f"{step.alive} of {step.held} are alive ...", file=sys.stderr)
            found.append(step)
    except BenchError as error:
        print(error, file=sys.stderr)
    print(render(found))
    print("\n" + "; ".join(f"{name}: {fact}" for name, fact in facts.items()) + ".")
    if reason is not None:
        print(f"Held: {reason}.")
    if args.json is not None:
        document: dict[str, Any] = {"machine": facts, "reason": reason}
        document["steps"] = [asdict(step) for step in found]
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0 if found and found[-1].held == most == found[-1].alive else 1
