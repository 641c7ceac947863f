# SPDX-License-Identifier: GPL-2.0-or-later
"""Datagrams through a forward of UDP over qrexec, and an account of each that is missing.

Rounds take turns: in calm nothing may be lost but what somebody has counted, and a storm is one kind of
disturbance (`udpforward`). Some of those lose nothing uncounted either; of the others at most what was sent
meanwhile is missing, and never less than nothing, as then something was counted that had arrived.
"""

import os
import socket
import time
from ipaddress import ip_address
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import trio

from bench.memory import descendants, open_files
from bench.processes import Child
from qubes_fwd_qrexec.common.config import ListenerConfig, Service, Side
from qubes_fwd_qrexec.common.rules import Transport
from qubes_fwd_qrexec.common.values import ListenPorts, QubeName, RuleName, TargetPorts
from qubes_fwd_qrexec.lab.running import RunningLab, open_lab
from qubes_fwd_qrexec.system.descriptors import raise_descriptor_limit

from .datagrams import Datagrams, Flow, Group
from .findings import PROBLEMS_MAX, Findings
from .run import left_over, mib, services_beside
from .udpforward import PlayedForward, Storm, sources_of

_HOST, _HOST_IPV6 = "127.0.0.1", "::1"
_SOURCE, _TARGET = QubeName("sys-net"), QubeName("work")
_ROUND_S = 3.0
_WORKERS = 12
# Some clients go on from round to round, and are idle between; the others are over with their round.
_KEPT = 8
_NEW_EACH = 0.3
_BURST_MAX = 8
_PAUSE_S = (0.0, 0.15)
_IDLE_S = (0.5, 2.0)
_BETWEEN_S = 0.4
# How long nothing has moved when a storm is over. The target reports what it dropped within two seconds.
_STILL_S = 2.5
_SETTLE_S = 120.0
# Memory that an allocator keeps is no leak yet.
_MEMORY_KIB = 6144
_LOOK_S = 0.1
# How often clients ask again: what a socket has lost, the kernel tells with the next datagram.
_ASK_AGAIN_S = 1.0


