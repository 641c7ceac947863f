# SPDX-License-Identifier: GPL-2.0-or-later
"""The broker: it stands in for dom0's policy daemon, and for every qube's qrexec daemon and agent.

It takes calls at one socket for each qube, asks the policy, obeys the knobs, starts the service and hands
the two ends to `Join`. It holds no rule and writes no policy. An error is logged and ends the one call that
had it; in doubt a call is refused.
"""

import errno
import logging
import math
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

import trio

from qubes_fwd_qrexec.common.errors import ForwardError, StoreError, leaves
from qubes_fwd_qrexec.common.values import QubeName
from qubes_fwd_qrexec.relay.thread import RelayThread, open_relay_thread

from . import wire
from .activation import activate
from .agents import AgentProcess, Agents, open_agents
from .evaluator import Allow, Ask, Request
from .inhabitants import end_inhabitants
from .join import CallerEnds, Join
from .places import Places
from .qube import Qube
from .qubechanges import start_with_netvms
from .requests import CallRefusedError, bind_packets, cancel_at_end, parse_request, receive_call, send_quietly
from .room import NoVchanError, Room
from .services import Executable, ServiceMissingError, ServiceUnusableError, find_service
from .started import Started, agents_environment, connect_service, start_process
from .view import LabView

_log = logging.getLogger("qubes_fwd_qrexec.lab")
_ACCEPT_PAUSE_S = 0.1
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
# How long a service that has lost its call may go on when its qube or the lab goes down, before it is killed.
_GRACE_S = 2.0
# How soon a call that a knob holds up notices that the knob was turned back.
_KNOB_POLL_S = 0.05
# How soon a qube halts once its description says so.
_WATCH_S = 0.25
# qrexec-agent-data.c: how long an agent waits for the caller's vchan.
_VCHAN_TIMEOUT_S = 120.0


@dataclass(eq=False, slots=True)
class JoinedCall:
    """A call that policy has allowed. Cancelling ``scope`` loses its vchan."""

    source: str
    target: str
    service: str
    agent: AgentProcess
    scope: trio.CancelScope
    join: Join | None = None

    async def end_with_agent(self) -> None:
        await self.agent.gone.wait()
        if self.agent.is_lost:
            self.scope.cancel()


