# SPDX-License-Identifier: GPL-2.0-or-later
"""Datagrams through a forward of UDP over qrexec, and an account of each that is missing.

Rounds take turns: in calm nothing may be lost but what somebody has counted, and a storm is one kind of
disturbance. Some of those lose nothing uncounted either; of the others at most what was sent meanwhile is
missing, and never less than nothing, as then something was counted that had arrived.
"""

import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
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
from qubes_fwd_qrexec.common.values import ListenPorts, QubeName, RuleName, Sources, TargetPorts
from qubes_fwd_qrexec.exposed.callwaits import WAIT_S
from qubes_fwd_qrexec.exposed.limits import NotAdmitted
from qubes_fwd_qrexec.lab.running import RunningLab, open_lab
from qubes_fwd_qrexec.system.descriptors import raise_descriptor_limit

from .datagrams import Datagrams, Flow, Group
from .findings import PROBLEMS_MAX, Findings
from .run import kill, left_over, services_beside

_HOST = "127.0.0.1"
_SOURCE, _TARGET = "sys-net", "work"
_ROUND_S = 3.0
_WORKERS = 12
# Some clients go on from round to round, and are idle between; the others are over with their round.
_KEPT = 8
_NEW_EACH = 0.3
_BURST_MAX = 8
_PAUSE_S = (0.0, 0.15)
_IDLE_S = (0.5, 2.0)
_SERVER_FLOOD, _CLIENT_FLOOD = 1500, 1500
_OFF_S = (0.1, 1.0)
_BETWEEN_S = 0.4
# How long nothing has moved when a storm is over. The target reports what it dropped within two seconds.
_STILL_S = 2.5
_SETTLE_S = 30.0
_LOOK_S = 0.1
# How often clients ask again: what a socket has lost, the kernel tells with the next datagram.
_ASK_AGAIN_S = 1.0
_REFUSED = frozenset(str(reason) for reason in NotAdmitted)


class UdpSoak:
    """A run over one lab and one listener, which has no forward at first."""

    def __init__(
        self, lab: RunningLab, exposed: Child, seed: int, config: ListenerConfig, place: Path
    ) -> None:
        self.findings = Findings()
        self._lab = lab
        self._exposed = exposed
        self._config = config
        self._entry = place / config.key
        self._random = Random(seed)
        self._first, self._second = Group("the first network", "127.1"), Group("the second network", "127.2")
        self._strangers = Group("strangers", "127.3", closed_at=-1.0)
        self._play = Datagrams(self.findings, seed, config.target_ports.first)
        self._to = (_HOST, config.listen_ports.first)
        self._kept: list[Flow] = []
        self._past = 0
        """What forwards have counted that are closed."""
        self._tasks: trio.Nursery
        self._storms: dict[Callable[[], Awaitable[None]], bool] = {
            self._flood_from_server: True,
            self._flood_from_client: True,
            self._pause_the_target: True,
            self._stop_the_server: False,
            self._lose_the_call: False,
            self._kill_the_client: False,
            self._kill_the_service: False,
            self._narrow: False,
            self._disable: False,
        }
        """Disturbances, and whether each loses nothing that nobody counts."""

    async def run(self, seconds: float) -> None:
        """Calm and storm in turns, for about that long; then check what is left over."""
        at_rest = await self._settled({})
        async with trio.open_nursery() as self._tasks:
            self._open_server()
            await self._write(self._config)
            await self._wait_for_both()
            ends_at = trio.current_time() + seconds
            waiting: list[Callable[[], Awaitable[None]]] = []
            while True:
                await self._round(None)
                if trio.current_time() >= ends_at or len(self.findings.problems) >= PROBLEMS_MAX:
                    break
                waiting = waiting or self._random.sample(list(self._storms), len(self._storms))
                await self._round(waiting.pop())
                await self._wait_for_both()
            await self._check_left_over(at_rest)
            self._play.close_server()
            self._tasks.cancel_scope.cancel()

    # Rounds

    async def _round(self, storm: Callable[[], Awaitable[None]] | None) -> None:
        """A time in which clients ask, without or with a disturbance; and the account."""
        name = "calm" if storm is None else storm.__name__.strip("_").replace("_", " ")
        is_exact = storm is None or self._storms[storm]
        play = self._play
        play.is_calm = storm is None
        sent, before, counted = play.sent, await self._missing(), await self._counted()
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
        self.findings.played[f"dropped and counted: {name}"] += await self._counted() - counted
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
        flow = self._begin(self._random.choice((self._first, self._second)))
        if len(self._kept) < _KEPT:
            self._kept.append(flow)
        return flow

    async def _strangers_work(self) -> None:
        while True:
            self._play.ask(self._begin(self._strangers))
            self.findings.played["datagrams of strangers"] += 1
            await trio.sleep(self._random.uniform(*_PAUSE_S))

    def _begin(self, group: Group) -> Flow:
        flow = self._play.begin(group, self._to)
        self._tasks.start_soon(self._play.listen_to, flow)
        return flow

    async def _wait_for_both(self) -> None:
        """Wait until a client of each network is answered: after the start, and after a storm."""
        for group in (self._first, self._second):
            flow = self._begin(group)
            with trio.move_on_after(WAIT_S) as bound:
                while not flow.back.numbers:
                    self._play.ask(flow, 100)
                    await trio.sleep(_LOOK_S)
            if bound.cancelled_caught:
                self.findings.note(f"clients of {group.name} are not answered any more")
        await self._account(0, is_exact=False)

    # The account

    async def _missing(self) -> int:
        """How many datagrams were sent in all, and have neither arrived nor been counted as dropped."""
        counted = await self._counted()
        return self._play.sent - self._play.to_nobody - self._play.heard - counted

    async def _counted(self) -> int:
        """How many datagrams were dropped and counted in all, by listener, target and sockets."""
        return self._past + self._play.dropped + sum(map(_counted_in, (await self._ask())["reports"]))

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

    # Storms

    async def _flood_from_server(self) -> None:
        for _ in range(3):
            self._play.flood_clients(_SERVER_FLOOD)
            await self._pause()

    async def _flood_from_client(self) -> None:
        for group in (self._first, self._second):
            self._play.flood(self._begin(group), _CLIENT_FLOOD)
            await self._pause()

    async def _pause_the_target(self) -> None:
        services = services_beside(self._exposed)
        for pid in services:
            os.kill(pid, signal.SIGSTOP)
        await self._pause()
        for pid in services:
            os.kill(pid, signal.SIGCONT)

    async def _stop_the_server(self) -> None:
        self._play.close_server()
        await self._pause()
        self._open_server()

    async def _lose_the_call(self) -> None:
        self._lab.drop_calls()

    async def _kill_the_client(self) -> None:
        kill(descendants([self._exposed.pid]))

    async def _kill_the_service(self) -> None:
        kill(services_beside(self._exposed))

    async def _narrow(self) -> None:
        await self._write(replace(self._config, sources=_sources(self._first)), self._second)
        await self._pause()
        await self._write(self._config)

    async def _disable(self) -> None:
        await self._write(None, self._first, self._second)
        self._play.is_port_closed = True
        await self._pause()
        self._play.is_port_closed = False
        await self._write(self._config)

    async def _pause(self) -> None:
        await trio.sleep(self._random.uniform(*_OFF_S))

    def _open_server(self) -> None:
        self._play.open_server()
        self._tasks.start_soon(self._play.serve)

    async def _write(self, config: ListenerConfig | None, *closed: Group) -> None:
        """Tell the listener, and return when it has done it: for ``closed`` nothing passes from then on."""
        for group in (self._first, self._second):
            if group not in closed:
                group.closed_at = float("inf")
        if config is None:
            self._past = await self._counted() - self._play.dropped
            self._entry.unlink()
        else:
            hidden = self._entry.with_name(".new")
            hidden.write_text(f"{config}\n", encoding="ascii")
            hidden.rename(self._entry)
        await self._ask(look=True)
        for flow in list(self._play.flows.values()):
            self._play.hear(flow)  # what came before
        for group in closed:
            group.closed_at = time.monotonic()

    # What is left over

    async def _ask(self, **order: Any) -> dict[str, Any]:
        return await trio.to_thread.run_sync(self._exposed.ask, order, 20.0)

    async def _held(self) -> dict[str, Any]:
        held = await self._ask()
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

    async def _check_left_over(self, at_rest: dict[str, Any]) -> None:
        """Without the forward, nothing is there but what was before it."""
        for flow in list(self._play.flows.values()):
            self._play.end(flow)
        self._play.close_server()
        await self._write(None, self._first, self._second)
        now = await self._settled(at_rest)
        for name in left_over(now, at_rest):
            self.findings.note(f"left over: {name} {now[name]}, at the start {at_rest[name]}")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            try:
                sock.bind(self._to)
            except OSError:
                self.findings.note(f"left over: port {self._to[1]}")
        print(
            f"listener's memory before the forward and after it: {at_rest['memory_kib'] / 1024:.1f},", end=" "
        )
        print(f"{now['memory_kib'] / 1024:.1f} MiB")


