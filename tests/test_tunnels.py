# SPDX-License-Identifier: GPL-2.0-or-later
"""The exposed qube's tunnels, over a stand-in for qrexec-client-vm and the real service behind it."""

import math
import os
import random
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from ipaddress import ip_address
from pathlib import Path

import pytest
import trio
from endings import pattern
from helpers import (
    BOUND_S,
    FakeClient,
    accept,
    echo_once,
    free_port,
    no_fds_left,
    port_of,
    tcp_pair,
    until,
)

from qubes_fwd_qrexec import tunnels as tunnels_module
from qubes_fwd_qrexec.budget import FLOOR_BYTES, Budget
from qubes_fwd_qrexec.call import Ending
from qubes_fwd_qrexec.errors import RefusedError
from qubes_fwd_qrexec.mux import Mux
from qubes_fwd_qrexec.relay import half_close
from qubes_fwd_qrexec.relaythread import RelayThread, open_relay_thread
from qubes_fwd_qrexec.targets import Target
from qubes_fwd_qrexec.tunnel import Origin, ProxyVersion
from qubes_fwd_qrexec.tunnels import Tunnels
from qubes_fwd_qrexec.values import TargetPorts

pytestmark = pytest.mark.usefixtures("tunnel_home")

ORIGIN = Origin(ip_address("192.0.2.1"), 40_000, ip_address("198.51.100.2"), 80)


class Bench:
    """Tunnels to one port, and connections over them."""

    def __init__(self, tunnels: Tunnels, target: Target, relays: RelayThread, tasks: trio.Nursery) -> None:
        self.tunnels = tunnels
        self.target = target
        self.relays = relays
        self.tasks = tasks
        self.endings: list[Ending | RefusedError] = []

    async def carry(self, accepted: socket.socket, port: int) -> None:
        try:
            self.endings.append(await self.tunnels.relay(accepted, port, ORIGIN, ProxyVersion.OFF))
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
            await self.tunnels.relay(accepted, port, ORIGIN, ProxyVersion.OFF)
        return str(caught.value)

    @property
    def mux(self) -> Mux:
        (tunnel,) = self.tunnels._tunnels
        assert tunnel.mux is not None
        return tunnel.mux


@asynccontextmanager
async def tunnels_to(
    client: tuple[str, ...],
    ports: TargetPorts,
    *,
    budget: Budget | None = None,
    target: Target | None = None,
    linger_s: float = 60.0,
) -> AsyncIterator[Bench]:
    target = target or Target("work", chance=lambda: 0.0)
    with no_fds_left():
        async with open_relay_thread() as relays, trio.open_nursery() as tasks:
            service = f"qubes.ForwardTCP+{ports.brief()}+tunnel"
            tunnels = Tunnels(
                client, target, service, ports, relays, budget or Budget(), tasks, math.inf, linger_s
            )
            yield Bench(tunnels, target, relays, tasks)
            tasks.cancel_scope.cancel()


def one(port: int) -> TargetPorts:
    return TargetPorts(port, port)


async def is_reset(stream: trio.SocketStream) -> bool:
    with trio.fail_after(BOUND_S):
        try:
            while await stream.receive_some():
                pass
        except trio.BrokenResourceError as error:
            return isinstance(error.__cause__, ConnectionResetError)
    return False


async def end_well(near: trio.SocketStream, far: trio.SocketStream) -> None:
    with trio.fail_after(BOUND_S):
        await near.send_eof()
        assert await far.receive_some() == b""
        await far.send_eof()
        assert await near.receive_some() == b""


# One tunnel


async def test_many_connections_are_one_call(tmp_path: Path, server: socket.socket) -> None:
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    async with tunnels_to(client.command, one(port)) as bench, AsyncExitStack() as stack:
        for _ in range(10):
            near = await stack.enter_async_context(bench.connect(port))
            far = await stack.enter_async_context(await accept(server))
            await echo_once(near, far)
            await end_well(near, far)
        await until(lambda: len(bench.endings) == 10)
        assert bench.endings == [Ending(None, False, 1, 1)] * 10
        assert bench.target.calls == 1
    assert client.calls == [f"work qubes.ForwardTCP+{port}+tunnel"]


