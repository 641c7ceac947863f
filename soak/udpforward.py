# SPDX-License-Identifier: GPL-2.0-or-later
"""The forward of UDP that a soak plays on: what the listener is told of it, what it has counted, and storms.

A storm is one kind of disturbance. It returns when the forward is open again as it was.
"""

import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import trio

from bench.memory import descendants
from bench.processes import Child
from qubes_fwd_qrexec.common.allowance import ANSWER_MAX_BYTES, Allowance
from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.rules import OnExpire, Proxy
from qubes_fwd_qrexec.common.services import REVOKE_SERVICE
from qubes_fwd_qrexec.common.values import QubeName, Sources
from qubes_fwd_qrexec.exposed.callwaits import WAIT_S
from qubes_fwd_qrexec.exposed.limits import NotAdmitted
from qubes_fwd_qrexec.lab.qube import QubeState
from qubes_fwd_qrexec.lab.running import RunningLab
from qubes_fwd_qrexec.lab.store import LabStore

from .datagrams import Datagrams, Flow, Group
from .findings import Findings
from .run import kill, services_beside

_SERVER_FLOOD, _CLIENT_FLOOD = 1500, 1500
_OFF_S = (0.1, 1.0)
_EXPIRE_S = 2
# The listener looks at its clock twice a second, and this machine may be busy.
_NOTICE_S = 30.0
_LOOK_S = 0.1
_GONE_S = 120.0
_REVOKE_S = 120.0
# So many flows must be answered while they drain. The others, which were there before, may.
_DRAINED = 3
_REFUSED = frozenset(str(reason) for reason in NotAdmitted)

Storm = Callable[[], Awaitable[None]]