def _counted_in(report: dict[str, Any]) -> int:
    """What a forward has counted: what it has dropped, and what it did not let in."""
    refused = [int(number) for reason, number in report["refused"].items() if reason in _REFUSED]
    return sum(map(int, report["dropped"].values())) + sum(refused)


def _sources(*groups: Group) -> Sources:
    return Sources.parse(",".join(f"{group.network}.0.0/16" for group in groups))


def _free_port() -> int:
    """A port of UDP that nobody has, below those that the kernel hands out."""
    random = Random()  # where it is makes no difference to what is played
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            try:
                sock.bind(("", port))
            except OSError:
                continue
            return port


def _config(listen: int, target: int) -> ListenerConfig:
    return ListenerConfig(
        target=QubeName(_TARGET),
        name=RuleName("soak"),
        side=Side.OUTER,
        listen=(ip_address(_HOST),),
        listen_ports=ListenPorts(listen, listen),
        target_ports=TargetPorts(target, target),
        sources=Sources.parse("127.1.0.0/16,127.2.0.0/16"),
        service=Service.FORWARD_UDP,
        transport=Transport.MUX,
    )


async def soak(seed: int, seconds: float) -> Findings:
    """A run of about ``seconds`` with that seed."""
    raise_descriptor_limit()
    with TemporaryDirectory(prefix="fwd-soak-") as place:
        directory = Path(place)
        config = _config(_free_port(), _free_port())
        (directory / "config").mkdir()
        policy = f"{config.service} +{config.target_ports.brief()}+mux {_SOURCE} {_TARGET} allow\n"
        async with open_lab(directory / "lab", policy=policy) as lab:
            client = lab.client_command(_SOURCE)
            exposed = Child.of_module("soak.exposed", [str(directory / "config"), *client], directory)
            try:
                await trio.to_thread.run_sync(exposed.answer, 20.0)
                run = UdpSoak(lab, exposed, seed, config, directory / "config")
                await run.run(seconds)
                return run.findings
            finally:
                await trio.to_thread.run_sync(exposed.end)