class Broker:
    """Made by `open_broker`; runs until that block ends."""

    def __init__(
        self,
        view: LabView,
        places: Places,
        relays: RelayThread,
        agents: Agents,
        nursery: trio.Nursery,
        releasing: trio.Nursery,
    ) -> None:
        self.view = view
        self.places = places
        self._relays = relays
        self._agents = agents
        self._nursery = nursery
        self._releasing = releasing
        self._listening: dict[str, trio.CancelScope] = {}
        self._joined: list[JoinedCall] = []
        self._room = Room()
        self._living: dict[AgentProcess, str] = {}
        self._placed: Mapping[QubeName, Qube] = {}
        self._ran: set[QubeName] = set()
        self._begun: set[QubeName] = set()
        self._reloading = trio.Lock()

    @property
    def joined(self) -> tuple[JoinedCall, ...]:
        """The calls that live now, the oldest first."""
        return tuple(self._joined)

    def used_slots(self) -> dict[str, int]:
        """Calls by target; a lost call counts until its service has exited, as on Qubes."""
        return {target: count for target, count in self._room.targets.items() if count}

    async def reload(self) -> None:
        """Do what the lab's directory says now: end what runs in qubes that are halted or gone, join the
        others, and take the calls of those that are new. Raises `StoreError`.
        """
        async with self._reloading:
            self.view.refresh()
            before, self._ran = self._ran, self._running()
            self._begun = self._begun & self._ran | self._ran - before
            for halted in before - self._ran:
                await self._halt(halted)
            if self._placed is not self.view.qubes:
                self._placed = self.view.qubes
                await trio.to_thread.run_sync(self.places.follow, tuple(self._placed.values()))
            wanted = {qube.name for qube in self.view.qubes.values()}
            for name in set(self._listening) - wanted:
                self._listening.pop(name).cancel()
            for name in sorted(wanted - set(self._listening)):
                await self._nursery.start(self._listen, name)

    async def watch(self) -> None:
        """Until cancelled, take up what was changed by hand."""
        told = ""
        while True:
            await trio.sleep(_WATCH_S)
            try:
                await self.reload()
                told = ""
            except StoreError as error:
                if str(error) != told:
                    told = str(error)
                    _log.error("the lab's directory: %s", told)

    def take_begun(self) -> set[QubeName]:
        """The qubes that have started since this was asked last, and run."""
        begun, self._begun = self._begun, set()
        return begun

    def _running(self) -> set[QubeName]:
        return {name for name, qube in self.view.qubes.items() if qube.is_running}

    async def _halt(self, name: str) -> None:
        """End what ends with a qube: all calls from it and to it, and all of its processes."""
        _log.info("%s: halts", name)
        for call in self._joined:
            if name in (call.source, call.target):
                call.scope.cancel()
        agents = [agent for agent, target in self._living.items() if target == name]
        for agent in agents:
            agent.kill()
        with trio.move_on_after(_GRACE_S):
            for agent in agents:
                await agent.gone.wait()

        def end() -> None:
            end_inhabitants(self.view.lab.qube_dir(name).root)
            with suppress(StoreError), self.view.lab.locked():
                pass  # whoever takes the lock mends what the qube has in its QubesDB

        await trio.to_thread.run_sync(end)

    def drop(self, share: float = 1.0, target: str | None = None) -> int:
        """Lose the vchans of a share of the joined calls, the oldest first, and return how many (rounded
        up).
        """
        calls = [call for call in self._joined if target in (None, call.target)]
        lost = calls[: math.ceil(len(calls) * share)]
        for call in lost:
            call.scope.cancel()
        return len(lost)

    async def _listen(
        self, name: str, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED
    ) -> None:
        place = self.view.lab.qube_dir(name)
        with bind_packets(place.agent_socket) as listener:
            async with trio.open_nursery() as nursery:
                self._listening[name] = nursery.cancel_scope
                nursery.start_soon(self._activate, name)
                task_status.started()
                while True:
                    try:
                        agent, _ = await listener.accept()
                    except OSError as error:
                        if error.errno not in _EXHAUSTED:
                            raise
                        _log.warning("%s: %s", name, error.strerror)
                        await trio.sleep(_ACCEPT_PAUSE_S)
                        continue
                    self._nursery.start_soon(self._serve, name, agent)

    async def _activate(self, name: str) -> None:
        """Calls for one connection go to one process, as the qube's socket unit has it."""
        place = self.view.lab.qube_dir(name)
        try:
            await activate(self._agents, place, partial(self.places.namespace_fd, name))
        except (OSError, ForwardError) as error:  # then each call is a program
            _log.warning("%s: calls are not handed over: %s", name, error)

    async def _serve(self, source: str, agent: trio.socket.SocketType) -> None:
        """Serve one call, from its request to its exit status. No error of the call is raised."""
        caller = None
        with agent:
            try:
                call, caller = await receive_call(agent)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(cancel_at_end, agent, nursery.cancel_scope)
                    await self._handle(source, call, caller, agent)
                    nursery.cancel_scope.cancel()
            except* CallRefusedError as refused:
                _log.info("%s: refused: %s", source, "; ".join(map(str, leaves(refused))))
            except* (ForwardError, OSError) as failed:
                _log.error("%s: call failed: %s", source, "; ".join(map(str, leaves(failed))))
            finally:
                if caller is not None:
                    caller.close()

    async def _handle(
        self, source: str, call: wire.Call, caller: CallerEnds, agent: trio.socket.SocketType
    ) -> None:
        request = parse_request(source, call)
        full_name = request.service + request.argument
        self.view.refresh()
        knobs = self.view.knobs
        await trio.sleep(knobs.latency_ms / 1000)
        target = self._judge(request)
        if knobs.refuses(target.name, full_name):
            raise CallRefusedError(f"{full_name} to {target.name}: a knob says so")
        if knobs.hangs(target.name, full_name):
            _log.info("%s: %s to %s hangs: a knob says so", source, full_name, target.name)
            await trio.sleep_forever()
        if not target.is_running:
            await self._start_qube(target.name)
        if self._room.targets[target.name] >= knobs.calls_per_target:
            raise CallRefusedError(f"{full_name} to {target.name}: {knobs.calls_per_target} calls at once")
        with ExitStack() as room:
            try:
                room.enter_context(self._room.vchan(source, call.buffer_size, knobs))
                beginning = room.enter_context(ExitStack())
                beginning.enter_context(self._room.beginning(source, knobs))
            except NoVchanError as error:
                _log.info("%s: %s to %s: no room for a vchan", source, full_name, target.name)
                self._releasing.start_soon(self._wait_for_vchan, await self._fork(target.name))
                await send_quietly(agent, wire.NO_VCHAN + str(error).encode())
                return
            forked = await self._fork(target.name)
            beginning.close()
            joined = JoinedCall(source, target.name, full_name, forked, trio.CancelScope())
            self._joined.append(joined)
            try:
                with joined.scope:
                    self._nursery.start_soon(joined.end_with_agent)
                    await agent.send(wire.CONNECTED)
                    await self._wait_while_parked(joined)
                    caller.begin()
                    status = await self._carry(joined, call, caller, agent)
                    caller.end_source()
                    await send_quietly(agent, wire.encode_exit(status))
                    _log.info("%s: %s to %s ended with %d", source, full_name, target.name, status)
            finally:
                self._joined.remove(joined)
                self._releasing.start_soon(self._release, joined)

    async def _carry(
        self, joined: JoinedCall, call: wire.Call, caller: CallerEnds, agent: trio.socket.SocketType
    ) -> int:
        """From the handshake to the exit status."""
        try:
            started = await self._start_service(joined)
        except (ServiceMissingError, ServiceUnusableError) as error:
            # qrexec-agent-data.c: first the output's end, and then the exit status.
            _log.warning("%s: %s to %s: %s", joined.source, joined.service, joined.target, error)
            caller.end_sink()
            return wire.EXIT_NOT_FOUND if isinstance(error, ServiceMissingError) else wire.EXIT_PROBLEM
        joined.join = Join(self._relays, caller, started, call.prefix)
        return await joined.join.run(lambda data: send_quietly(agent, wire.STDERR + data))

    async def _wait_while_parked(self, joined: JoinedCall) -> None:
        """The caller does not answer the handshake; the agent waits for it, without a deadline."""
        while self.view.knobs.parks(joined.target, joined.service):
            await trio.sleep(_KNOB_POLL_S)
            self.view.refresh()

    def _judge(self, request: Request) -> Qube:
        """The target; raises `CallRefusedError`."""
        source = self.view.find(request.source)
        if source is None or not source.is_running:
            raise CallRefusedError(f"{request.source} is not running")
        if source.is_admin:
            # dom0's own calls (qrexec-client -d) are not subject to policy.
            target = self.view.find(request.target)
            if target is None:
                raise CallRefusedError(f"a lab has no {request.target}")
            if not target.is_running:
                # Nor do they start a qube: there is no daemon to connect to.
                raise CallRefusedError(f"{target.name} is not running")
            return target
        verdict = self.view.judge(request)
        asked = f"{request.service}{request.argument} to {request.target or '@default'}"
        if isinstance(verdict, Ask):
            raise CallRefusedError(f"{asked}: the policy asks the user, which a lab cannot do")
        if not isinstance(verdict, Allow):
            raise CallRefusedError(f"{asked}: {verdict.reason}")
        target = self.view.find(verdict.target)
        if target is None:
            raise CallRefusedError(f"{asked}: a lab has no {verdict.target}")
        return target

    async def _start_qube(self, name: str) -> None:
        def start() -> None:
            with self.view.lab.locked():
                start_with_netvms(self.view.lab, name)

        _log.info("%s: starts", name)
        await trio.to_thread.run_sync(start)
        await self.reload()

    async def _fork(self, target: str) -> AgentProcess:
        """The agent's process of a call that dom0 has allowed; it has a place until it is gone."""
        self._room.targets[target] += 1
        try:
            agent = await self._agents.fork()
        except BaseException:
            self._room.targets[target] -= 1
            raise
        self._living[agent] = target
        return agent

    async def _start_service(self, joined: JoinedCall) -> Started:
        """Raises `ServiceMissingError` or `ServiceUnusableError`."""
        place = self.view.lab.qube_dir(joined.target)
        service = find_service(place.service_dirs, place.rpc_config_dirs, joined.service)
        try:
            namespace_fd = self.places.namespace_fd(joined.target)
            if isinstance(service, Executable):
                return await start_process(
                    joined.agent, service, joined.service, joined.source, place.root, namespace_fd
                )
            return await connect_service(joined.agent, service, joined.service, joined.source, namespace_fd)
        except (OSError, StoreError) as error:  # no descriptors, no namespace: the agent's "other problem"
            raise ServiceUnusableError(f"cannot be started: {error}") from error

    async def _release(self, joined: JoinedCall) -> None:
        """After a lost vchan the agent waits for the service, and its call is not over before that ends."""
        joined.agent.let_go()
        if joined.join is not None:
            await joined.join.let_go()
        await self._forget(joined.agent)

    async def _wait_for_vchan(self, agent: AgentProcess) -> None:
        """The agent waits for a vchan that its caller could not make."""
        with trio.move_on_after(_VCHAN_TIMEOUT_S):
            await agent.gone.wait()
        agent.let_go()
        await self._forget(agent)

    async def _forget(self, agent: AgentProcess) -> None:
        await agent.gone.wait()
        self._room.targets[self._living.pop(agent)] -= 1

    async def end_services(self) -> None:
        """Let services that have lost their calls exit, and kill those that do not."""
        for agent in self._living:
            agent.let_go()
        with trio.move_on_after(_GRACE_S):
            for agent in tuple(self._living):
                await agent.gone.wait()
        for agent in self._living:
            agent.kill()


@asynccontextmanager
async def open_broker(view: LabView, places: Places) -> AsyncIterator[Broker]:
    """A broker that accepts calls of every qube by the time the block begins; raises `StoreError`."""
    async with (
        open_agents(agents_environment(os.environ)) as agents,
        open_relay_thread() as relays,
        trio.open_nursery() as releasing,
    ):
        async with trio.open_nursery() as nursery:
            broker = Broker(view, places, relays, agents, nursery, releasing)
            await broker.reload()
            nursery.start_soon(broker.watch)
            yield broker
            nursery.cancel_scope.cancel()
        await broker.end_services()