async def test_those_who_come_while_it_opens_share_it(tmp_path: Path, server: socket.socket) -> None:
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    async with tunnels_to(client.command, one(port)) as bench, AsyncExitStack() as stack:
        for _ in range(20):
            await stack.enter_async_context(bench.connect(port))
        for _ in range(20):
            await stack.enter_async_context(await accept(server))
    assert len(client.calls) == 1


async def test_a_range_is_one_call_and_every_port_its_own_server(
    tmp_path: Path, server: socket.socket
) -> None:
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    ports = TargetPorts(port - 1, port + 1)
    async with tunnels_to(client.command, ports) as bench:
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
        async with bench.connect(port - 1):
            await until(lambda: len(bench.endings) == 2)
        assert [e for e in bench.endings if isinstance(e, Ending) and e.error and "refused" in e.error]
    assert client.calls == [f"work qubes.ForwardTCP+{ports.brief()}+tunnel"]


async def test_a_refused_connection_is_left_to_whoever_asked(tmp_path: Path) -> None:
    port = free_port()
    async with tunnels_to(FakeClient(tmp_path, "serve").command, one(port)) as bench:
        client, accepted = tcp_pair()
        with client, accepted, trio.fail_after(BOUND_S):
            client.send(b"unread")
            ending = await bench.tunnels.relay(accepted, port, ORIGIN, ProxyVersion.OFF)
            assert ending == Ending("the server in the target refused the connection", False, 0, 0)
            assert accepted.recv(10) == b"unread"


async def test_a_full_budget_refuses_here(tmp_path: Path, server: socket.socket) -> None:
    port = port_of(server)
    budget = Budget(FLOOR_BYTES, 1)
    command = FakeClient(tmp_path, "serve").command
    async with tunnels_to(command, one(port), budget=budget) as bench:  # noqa: SIM117
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            client, accepted = tcp_pair()
            with client, accepted:
                ending = await bench.tunnels.relay(accepted, port, ORIGIN, ProxyVersion.OFF)
                assert ending.error == "this qube holds as many connections as it may"


# When there is none to be had


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("exit126", "policy refuses the call"),
        ("exit127", "does not have the service"),
        ("exit125", "cannot be reached"),
        ("exit0", "without a final GOAWAY"),
    ],
)
async def test_a_call_that_fails_is_a_reason_of_its_own_and_dom0_is_left_alone(
    tmp_path: Path, mode: str, words: str
) -> None:
    """relay-behaviours 23 and 24."""
    client, port = FakeClient(tmp_path, mode), free_port()
    async with tunnels_to(client.command, one(port)) as bench:
        first = await bench.refusal(port)
        assert first.startswith("no tunnel to work: ")
        assert words in first
        for _ in range(20):
            again = await bench.refusal(port)
            assert "is tried again in" in again
            assert words in again
        assert bench.target.calls == 0
        assert not bench.tunnels._tunnels
    assert len(client.calls) == 1


async def test_a_client_program_that_is_not_there_is_named() -> None:
    port = free_port()
    async with tunnels_to(("/nonexistent/client",), one(port)) as bench:
        assert "cannot start /nonexistent/client: No such file" in await bench.refusal(port)


async def test_all_who_wait_are_told_when_the_call_dies_before_its_hello(tmp_path: Path) -> None:
    client, port = FakeClient(tmp_path, "die"), free_port()
    async with tunnels_to(client.command, one(port)) as bench, AsyncExitStack() as stack:
        for _ in range(20):
            await stack.enter_async_context(bench.connect(port))
        await until(lambda: len(bench.endings) == 20)
        assert all(isinstance(ending, RefusedError) for ending in bench.endings)
    assert len(client.calls) == 1


