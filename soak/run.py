# SPDX-License-Identifier: GPL-2.0-or-later
"""A whole run: calm and storm in turns, and then what is left over."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import trio

from bench.memory import descendants, is_agent, open_files, pss_kib
from bench.processes import Child
from qubes_fwd_qrexec.common.config import ListenerConfig, Service, Side
from qubes_fwd_qrexec.common.rules import Transport
from qubes_fwd_qrexec.common.values import ListenPorts, QubeName, RuleName, Sources, TargetPorts
from qubes_fwd_qrexec.exposed.callwaits import WAIT_S
from qubes_fwd_qrexec.lab.running import RunningLab, open_lab
from qubes_fwd_qrexec.system.descriptors import raise_descriptor_limit

from .findings import PROBLEMS_MAX, Findings
from .play import Outcome, play
from .scripts import How, Part, Script, make

_HOST = "127.0.0.1"
_SOURCE, _TARGET = "sys-net", "work"
# Connections at once, each on a port of one forward's range.
_WORKERS = 16
_CALM_S = 12.0
_STORM_S = 6.0
_KILL_S = (0.1, 1.5)
_SETTLE_S = 120.0
# Memory that an allocator keeps is no leak yet. Measured: under 2 MiB after the first calm.
_MEMORY_KIB = 6144
# A service lives from storm to storm, so this is what half a calm adds on average. Measured: under 300.
_SERVICE_MEMORY_KIB = 512
# An undisturbed connection: the first, and the one that finds out whether mux calls open again.
_PLAIN = Part(size=1000, chunk=1000, pause_s=0, stall_s=0, waits=False, how=How.FIN)


class Soak:
    """A run over one lab and one listener."""

    def __init__(self, lab: RunningLab, exposed: Child, seed: int, listen: int, target: int) -> None:
        self.findings = Findings()
        self._lab = lab
        self._exposed = exposed
        self._seed = seed
        self._listen = listen
        self._target = target
        self._number = 0
        self._service_growths_kib: list[float] = []
        self._random = Random(seed)

    async def run(self, seconds: float) -> None:
        """Calm and storm in turns, for that long; then check what is left over."""
        await self._wait_for_mux_call()
        at_rest = await self._settled({})
        ends_at = trio.current_time() + seconds
        memory: list[float] = []
        # The last part is always calm, to show what a storm broke.
        while (left_s := ends_at - trio.current_time()) > 0:
            calm_s, storm_s = min(_CALM_S, left_s / 2), min(_STORM_S, left_s / 4)
            await self._calm(calm_s, at_rest)
            if left_s < _CALM_S:
                ends_at = trio.current_time()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._kill_now_and_then)
                await self._phase(storm_s, self._honestly)
                nursery.cancel_scope.cancel()
            await self._wait_for_mux_call()
            memory.append((await self._held())["memory_kib"])
        await self._calm(min(seconds / 4, _CALM_S), at_rest)
        await self._check_left_over(at_rest, memory)

    async def _calm(self, length_s: float, at_rest: dict[str, Any]) -> None:
        """Two halves: the second must not add to what the first made a service hold.

        A storm kills services, so the last one says little about the first. In a calm it is the same process;
        if a lease ends meanwhile, that calm does not count.
        """
        sizes = []
        for _ in range(2):
            await self._phase(length_s / 2, self._exactly)
            await self._settled(at_rest)
            sizes.append({pid: (open_files(pid), pss_kib(pid)) for pid in self._services()})
        before, after = sizes
        if before.keys() != after.keys():
            return
        for pid, (files, memory_kib) in after.items():
            self._service_growths_kib.append(memory_kib - before[pid][1])
            if files > before[pid][0]:
                self.findings.note(f"a service has {files} descriptors, and had {before[pid][0]}")

    async def _phase(self, length_s: float, check: Callable[..., Any]) -> None:
        ends_at = trio.current_time() + length_s
        async with trio.open_nursery() as nursery:
            for worker in range(_WORKERS):
                nursery.start_soon(self._work, worker, ends_at, check)

    async def _work(self, worker: int, ends_at: float, check: Callable[..., Any]) -> None:
        while trio.current_time() < ends_at and len(self.findings.problems) < PROBLEMS_MAX:
            self._number += 1
            await check(make(self._seed, self._number), worker)

    async def _exactly(self, script: Script, worker: int) -> None:
        """In calm, a connection ends as the direct one does."""
        relayed, problems = await self._play(script, worker, self._listen)
        direct, none = await self._play(script, worker, self._target)
        for problem in (*problems, *(f"directly, {text}" for text in none)):
            self.findings.note(f"{script}: {problem}")
        if relayed != direct:
            self.findings.note(f"{script}: {relayed} and directly {direct}")
        self.findings.played["as the direct connection"] += 1

    async def _honestly(self, script: Script, worker: int) -> None:
        """In a storm, a connection may be cut, but never looks complete when it is not."""
        relayed, problems = await self._play(script, worker, self._listen)
        for problem in problems:
            self.findings.note(f"{script}: in a storm {problem}")
        seen = [side for side in (relayed.client, relayed.server) if side is not None]
        is_cut = any(side.end != "EOF" for side in seen) and not _aborts(script)
        self.findings.played["cut in a storm" if is_cut else "whole in a storm"] += 1

    async def _play(self, script: Script, worker: int, first_port: int) -> tuple[Outcome, list[str]]:
        return await play(script, self._seed, (_HOST, first_port + worker), self._target + worker)

    async def _kill_now_and_then(self) -> None:
        while True:
            await trio.sleep(self._random.uniform(*_KILL_S))
            how = self._random.choice((self._lose_call, self._kill_clients, self._kill_services))
            if how():
                self.findings.disturbed[how.__name__.strip("_").replace("_", " ")] += 1

    def _lose_call(self) -> int:
        return self._lab.drop_calls()

    def _kill_clients(self) -> int:
        return kill(descendants([self._exposed.pid]))

    def _kill_services(self) -> int:
        return kill(self._services())

    def _services(self) -> list[int]:
        """The services, without the lab's processes that start them and wait for them."""
        return services_beside(self._exposed)

    async def _wait_for_mux_call(self) -> None:
        """Wait until a connection is carried: after the start, and after a storm's refusals."""
        script = Script(0, _PLAIN, _PLAIN)
        with trio.move_on_after(WAIT_S):
            while True:
                outcome, _ = await self._play(script, 0, self._listen)
                if outcome.client is not None and outcome.client.end == "EOF":
                    return
                await trio.sleep(0.1)
        self.findings.note("no mux call opens any more")

    # What is left over

    async def _held(self) -> dict[str, Any]:
        """What listener, lab and services hold."""
        held = await trio.to_thread.run_sync(self._exposed.ask, {}, _SETTLE_S)
        del held["reports"]
        services = self._services()
        return held | {
            "clients": len(descendants([self._exposed.pid])),
            "services": len(services),
            "calls": sum(self._lab.broker.used_slots().values()),
            "service files": sum(map(open_files, services)),
            "lab files": open_files(os.getpid()),
            "lab tasks": trio.lowlevel.current_statistics().tasks_living,
            "service memory_kib": sum(map(pss_kib, services)),
        }

    async def _settled(self, at_rest: dict[str, Any]) -> dict[str, Any]:
        """What is held once that is no more than at rest or, if that is not known yet, no longer changes."""
        before: dict[str, Any] = {}
        deadline = time.monotonic() + _SETTLE_S
        while time.monotonic() < deadline:
            now = await self._held()
            if not any(left_over(now, at_rest)) and (at_rest or now == before):
                return now
            before = now
            await trio.sleep(0.3)  # nobody tells of files and memory of other processes
        return before

    async def _check_left_over(self, at_rest: dict[str, Any], memory: list[float]) -> None:
        await self._wait_for_mux_call()
        now = await self._settled(at_rest)
        for name in left_over(now, at_rest):
            self.findings.note(f"left over: {name} {now[name]}, at the start {at_rest[name]}")
        story = (at_rest["memory_kib"], *memory, now["memory_kib"])
        if story[-1] - story[1] > _MEMORY_KIB:
            self.findings.note(f"the listener has grown since the first storm by more than {_MEMORY_KIB} KiB")
        print(f"listener's memory at the start, after each storm and at the end: {mib(story)} MiB")
        services = (at_rest["service memory_kib"], now["service memory_kib"])
        growths = self._service_growths_kib
        print(f"service's memory, the first one's and the last one's: {mib(services)} MiB;", end=" ")
        print(f"growth in half a calm: {', '.join(f'{growth:.0f}' for growth in growths)} KiB")
        if not growths:
            self.findings.note("no service lived through a calm")
        elif sum(growths) / len(growths) > _SERVICE_MEMORY_KIB:
            self.findings.note(f"services grow by more than {_SERVICE_MEMORY_KIB} KiB in half a calm")