class UdpSoak:
    """A run over one lab and one listener, which has no forward at first."""

    def __init__(
        self,
        lab: RunningLab,
        exposed: Child,
        seed: int,
        config: ListenerConfig,
        groups: tuple[Group, ...],
        place: Path,
    ) -> None:
        self.findings = Findings()
        self._lab = lab
        self._exposed = exposed
        self._random = Random(seed)
        self._groups = groups
        self._strangers = Group("strangers", "127.3.0.0/16", _HOST)
        self._strangers.close(is_shut=True)
        self._play = Datagrams(self.findings, seed, config.target_ports.first)
        self._forward = PlayedForward(
            lab, exposed, self._play, config, place / config.key, groups, _SOURCE, self._random
        )
        self._kept: list[Flow] = []

    async def run(self, seconds: float) -> None:
        """Calm and storm in turns, for about that long; then check what is left over."""
        at_rest = await self._settled({})
        async with trio.open_nursery() as tasks:
            self._forward.start(tasks)
            await self._forward.write(self._forward.config)
            await self._wait_for_all()
            ends_at = trio.current_time() + seconds
            waiting: list[Storm] = []
            memory: list[float] = []
            while True:
                await self._round(None)
                if trio.current_time() >= ends_at or len(self.findings.problems) >= PROBLEMS_MAX:
                    break
                if not waiting:
                    storms = list(self._forward.storms)
                    waiting = self._random.sample(storms, len(storms))
                    memory.append((await self._held())["memory_kib"])
                await self._round(waiting.pop())
                await self._wait_for_all()
            await self._check_left_over(at_rest, memory)
            tasks.cancel_scope.cancel()

    # Rounds

    async def _round(self, storm: Storm | None) -> None:
        """A time in which clients ask, without or with a disturbance; and the account."""
        name = "calm" if storm is None else storm.__name__.strip("_").replace("_", " ")
        is_exact = storm is None or self._forward.storms[storm]
        play = self._play
        play.is_calm = storm is None
        sent, before, counted = play.sent, await self._missing(), await self._forward.counted()
        async with trio.open_nursery() as clients:
            for _ in range(_WORKERS):
                clients.start_soon(self._work)
            clients.start_soon(self._strangers_work)
            if storm is None:
                await trio.sleep(_ROUND_S)
            else:
                await trio.sleep(_BETWEEN_S)
                await storm()
                await trio.sleep(_BETWEEN_S)
                self.findings.disturbed[name] += 1
            clients.cancel_scope.cancel()
        missing = await self._account(before, is_exact=is_exact)
        sent = play.sent - sent
        if not 0 <= missing <= (0 if is_exact else sent):
            self.findings.note(f"{name}: of {sent} datagrams {missing} are missing that nobody has counted")
        self.findings.played[f"datagrams sent: {name}"] += sent
        self.findings.played["sent to a closed port"] = play.to_nobody
        self.findings.played[f"dropped and counted: {name}"] += await self._forward.counted() - counted
        self.findings.played[f"not counted by anybody: {name}"] += missing
        for flow in [flow for flow in play.flows.values() if flow not in self._kept]:
            play.end(flow)

    async def _work(self) -> None:
        """Clients one after another, each with bursts and pauses, and now and then idle."""
        while True:
            flow = self._client()
            for _ in range(self._random.randrange(1, 12)):
                for _ in range(self._random.randrange(1, _BURST_MAX)):
                    self._play.ask(flow)
                await trio.sleep(self._random.uniform(*_PAUSE_S))
            if self._random.random() < 0.1:
                await trio.sleep(self._random.uniform(*_IDLE_S))

    def _client(self) -> Flow:
        if len(self._kept) == _KEPT and self._random.random() > _NEW_EACH:
            return self._random.choice(self._kept)
        flow = self._forward.begin(self._random.choice(self._groups))
        if len(self._kept) < _KEPT:
            self._kept.append(flow)
        return flow

    async def _strangers_work(self) -> None:
        while True:
            self._play.ask(self._forward.begin(self._strangers))
            self.findings.played["datagrams of strangers"] += 1
            await trio.sleep(self._random.uniform(*_PAUSE_S))

    async def _wait_for_all(self) -> None:
        """Wait until a client of each network is answered: after the start, and after a storm."""
        for group in self._groups:
            if not await self._forward.answered(self._forward.begin(group)):
                self.findings.note(f"clients of {group.name} are not answered any more")
        await self._account(0, is_exact=False)

    # The account

    async def _missing(self) -> int:
        """How many datagrams were sent in all, and have neither arrived nor been counted as dropped."""
        counted = await self._forward.counted()
        return self._play.sent - self._play.to_nobody - self._play.heard - counted

    async def _account(self, before: int, *, is_exact: bool) -> int:
        """How many are missing more than before: when it is none, or when nothing has changed for a while."""
        begun = changed = asked = time.monotonic()
        last = None
        while True:
            await trio.sleep(_LOOK_S)
            now, missing = time.monotonic(), await self._missing() - before
            if missing != last:
                last, changed = missing, now
            is_still = now - changed >= _STILL_S
            if (missing == 0 and is_exact) or (is_still and not is_exact) or now - begun >= _SETTLE_S:
                return missing
            if is_exact and now - asked >= _ASK_AGAIN_S:
                asked = now
                for flow in list(self._play.flows.values()):
                    self._play.ask(flow, 100)
                    await trio.lowlevel.checkpoint()

    # What is left over

    async def _held(self) -> dict[str, Any]:
        held = await self._forward.ask()
        del held["reports"]
        services = services_beside(self._exposed)
        return held | {
            "clients": len(descendants([self._exposed.pid])),
            "services": len(services),
            "calls": sum(self._lab.broker.used_slots().values()),
            "lab files": open_files(os.getpid()),
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
            await trio.sleep(_LOOK_S)
        return before

    async def _check_left_over(self, at_rest: dict[str, Any], memory: list[float]) -> None:
        """Without the forward, nothing is there but what was before it."""
        for flow in list(self._play.flows.values()):
            self._play.end(flow)
        self._play.close_server()
        await self._forward.close()
        now = await self._settled(at_rest)
        for name in left_over(now, at_rest):
            self.findings.note(f"left over: {name} {now[name]}, at the start {at_rest[name]}")
        port = self._forward.config.listen_ports.first
        for group in self._groups:
            if not _is_free(group.host, port):
                self.findings.note(f"left over: {group.host} port {port}")
        story = (at_rest["memory_kib"], *memory, now["memory_kib"])
        print(
            f"listener's memory at the start, before each turn of all storms and at the end: {mib(story)} MiB"
        )
        # The first turn of all storms is when it grows.
        if len(memory) > 2 and now["memory_kib"] - memory[1] > _MEMORY_KIB:
            self.findings.note(
                f"the listener has grown since the first storms by more than {_MEMORY_KIB} KiB"
            )


def _is_free(host: str, port: int) -> bool:
    """Whether nobody has this port of UDP."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind((host, port))
        except OSError:
            return False
    return True


def _free_port(*hosts: str) -> int:
    """A port of UDP that nobody has, below those that the kernel hands out."""
    random = Random()  # where it is makes no difference to what is played
    while True:
        port = random.randrange(10_000, 32_000)
        if all(_is_free(host, port) for host in hosts):
            return port


def _make_groups() -> tuple[Group, ...]:
    """Clients who are let in; those by IPv6 if this machine has it."""
    groups = (
        Group("the first network", "127.1.0.0/16", _HOST),
        Group("the second network", "127.2.0.0/16", _HOST),
    )
    if not _is_free(_HOST_IPV6, 0):
        return groups
    return *groups, Group("IPv6", f"{_HOST_IPV6}/128", _HOST_IPV6)


def _config(listen: int, target: int, groups: tuple[Group, ...]) -> ListenerConfig:
    return ListenerConfig(
        target=_TARGET,
        name=RuleName("soak"),
        side=Side.OUTER,
        listen=tuple(map(ip_address, sorted({group.host for group in groups}))),
        listen_ports=ListenPorts(listen, listen),
        target_ports=TargetPorts(target, target),
        sources=sources_of(*groups),
        service=Service.FORWARD_UDP,
        transport=Transport.MUX,
    )


async def soak(seed: int, seconds: float) -> Findings:
    """A run of about ``seconds`` with that seed."""
    raise_descriptor_limit()
    with TemporaryDirectory(prefix="fwd-soak-") as place:
        directory = Path(place)
        groups = _make_groups()
        config = _config(_free_port(*(group.host for group in groups)), _free_port(_HOST), groups)
        (directory / "config").mkdir()
        async with open_lab(directory / "lab") as lab:
            client = lab.client_command(_SOURCE)
            exposed = Child.of_module("soak.exposed", [str(directory / "config"), *client], directory)
            try:
                await trio.to_thread.run_sync(exposed.answer, 20.0)
                run = UdpSoak(lab, exposed, seed, config, groups, directory / "config")
                await run.run(seconds)
                return run.findings
            finally:
                await trio.to_thread.run_sync(exposed.end)