async def test_waiting_is_bounded_in_number_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """relay-behaviours 25 and 26."""
    monkeypatch.setattr(tunnels_module, "WAITING_MAX", 5)
    monkeypatch.setattr(tunnels_module, "HELLO_S", 0.3)
    client, port = FakeClient(tmp_path, "hang"), free_port()
    async with tunnels_to(client.command, one(port)) as bench, AsyncExitStack() as stack:
        for _ in range(5):
            await stack.enter_async_context(bench.connect(port))
        await until(lambda: bench.tunnels._waiting == 5)
        assert await bench.refusal(port) == "5 connections wait for a tunnel to work"
        await until(lambda: len(bench.endings) == 5)
        assert {str(ending) for ending in bench.endings} == {"no tunnel to work within 0.3 s"}
        assert bench.tunnels._waiting == 0
    assert len(client.calls) == 1


async def test_without_a_slot_for_another_call_it_says_so_and_blames_nobody(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qubes_fwd_qrexec.targets.WAIT_S", 0.05)
    client, target, port = FakeClient(tmp_path, "serve"), Target("work", 1), port_of(server)
    async with tunnels_to(client.command, one(port), target=target) as bench:
        async with target.slot("another service"):
            assert "work has 1 calls, and none ended" in await bench.refusal(port)
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)


# When it is lost


async def test_a_killed_call_is_an_abort_for_everybody_and_the_next_connection_has_a_new_one(
    tmp_path: Path, server: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    """relay-behaviours 27 and 28."""
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    async with tunnels_to(client.command, one(port)) as bench:
        async with AsyncExitStack() as stack:
            pairs = []
            for _ in range(5):
                near = await stack.enter_async_context(bench.connect(port))
                pairs.append((near, await stack.enter_async_context(await accept(server))))
            for near, far in pairs:
                await echo_once(near, far)
            with trio.fail_after(1):
                kill_children()
                for near, far in pairs:
                    assert await is_reset(near)
                    assert await is_reset(far)
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            kill_children()
            assert await is_reset(near)
        await until(lambda: not bench.tunnels._tunnels)
        assert "is tried again in" in await bench.refusal(port)
    assert len(client.calls) == 2
    assert len([m for m in caplog.messages if "a tunnel to work was lost" in m]) == 1


def kill_children() -> None:
    for children in Path("/proc/self/task").glob("*/children"):
        for pid in children.read_text().split():
            os.kill(int(pid), signal.SIGKILL)


async def test_a_tunnel_that_was_proven_is_forgiven_its_end(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnels_module, "_PROVEN_S", 0.0)
    monkeypatch.setattr(tunnels_module, "_LOOK_S", 0.01)
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    async with tunnels_to(client.command, one(port)) as bench:
        for _ in range(4):
            async with bench.connect(port) as near, await accept(server) as far:
                await echo_once(near, far)
                await until(lambda: not bench.target._back_offs)
                kill_children()
                assert await is_reset(near)
            await until(lambda: not bench.tunnels._tunnels)
    assert len(client.calls) == 4


@pytest.mark.parametrize("mode", ["rude close", "rude drain", "rude die", "rude refuse"])
async def test_a_target_that_gives_tunnels_up_is_no_flood_of_calls(tmp_path: Path, mode: str) -> None:
    client, port = FakeClient(tmp_path, mode), free_port()
    async with tunnels_to(client.command, one(port)) as bench:
        for _ in range(20):
            near, accepted = tcp_pair()
            with near, accepted, trio.fail_after(BOUND_S), suppress(RefusedError):
                await bench.tunnels.relay(accepted, port, ORIGIN, ProxyVersion.OFF)
    assert len(client.calls) <= 3


async def test_a_stream_is_not_asked_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "check_back_off", lambda *_: None)
    monkeypatch.setattr(tunnels_module, "_TRIES", 2)
    client, port = FakeClient(tmp_path, "rude refuse"), free_port()
    async with tunnels_to(client.command, one(port)) as bench:
        assert await bench.refusal(port) == "work took none of 2 requests for a stream"
    assert len(client.calls) == 2


# Several