def mib(kib: Sequence[float]) -> str:
    """Sizes in KiB as text, in MiB."""
    return ", ".join(f"{value / 1024:.1f}" for value in kib)


def services_beside(exposed: Child) -> list[int]:
    """The services of this program's lab; ``exposed`` is its listener."""
    listener = {exposed.pid, *descendants([exposed.pid])}
    return [pid for pid in descendants([os.getpid()]) if pid not in listener and not is_agent(pid)]


def left_over(now: dict[str, Any], at_rest: dict[str, Any]) -> Iterator[str]:
    """What there is more of than at rest. Memory is judged separately."""
    return (name for name, rest in at_rest.items() if not name.endswith("memory_kib") and now[name] > rest)


def _aborts(script: Script) -> bool:
    return How.RST in (script.client.how, script.server.how)


def kill(pids: list[int]) -> int:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(pids)


def _free_range() -> int:
    """The first of _WORKERS unused ports in a row, below those that the kernel hands out."""
    random = Random()  # where it is makes no difference to what is played
    while True:
        first = random.randrange(10_000, 32_000)
        taken = []
        try:
            for port in range(first, first + _WORKERS):
                taken.append(socket.create_server((_HOST, port)))
        except OSError:
            continue
        else:
            return first
        finally:
            for sock in taken:
                sock.close()


