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

from qubes_fwd_qrexec.common.errors import RefusedError
from qubes_fwd_qrexec.common.values import TargetPorts
from qubes_fwd_qrexec.exposed import muxcall, muxpool, streamcall, streampool
from qubes_fwd_qrexec.exposed.call import Ending
from qubes_fwd_qrexec.exposed.callbudget import CallBudget
from qubes_fwd_qrexec.exposed.callwaits import CallWaits
from qubes_fwd_qrexec.exposed.streampool import StreamPool
from qubes_fwd_qrexec.mux import Origin, ProxyVersion
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
        self.endings: Collected[Ending | RefusedError] = Collected()

    async def carry(self, accepted: socket.socket, port: int) -> None:
        try:
            self.endings.append(await self.pool.relay(accepted, port, ORIGIN, ProxyVersion.OFF))
        except RefusedError as error:
            self.endings.append(error)
        finally:
            accepted.close()

    def connect(self, port: int) -> trio.SocketStream:
        """A client; its connection is carried from now on."""
        client, accepted = tcp_pair()
        self.tasks.start_soon(self.carry, accepted, port)
        return trio.SocketStream(trio.socket.from_stdlib_socket(client))

    async def refusal(self, port: int) -> str:
        client, accepted = tcp_pair()
        with client, accepted, pytest.raises(RefusedError) as caught, trio.fail_after(BOUND_S):
            await self.pool.relay(accepted, port, ORIGIN, ProxyVersion.OFF)
        return str(caught.value)

    @property
    def mux(self) -> Mux:
        (mux_call,) = self.pool.mux_calls
        assert mux_call.mux is not None
        return mux_call.mux


class Clock(HandClock):
    """The time by which mux calls are looked after."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch, muxpool, muxcall, streampool, streamcall)


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