class PlayedForward:
    """A forward from the listener ``exposed`` to a qube of the lab; closed until `write` opens it.

    ``entry``: its configuration, as a file that the listener reads.
    """

    def __init__(
        self,
        lab: RunningLab,
        exposed: Child,
        play: Datagrams,
        config: ListenerConfig,
        entry: Path,
        groups: tuple[Group, ...],
        source: QubeName,
        random: Random,
    ) -> None:
        self.config = config
        self._lab = lab
        self._store = LabStore(lab.directory)
        self._exposed = exposed
        self._play = play
        self._findings: Findings = play.findings
        self._entry = entry
        self._groups = groups
        self._source = source
        self._random = random
        self._past = 0
        """What forwards have counted that are closed."""
        self._tasks: trio.Nursery
        self.storms: dict[Storm, bool] = {
            self._flood_from_server: True,
            self._flood_from_client: True,
            self._pause_the_target: True,
            self._change_the_header: True,
            self._narrow_and_drain: True,
            self._stop_the_server: False,
            self._lose_the_call: False,
            self._kill_the_client: False,
            self._kill_the_service: False,
            self._restart_the_target: False,
            self._narrow: False,
            self._disable: False,
            self._disable_and_drain: False,
            self._expire: False,
            self._expire_and_drain: False,
            self._panic_and_resume: False,
        }
        """Each, and whether it loses nothing that nobody counts."""

    def start(self, tasks: trio.Nursery) -> None:
        """Have the lab halt qubes, and a server answer, until these tasks are cancelled."""
        self._tasks = tasks
        tasks.start_soon(self._lab.broker.watch)
        self.allow()
        self._open_server()

    def allow(self) -> None:
        """dom0 allows the forward."""
        config = self.config
        call = f"{config.service} +{config.target_ports.brief()}+mux"
        self._lab.write_policy(f"{call} {self._source} {config.target} allow autostart=no\n")

    def begin(self, group: Group) -> Flow:
        """A new client, which hears what comes for it."""
        flow = self._play.begin(group, self.config.listen_ports.first)
        self._tasks.start_soon(self._play.listen_to, flow)
        return flow

    async def answered(self, flow: Flow) -> bool:
        """Whether a client is answered, which asks again and again."""
        before = len(flow.back.numbers)
        with trio.move_on_after(WAIT_S):
            while len(flow.back.numbers) == before:
                self._play.ask(flow, 100)
                await trio.sleep(_LOOK_S)
        return len(flow.back.numbers) > before

    async def ask(self, **order: Any) -> dict[str, Any]:
        """What the listener holds and reports; see `soak.exposed`."""
        return await trio.to_thread.run_sync(self._exposed.ask, order, 20.0)

    async def counted(self) -> int:
        """How many datagrams were dropped and counted in all, by listener, target and sockets."""
        return self._past + self._play.dropped + sum(map(_counted_in, (await self.ask())["reports"]))

    async def write(self, config: ListenerConfig | None, *closed: Group, drains: bool = False) -> None:
        """Tell the listener, and return when it has done it.

        From then on nothing passes for clients of ``closed``, except that flows which are there by then go
        on if the forward ``drains``.
        """
        for group in self._groups:
            if group not in closed:
                group.open()
        if config is None:
            self._past = await self.counted() - self._play.dropped
            self._entry.unlink()
            await self.ask(look=True)
        else:
            self._play.is_port_closed = False
            self._play.may_have_header(config.proxy is Proxy.V2)
            hidden = self._entry.with_name(".new")
            hidden.write_text(f"{config}\n", encoding="ascii")
            hidden.rename(self._entry)
            await self.ask(look=True)
            self._play.must_have_header(config.proxy is Proxy.V2)
        self._shut(*closed, drains=drains)
        self._play.is_port_closed = config is None

    def _shut(self, *groups: Group, drains: bool) -> None:
        for flow in list(self._play.flows.values()):
            self._play.hear(flow)  # what came before
            flow.drains = drains and flow.group in groups
        for group in groups:
            group.close(is_shut=True)

    async def close(self) -> None:
        """End the forward."""
        await self.write(None, *self._groups)

    # Storms

    async def _flood_from_server(self) -> None:
        for _ in range(3):
            self._play.flood_clients(_SERVER_FLOOD)
            await self._pause()

    async def _flood_from_client(self) -> None:
        for group in self._groups:
            self._play.flood(self.begin(group), _CLIENT_FLOOD)
            await self._pause()

    async def _pause_the_target(self) -> None:
        services = services_beside(self._exposed)
        for pid in services:
            os.kill(pid, signal.SIGSTOP)
        await self._pause()
        for pid in services:
            os.kill(pid, signal.SIGCONT)

    async def _change_the_header(self) -> None:
        """The server gets the PROXY header from now on, or no longer; the forward stays like that."""
        proxy = Proxy.OFF if self.config.proxy is Proxy.V2 else Proxy.V2
        self.config = replace(self.config, proxy=proxy)
        await self.write(self.config)
        await self._pause()

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

    async def _restart_the_target(self) -> None:
        self._play.close_server()
        self._lab.directory.set_state(self.config.target, QubeState.HALTED)
        with trio.move_on_after(_GONE_S) as bound:
            while services_beside(self._exposed):  # noqa: ASYNC110 - nobody tells of other processes
                await trio.sleep(_LOOK_S)
        if bound.cancelled_caught:
            self._findings.note("a service goes on in a target that is halted")
        await self._pause()
        self._lab.directory.set_state(self.config.target, QubeState.RUNNING)
        self._open_server()

    async def _narrow(self) -> None:
        await self._write_narrower(OnExpire.CUT)
        await self._pause()
        await self.write(self.config)

    async def _narrow_and_drain(self) -> None:
        """What is let in no more goes on; others of its network are strangers."""
        kept, refused = self._groups[0], self._groups[1]
        old = await self._old_flows(refused)
        await self._write_narrower(OnExpire.DRAIN)
        await self._check_drained(old)
        if not await self.answered(self.begin(kept)):
            self._findings.note("clients that are still let in are not answered beside those that drain")
        await self.write(self.config)

    async def _write_narrower(self, on_expire: OnExpire) -> None:
        refused = self._groups[1]
        sources = sources_of(*(group for group in self._groups if group is not refused))
        narrower = replace(self.config, sources=sources, on_expire=on_expire)
        await self.write(narrower, refused, drains=on_expire is OnExpire.DRAIN)

    async def _disable(self) -> None:
        await self.close()
        await self._pause()
        await self.write(self.config)

    async def _disable_and_drain(self) -> None:
        await self.write(replace(self.config, on_expire=OnExpire.DRAIN))
        old = await self._old_flows(*self._groups)
        await self.write(None, *self._groups, drains=True)
        await self._check_drained(old)
        await self.write(self.config)

    async def _expire(self) -> None:
        await self._expire_by_its_clock(OnExpire.CUT)
        await self._pause()
        await self.write(self.config)

    async def _expire_and_drain(self) -> None:
        old = await self._expire_by_its_clock(OnExpire.DRAIN)
        await self._check_drained(old)
        await self.write(self.config)

    async def _expire_by_its_clock(self, on_expire: OnExpire) -> list[Flow]:
        """Tell the listener when the forward ends, and return flows that were there when it did so."""
        old = await self._old_flows(*self._groups) if on_expire is OnExpire.DRAIN else []
        expire, counted = int(time.time()) + _EXPIRE_S, 0
        await self.write(replace(self.config, on_expire=on_expire, expire=expire))
        while reports := (await self.ask())["reports"]:
            if time.time() > expire + _NOTICE_S:
                self._findings.note("a forward whose time is over is open")
                break
            counted = sum(map(_counted_in, reports))
            await trio.sleep(_LOOK_S / 2)
        else:
            self._past += counted
        if time.time() < expire:
            self._findings.note("a forward has ended before its time")
        self._shut(*self._groups, drains=on_expire is OnExpire.DRAIN)
        self._play.is_port_closed = True
        return old

    async def _panic_and_resume(self) -> None:
        """dom0 allows nothing, and ends the calls whatever the listener does; then it closes the listener's
        forward, too."""
        self._lab.write_policy(f"{self.config.service} * @anyvm @anyvm deny\n")
        told = str(Allowance(cuts_drains=True))
        ask = self._store.ask
        answer = await trio.to_thread.run_sync(
            ask, self.config.target, REVOKE_SERVICE, ANSWER_MAX_BYTES, _REVOKE_S, told
        )
        if b"draining=0" not in answer:
            self._findings.note(f"the target says that something goes on: {answer!a}")
        for group in self._groups:
            group.close(is_shut=False)  # answers may still be on their way from the target
        await self._pause()
        await self.close()
        await self._pause()
        self.allow()
        await self.write(self.config)

    async def _old_flows(self, *groups: Group) -> list[Flow]:
        """Some flows that have been answered."""
        old = [self.begin(group) for group in groups for _ in range(_DRAINED)]
        for flow in old:
            if not await self.answered(flow):
                self._findings.note(f"{flow} is not answered")
        return old

    async def _check_drained(self, old: list[Flow]) -> None:
        await self._pause()
        for flow in old:
            if not await self.answered(flow):
                self._findings.note(f"{flow} may drain, and is not answered")

    async def _pause(self) -> None:
        await trio.sleep(self._random.uniform(*_OFF_S))

    def _open_server(self) -> None:
        self._play.open_server()
        self._tasks.start_soon(self._play.serve)


def sources_of(*groups: Group) -> Sources:
    """These clients, as a forward names them."""
    return Sources.parse(",".join(group.network for group in groups))


def _counted_in(report: dict[str, Any]) -> int:
    """What a forward has counted: what it has dropped, and what it did not let in."""
    refused = [int(number) for reason, number in report["refused"].items() if reason in _REFUSED]
    return sum(map(int, report["dropped"].values())) + sum(refused)
