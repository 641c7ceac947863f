# SPDX-License-Identifier: GPL-2.0-or-later
"""Flows over the calls to one target: who waits, how fast new ones begin, and what a call says of itself."""

import os
import shlex
import signal
import socket
from collections import Counter
from contextlib import ExitStack, suppress
from ipaddress import ip_address
from pathlib import Path

import pytest
import trio
from fakeclient import FakeClient
from handclock import HandClock
from helpers import (
    BOUND_S,
    accept,
    children,
    connect,
    echo_once,
    free_port,
    port_of,
    running_listener,
    until,
    write_config,
)
from udp_clients import UdpClient, free_udp_port
from udp_forwards import KEY, forward_of, write_udp_config

from qubes_fwd_qrexec.exposed import flowcall, flowpool, muxcall, muxpool
from qubes_fwd_qrexec.exposed.crowd import client_key
from qubes_fwd_qrexec.exposed.flowcounters import Dropped
from qubes_fwd_qrexec.exposed.flowpool import FlowPool
from qubes_fwd_qrexec.exposed.listener import Listener

pytestmark = pytest.mark.usefixtures("no_hurry")

LOOPBACK = ip_address("127.0.0.1")


def pool_of(listener: Listener) -> FlowPool:
    return listener.transports.flow_pool(listener.forwards[KEY].config)


async def test_new_flows_begin_as_fast_as_the_target_takes_them_and_none_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait for their turn, and no second call is made for them."""
    monkeypatch.setattr(flowcall, "FLOWS_AT_ONCE", 4)
    port, client = free_udp_port(), FakeClient(tmp_path, "flows")
    write_udp_config(tmp_path / "config", port)
    async with running_listener(tmp_path / "config", client.command) as listener:
        clients = [UdpClient(port) for _ in range(10)]
        for number, near in enumerate(clients):
            near.send(b"%d" % number)
        for number, near in enumerate(clients):
            assert await near.hear() == b"%d" % number
            near.sock.close()
        assert not pool_of(listener).users()
    assert len(client.calls) == 1


async def test_a_call_knows_who_uses_it_and_since_when_nobody_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "flows")
    write_udp_config(tmp_path / "config", port, limits="rate:1000")
    async with running_listener(tmp_path / "config", client.command) as listener:
        with UdpClient(port) as near, UdpClient(port) as again, UdpClient(port, own="127.0.0.2") as other:
            assert await near.ask(b"x") == b"x"
            assert await again.ask(b"x") == b"x"
            (call,) = pool_of(listener).mux_calls
            assert call.sole_user is not None
            key, idle_s = call.sole_user
            assert key == client_key(LOOPBACK)
            assert 0 <= idle_s < BOUND_S
            assert (call.carries, call.is_used, call.quiet_s) == (2, True, None)
            assert await other.ask(b"x") == b"x"
            assert call.sole_user is None
        forward_of(listener).cut()
        await until(lambda: call.quiet_s is not None)
        assert (call.carries, call.sole_user) == (0, None)


async def test_a_call_that_must_make_room_ends_its_flows_and_the_next_datagram_begins_anew(
    tmp_path: Path,
) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "flows")
    write_udp_config(tmp_path / "config", port)
    async with running_listener(tmp_path / "config", client.command) as listener:
        with UdpClient(port) as near:
            assert await near.ask(b"x") == b"x"
            (call,) = pool_of(listener).mux_calls
            call.make_room()
            await until(lambda: not pool_of(listener).mux_calls)
            assert forward_of(listener).table.counters.refusals == {"made-room": 1}
            assert await near.ask(b"y") == b"y"
    assert len(client.calls) == 2


async def test_without_flows_a_call_is_kept_a_while_and_then_ends(tmp_path: Path) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "flows")
    write_udp_config(tmp_path / "config", port)
    async with running_listener(tmp_path / "config", client.command, linger_s=0.1) as listener:
        with UdpClient(port) as near:
            assert await near.ask(b"x") == b"x"
        forward_of(listener).cut()
        await until(lambda: not pool_of(listener).mux_calls)
        assert pool_of(listener).last_problem is None


async def test_those_that_waited_for_the_call_do_not_all_begin_in_one_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood may have thousands waiting, and other connections and flows have their turns meanwhile."""
    number, began = flowpool.BURST + 20, Counter[int]()
    begin = flowcall.FlowCall.begin

    def counted(self: flowcall.FlowCall, flow: flowcall.Carried) -> int:
        began[self.relays.loop.turn] += 1
        return begin(self, flow)

    monkeypatch.setattr(flowcall.FlowCall, "begin", counted)
    monkeypatch.setattr(flowpool, "WAIT_S", BOUND_S)
    port, client, gate = free_udp_port(), FakeClient(tmp_path, "flows"), tmp_path / "gate"
    os.mkfifo(gate)
    command = ("/bin/sh", "-c", f'read go < {shlex.quote(str(gate))}; exec "$@"', "sh", *client.command)
    write_udp_config(tmp_path / "config", port, limits=f"per-source:{number}")
    async with running_listener(tmp_path / "config", command) as listener:
        with ExitStack() as stack:
            for _ in range(number):
                stack.enter_context(UdpClient(port)).send(b"x")
            await until(lambda: forward_of(listener).connections == number)
            await trio.to_thread.run_sync(gate.write_text, "go\n")
            await until(lambda: began.total() == number)
    assert max(began.values()) <= flowpool.BURST