def _config(listen: int, target: int) -> ListenerConfig:
    return ListenerConfig(
        target=QubeName(_TARGET),
        name=RuleName("soak"),
        side=Side.OUTER,
        listen=(ip_address(_HOST),),
        listen_ports=ListenPorts(listen, listen + _WORKERS - 1),
        target_ports=TargetPorts(target, target + _WORKERS - 1),
        sources=Sources.parse(f"{_HOST}/32"),
        service=Service.FORWARD_TCP,
        transport=Transport.MUX,
    )


async def soak(seed: int, seconds: float) -> Findings:
    """A run of about ``seconds`` with that seed."""
    raise_descriptor_limit()
    with TemporaryDirectory(prefix="fwd-soak-") as place:
        directory = Path(place)
        listen, target = _free_range(), _free_range()
        config = _config(listen, target)
        (directory / "config").mkdir()
        (directory / "config" / config.key).write_text(f"{config}\n", encoding="ascii")
        policy = f"qubes.ForwardTCP +{config.target_ports.brief()}+mux {_SOURCE} {_TARGET} allow\n"
        async with open_lab(directory / "lab", policy=policy) as lab:
            client = lab.client_command(_SOURCE)
            exposed = Child.of_module("soak.exposed", [str(directory / "config"), *client], directory)
            try:
                await trio.to_thread.run_sync(exposed.answer, 20.0)
                run = Soak(lab, exposed, seed, listen, target)
                await run.run(seconds)
                return run.findings
            finally:
                await trio.to_thread.run_sync(exposed.end)