async def test_a_full_tunnel_is_joined_by_another(tmp_path: Path, server: socket.socket) -> None:
    client, port = FakeClient(tmp_path, "tunnel STREAMS_MAX=3"), port_of(server)
    async with tunnels_to(client.command, one(port)) as bench, AsyncExitStack() as stack:
        pairs = []
        for _ in range(10):
            near = await stack.enter_async_context(bench.connect(port))
            pairs.append((near, await stack.enter_async_context(await accept(server))))
        for near, far in pairs:
            await echo_once(near, far)
        assert [tunnel.streams for tunnel in bench.tunnels._tunnels] == [3, 3, 3, 1]
    assert len(client.calls) == 4


async def test_all_at_once_find_room_too(tmp_path: Path, server: socket.socket) -> None:
    client, port = FakeClient(tmp_path, "tunnel STREAMS_MAX=3"), port_of(server)
    async with tunnels_to(client.command, one(port)) as bench, AsyncExitStack() as stack:
        for _ in range(10):
            await stack.enter_async_context(bench.connect(port))
        for _ in range(10):
            await stack.enter_async_context(await accept(server))
    assert len(client.calls) == 4


async def test_slots_that_wait_for_an_answer_are_waited_for(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that come and go faster than the target answers for are no reason for another call."""
    monkeypatch.setattr(tunnels_module, "_LOOK_S", 0.01)
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    async with tunnels_to(client.command, one(port)) as bench:  # noqa: SIM117
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            connection = bench.mux.connection
            room = connection._max_streams
            connection._max_streams = 1
            connection._streams[10] = connection._streams[11] = next(iter(connection._streams.values()))
            async with bench.connect(port) as waiting:
                await until(lambda: bench.tunnels._waiting)
                await trio.sleep(0.05)
                assert len(bench.tunnels._tunnels) == 1
                del connection._streams[10], connection._streams[11]
                connection._max_streams = room
                async with await accept(server) as other:
                    await echo_once(waiting, other)
    assert len(client.calls) == 1


# The lease, linger and end


async def test_past_its_lease_new_connections_have_a_new_call_and_old_ones_go_on(
    tmp_path: Path, server: socket.socket
) -> None:
    """relay-behaviours 53."""
    client, port = FakeClient(tmp_path, "tunnel LEASE_S=1"), port_of(server)
    async with tunnels_to(client.command, one(port)) as bench:  # noqa: SIM117
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            (old,) = bench.tunnels._tunnels
            await until(lambda: not old.has_room)
            async with bench.connect(port) as new_near, await accept(server) as new_far:
                await echo_once(new_near, new_far)
                await echo_once(near, far)
                await end_well(near, far)
                await until(lambda: old not in bench.tunnels._tunnels)
    assert len(client.calls) == 2


async def test_without_streams_it_is_kept_a_while_and_then_ends(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnels_module, "_LOOK_S", 0.01)
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    async with tunnels_to(client.command, one(port), linger_s=0.3) as bench:
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            await trio.sleep(0.5)
            assert len(bench.tunnels._tunnels) == 1
            await end_well(near, far)
        began = trio.current_time()
        await until(lambda: not bench.tunnels._tunnels)
        assert trio.current_time() - began >= 0.25
        async with bench.connect(port), await accept(server):
            pass
    assert len(client.calls) == 2


async def test_a_stream_that_is_over_between_two_looks_keeps_it(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunnels_module, "_LOOK_S", 0.2)
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    async with tunnels_to(client.command, one(port), linger_s=0.3) as bench:
        for _ in range(6):
            async with bench.connect(port) as near, await accept(server) as far:
                await echo_once(near, far)
                await end_well(near, far)
            await trio.sleep(0.15)
        assert len(bench.tunnels._tunnels) == 1
    assert len(client.calls) == 1


async def test_retired_they_end_with_their_last_stream_and_open_no_other(
    tmp_path: Path, server: socket.socket
) -> None:
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    async with tunnels_to(client.command, one(port)) as bench:
        async with bench.connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            bench.tunnels.retire()
            assert await bench.refusal(port) == "the forward to work is over"
            await echo_once(near, far)
            await end_well(near, far)
        await until(lambda: not bench.tunnels._tunnels)
    assert len(client.calls) == 1


async def test_retired_while_it_opens_it_ends(tmp_path: Path, server: socket.socket) -> None:
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    async with tunnels_to(client.command, one(port)) as bench:
        async with bench.connect(port):
            await until(lambda: bench.tunnels._tunnels)
            bench.tunnels.retire()
            await until(lambda: not bench.tunnels._tunnels and bench.endings)
        assert all(isinstance(ending, RefusedError) for ending in bench.endings)


async def test_half_closed_for_too_long_is_an_abort(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = port_of(server)
    async with tunnels_to(FakeClient(tmp_path, "serve").command, one(port)) as bench:
        bench.tunnels._half_close_s = 0.1
        monkeypatch.setattr("qubes_fwd_qrexec.mux._HALF_CLOSE_LOOK_TICKS", 1)
        async with bench.connect(port) as near, await accept(server) as far:
            await near.send_eof()
            assert await is_reset(near)
            assert not await is_reset(far)  # after an end of file an abort shows only to who sends
            await until(lambda: bench.endings)


# Cancellation and failure


async def test_a_cancelled_connection_is_an_abort_at_both_ends_and_the_others_go_on(
    tmp_path: Path, server: socket.socket
) -> None:
    port = port_of(server)
    async with tunnels_to(FakeClient(tmp_path, "serve").command, one(port)) as bench:  # noqa: SIM117
        async with bench.connect(port) as other, await accept(server) as other_far:
            client, accepted = tcp_pair()
            near = trio.SocketStream(trio.socket.from_stdlib_socket(client))
            async with near, trio.open_nursery() as nursery:
                nursery.start_soon(bench.carry, accepted, port)
                async with await accept(server) as far:
                    await echo_once(near, far)
                    nursery.cancel_scope.cancel()
                    assert await is_reset_shielded(near)
                    assert await is_reset_shielded(far)
            await echo_once(other, other_far)


async def is_reset_shielded(stream: trio.SocketStream) -> bool:
    with trio.CancelScope(shield=True):
        return await is_reset(stream)


@pytest.mark.parametrize("mode", ["serve", "exit126", "rude refuse"])
async def test_a_cancellation_at_any_moment_leaves_nothing(
    tmp_path: Path, server: socket.socket, mode: str
) -> None:
    port = port_of(server)
    server.listen(1000)
    chance = random.Random(1)
    async with tunnels_to(FakeClient(tmp_path, mode).command, one(port)) as bench:
        bench.target.check_back_off = lambda _service: None  # type: ignore[method-assign]
        for _ in range(60):
            client, accepted = tcp_pair()
            with client, trio.move_on_after(chance.random() * 0.004):
                await bench.carry(accepted, port)
        await until(lambda: not any(tunnel.streams for tunnel in bench.tunnels._tunnels))
        assert bench.tunnels._waiting == 0
        assert bench.tunnels._budget.streams == 0
        assert bench.tunnels._budget.shared_left == Budget().shared_left
        assert not bench.relays.has_failed
        assert not [t for t in bench.tunnels._tunnels if t._waiting]


async def test_a_call_that_cannot_be_watched_is_that_tunnels_trouble(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = port_of(server)
    async with tunnels_to(FakeClient(tmp_path, "serve").command, one(port)) as bench:

        def refuse(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(bench.relays.loop, "watch", refuse)
            assert "cannot watch the call: No space left" in await bench.refusal(port)
        assert not bench.relays.has_failed


async def test_bytes_and_a_clean_end_are_counted(tmp_path: Path, server: socket.socket) -> None:
    port = port_of(server)
    sent = pattern(300_000)
    async with tunnels_to(FakeClient(tmp_path, "serve").command, one(port)) as bench:
        async with bench.connect(port) as near, await accept(server) as far, trio.open_nursery() as both:

            async def upload() -> None:
                await near.send_all(sent)
                await near.send_eof()

            both.start_soon(upload)
            got = b""
            async for chunk in far:
                got += chunk
            assert got == sent
            half_close(far.socket._sock)
            assert await near.receive_some() == b""
        await until(lambda: bench.endings)
        assert bench.endings == [Ending(None, False, len(sent), 0)]