async def test_one_client_does_not_have_all_the_starts_of_flows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client has many waiting, of which ten begin in a second; another one waits for its turn alone."""
    monkeypatch.setattr(flowcall, "FLOWS_AT_ONCE", 10)
    monkeypatch.setattr(flowpool, "WAIT_S", BOUND_S)
    port, client = free_udp_port(), FakeClient(tmp_path, "flows")
    write_udp_config(tmp_path / "config", port)
    async with running_listener(tmp_path / "config", client.command) as listener:
        with ExitStack() as stack:
            for _ in range(90):
                stack.enter_context(UdpClient(port)).send(b"x")
            await until(lambda: forward_of(listener).connections == 90)
            other = stack.enter_context(UdpClient(port, own="127.0.0.2"))
            assert await other.ask(b"y") == b"y"
            assert pool_of(listener).users() == {client_key(LOOPBACK)}
    assert len(client.calls) == 1


async def test_a_call_in_use_is_renewed_before_its_lease_is_over_and_no_flow_notices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "flows")
    clock = HandClock(monkeypatch, muxpool, muxcall)
    write_udp_config(tmp_path / "config", port)
    async with running_listener(tmp_path / "config", client.command) as listener:
        with UdpClient(port) as near:
            assert await near.ask(b"x") == b"x"
            pool = pool_of(listener)
            (call,) = pool.mux_calls
            for turn in range(2):
                await clock.advance(call.lease_s * muxpool.RENEW_AT_SHARE - 1)
                assert (pool.is_renewing, len(client.calls)) == (False, turn + 1)
                await clock.advance(1)
                await until(lambda: len(client.calls) == turn + 2 and not pool.is_renewing)  # noqa: B023
                assert await near.ask(b"y") == b"y"
            assert pool.mux_calls == [call]
            await clock.advance(call.lease_s * muxpool.RENEW_AT_SHARE - 10)
        forward_of(listener).cut()  # and one without a flow is not worth a question
        await until(lambda: not call.carries)
        await clock.advance(20)
        assert not pool.is_renewing
    assert client.calls == ["work qubes.ForwardUDP+53+mux"] * 3


async def test_what_a_call_drops_counts_once_for_the_forward_whose_datagram_it_was(tmp_path: Path) -> None:
    """Two forwards share the call; and the number does not go down with the call, or its pool."""
    port, other_port, client = free_udp_port(), free_udp_port(), FakeClient(tmp_path, "flows")
    config = tmp_path / "config"
    write_udp_config(config, port)
    write_udp_config(config, other_port, key="udp.work.other")
    async with running_listener(config, client.command) as listener:
        with UdpClient(port) as near, UdpClient(other_port) as other:
            assert await near.ask(b"x") == b"x"
            assert await other.ask(b"x") == b"x"
            (pid,) = children()
            os.kill(pid, signal.SIGSTOP)
            counters, others = (forward_of(listener, key).table.counters for key in (KEY, "udp.work.other"))
            sent = 1

            def has_dropped() -> bool:
                nonlocal sent
                with suppress(BlockingIOError):
                    near.send(bytes(60_000))
                    sent += 1
                return counters.drops.get(Dropped.FULL, 0) > 0

            try:
                await until(has_dropped)
            finally:
                os.kill(pid, signal.SIGKILL)
            await until(lambda: not children() and not pool_of(listener).mux_calls)
            await until(lambda: counters.datagrams_sent + counters.drops.get(Dropped.KERNEL, 0) == sent)
            dropped = dict(counters.drops)
            assert (dropped.keys() <= {"old", "full", "kernel"}, others.drops) == (True, {})
            assert listener.report().forwards[0].dropped == dropped
            write_udp_config(config, port, srcports=f"{port}-{port + 1}", dstports="53-54")
            listener.reload()
            assert listener.report().forwards[0].dropped == dropped
            assert sum(dropped.values()) < sent


@pytest.mark.parametrize("ending", ["exit 127", ""])
@pytest.mark.parametrize("is_shared", [False, True])
async def test_a_flow_whose_forward_gets_other_ports_does_not_wait_for_the_call_to_the_old_ones(
    tmp_path: Path, ending: str, *, is_shared: bool
) -> None:
    """Whether that is refused or answered then, and whether or not another forward needs it."""
    port, fifo, client = free_udp_port(), tmp_path / "fifo", FakeClient(tmp_path, "flows")
    os.mkfifo(fifo)
    end = os.open(fifo, os.O_RDWR)  # a call that reads it, or none
    script = f"""for last; do :; done
        case $last in *+53+mux) read -r _ <{fifo}; {ending or ":"};; esac
        exec {shlex.join(client.command)} "$@" """
    config = tmp_path / "config"
    write_udp_config(config, port)
    if is_shared:
        write_udp_config(config, free_udp_port(), key="udp.work.other")
    async with running_listener(config, ("sh", "-c", script, "sh")) as listener:
        with UdpClient(port) as near:
            near.send(b"old")
            forward, old = forward_of(listener), pool_of(listener)
            await until(lambda: len(old.users()) == 1)
            write_udp_config(config, port, srcports=f"{port}-{port + 1}", dstports="53-54")
            listener.reload()
            assert await near.ask(b"new") == b"new"
            os.write(end, b"\n")
            await until(lambda: not old.users() and not any(call.is_opening for call in old.mux_calls))
            assert await near.ask(b"newer") == b"newer"
            assert not any(call.carries for call in old.mux_calls)
            assert (forward.connections, forward.table.counters.total) == (1, 1)
            assert forward.table.counters.refusals == {}
    os.close(end)


async def test_bulk_starves_neither_another_flow_nor_a_connection_of_the_same_listener(
    tmp_path: Path, server: socket.socket
) -> None:
    port, client, config = free_udp_port(), FakeClient(tmp_path, "flows"), tmp_path / "config"
    write_udp_config(config, port)
    write_config(config, tcp_port := free_port(), port_of(server), key="fwd.work.web", transport="mux")
    async with running_listener(config, client.command) as listener:
        with UdpClient(port) as bulk, UdpClient(port, own="127.0.0.2") as near:
            assert await near.ask(b"x") == b"x"
            async with await connect(tcp_port) as tcp, await accept(server) as far:
                await echo_once(tcp, far)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(flood, bulk)
                    await until(lambda: bulk.heard)
                    for number in range(20):
                        await asked_until_answered(near, b"%d" % number)
                        await echo_once(tcp, far)
                    nursery.cancel_scope.cancel()
        figures = listener.report().forwards
        assert [report.refused for report in figures] == [{}, {}]
        assert figures[1].sent > 100 * 1400


async def flood(client: UdpClient) -> None:
    """Send as fast as this process can, and read what comes back."""
    data = bytes(1400)
    while True:
        for _ in range(20):
            with suppress(BlockingIOError):
                client.send(data)
            with suppress(BlockingIOError):
                client.heard += len(client.sock.recv(2000))
        await trio.lowlevel.checkpoint()


async def asked_until_answered(client: UdpClient, data: bytes) -> None:
    """The kernel may drop a question of anybody where a buffer is full, so it is asked again."""
    with trio.fail_after(BOUND_S):
        while True:
            client.send(data)
            with trio.move_on_after(0.5):
                while await client.hear() != data:
                    pass
                return
