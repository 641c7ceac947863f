# SPDX-License-Identifier: GPL-2.0-or-later
"""Mux calls to one port over a stand-in for qrexec-client-vm, and connections that they carry."""

import math
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address

import pytest
import trio
from collected import Collected
from handclock import HandClock
from helpers import BOUND_S, no_fds_left, tcp_pair

from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.exposed import guest, muxcall, muxpool, streamcall, streampool
from qubes_fwd_qrexec.exposed.call import Ending
from qubes_fwd_qrexec.exposed.callbudget import CallBudget
from qubes_fwd_qrexec.exposed.callwaits import CallWaits
from qubes_fwd_qrexec.exposed.connectionlog import How
from qubes_fwd_qrexec.exposed.guest import Guest
from qubes_fwd_qrexec.exposed.streampool import StreamPool
from qubes_fwd_qrexec.mux import Origin
from qubes_fwd_qrexec.relay.budget import Budget
from qubes_fwd_qrexec.relay.mux import Mux
from qubes_fwd_qrexec.relay.thread import RelayThread, open_relay_thread

ORIGIN = Origin(ip_address("192.0.2.1"), 40_000, ip_address("198.51.100.2"), 80)


class Bench:
    """Mux calls to one port, and connections over them."""

    def __init__(self, pool: StreamPool, calls: CallBudget, relays: RelayThread, tasks: trio.Nursery) -> None:
        self.pool = pool
        self.calls = calls
        self.relays = relays
        self.tasks = tasks
        self.endings: Collected[Ending] = Collected()

    async def carry(self, accepted: socket.socket, port: int, origin: Origin = ORIGIN) -> None:
        self.endings.append(await self.relay(accepted, port, origin))

    async def relay(self, accepted: socket.socket, port: int, origin: Origin = ORIGIN) -> Ending:
        """Carry a connection to this port of the target; its socket is closed in the end."""
        config = ListenerConfig.parse(
            "fwd.work.web",
            "version=1 service=qubes.ForwardTCP transport=mux listen=127.0.0.1 side=vifs srchosts=any "
            f"srcports={origin.exposed_port}-{origin.exposed_port} dstports={port}-{port}",
        )
        return await Guest(config, accepted, origin).relay(self.pool, self.relays)

    def connect(self, port: int) -> trio.SocketStream:
        """A client; its connection is carried from now on."""
        client, accepted = tcp_pair()
        self.tasks.start_soon(self.carry, accepted, port)
        return trio.SocketStream(trio.socket.from_stdlib_socket(client))

    async def refusal(self, port: int) -> str:
        client, accepted = tcp_pair()
        with client, trio.fail_after(BOUND_S):
            ending = await self.relay(accepted, port)
        assert (ending.error is None, ending.how) == (False, How.REFUSED)
        return str(ending.error)

    @property
    def mux(self) -> Mux:
        (mux_call,) = self.pool.mux_calls
        assert mux_call.mux is not None
        return mux_call.mux


class Clock(HandClock):
    """The time by which mux calls are looked after."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch, muxpool, muxcall, streampool, streamcall, guest)


@asynccontextmanager
async def pool_to(
    client: tuple[str, ...],
    ports: TargetPorts,
    *,
    budget: Budget | None = None,
    calls_max: int = 20,
    linger_s: float = 60.0,
    half_close_s: float = math.inf,
    waits: CallWaits | None = None,
) -> AsyncIterator[Bench]:
    with no_fds_left():
        async with open_relay_thread() as relays, trio.open_nursery() as tasks:
            service = f"qubes.ForwardTCP+{ports.brief()}+mux"
            calls = CallBudget(tasks, calls_max, waits=waits)
            budget = budget or Budget()
            pool = StreamPool(
                client, calls, "work", service, ports, relays, tasks, budget, half_close_s, linger_s
            )
            yield Bench(pool, calls, relays, tasks)
            tasks.cancel_scope.cancel()


def one(port: int) -> TargetPorts:
    return TargetPorts(port, port)


async def end_well(near: trio.SocketStream, far: trio.SocketStream) -> None:
    with trio.fail_after(BOUND_S):
        await near.send_eof()
        assert await far.receive_some() == b""
        await far.send_eof()
        assert await near.receive_some() == b""
