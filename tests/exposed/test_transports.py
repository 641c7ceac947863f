# SPDX-License-Identifier: GPL-2.0-or-later
"""What forwards to the same target share, and how a listener's life shows in its mux calls."""

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest
import trio
from fakeclient import FakeClient
from helpers import (
    BOUND_S,
    NEVER_AGAIN,
    accept,
    can_connect,
    connect,
    echo_once,
    free_port,
    is_listening,
    is_reset,
    no_fds_left,
    port_of,
    running_listener,
    tcp_pair,
    until,
    write_config,
)

from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.common.report import Answer
from qubes_fwd_qrexec.exposed.call import CallTimeouts, Ending
from qubes_fwd_qrexec.exposed.callwaits import CallWaits
from qubes_fwd_qrexec.exposed.guest import Guest
from qubes_fwd_qrexec.exposed.listener import Listener
from qubes_fwd_qrexec.exposed.transports import Transports
from qubes_fwd_qrexec.mux import Origin
from qubes_fwd_qrexec.relay.copy import half_close
from qubes_fwd_qrexec.relay.thread import open_relay_thread
from qubes_fwd_qrexec.system.configsource import FileSource

ORIGIN = Origin(ip_address("192.0.2.1"), 40_000, ip_address("198.51.100.2"), 1000)

pytestmark = pytest.mark.usefixtures("mux_call_home")


def config(port: int, **options: str) -> ListenerConfig:
    given = {
        "version": "1",
        "service": "qubes.ForwardTCP",
        "transport": "mux",
        "listen": "127.0.0.1",
        "srcports": "1000-1000",
        "dstports": f"{port}-{port}",
        "srchosts": "any",
        "side": "vifs",
    } | options
    return ListenerConfig.parse("fwd.work.web", " ".join(f"{n}={value}" for n, value in given.items()))


@asynccontextmanager
async def transports_over(
    client: tuple[str, ...], waits: CallWaits | None = None
) -> AsyncIterator[tuple[Transports, trio.Nursery]]:
    with no_fds_left():
        async with open_relay_thread() as relays, trio.open_nursery() as tasks:
            yield Transports(client, relays, tasks, 32, CallTimeouts(), waits=waits), tasks
            tasks.cancel_scope.cancel()


async def carry_one(transports: Transports, chosen: ListenerConfig, server: socket.socket) -> Ending:
    """One byte each way and both ends of file."""
    client, accepted = tcp_pair()
    endings: list[Ending] = []
    with client, accepted, trio.fail_after(BOUND_S):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def carry() -> None:
                endings.append(await transports.carry(Guest(chosen, accepted, ORIGIN)))

            near = trio.SocketStream(trio.socket.from_stdlib_socket(client))
            async with await accept(server) as far:
                await echo_once(near, far)
                half_close(client)
                assert await far.receive_some() == b""
                await far.send_eof()
    return endings[0]


async def test_either_transport_carries_as_the_forward_says(tmp_path: Path, server: socket.socket) -> None:
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    async with transports_over(client.command) as (transports, _):
        for transport in ("call", "mux"):
            ending = await carry_one(transports, config(port, transport=transport), server)
            assert ending == Ending(None, 1, 1)
    assert client.calls == [f"work qubes.ForwardTCP+{port}", f"work qubes.ForwardTCP+{port}+mux"]
    assert client.options == ["--buffer-size=32768", ""]


async def test_forwards_to_the_same_ports_of_a_target_share_a_mux_call_and_others_do_not(
    tmp_path: Path, server: socket.socket
) -> None:
    client, port = FakeClient(tmp_path, "serve"), port_of(server)
    wide = config(port, srcports="1000-1001", dstports=f"{port}-{port + 1}")
    async with transports_over(client.command) as (transports, _):
        for chosen in (config(port), config(port, proxy="off", srchosts="127.0.0.0/8"), wide):
            await carry_one(transports, chosen, server)
    services = [f"work qubes.ForwardTCP+{ports}+mux" for ports in (port, f"{port}-{port + 1}")]
    assert client.calls == services


@pytest.mark.parametrize("version", ["v1", "v2"])
async def test_the_server_is_told_who_connected(tmp_path: Path, server: socket.socket, version: str) -> None:
    port = port_of(server)
    async with transports_over(FakeClient(tmp_path, "serve").command) as (transports, tasks):
        client, accepted = tcp_pair()
        with client, accepted:
            tasks.start_soon(transports.carry, Guest(config(port, proxy=version), accepted, ORIGIN))
            async with await accept(server) as far:
                header = await far.receive_some()
                if version == "v1":
                    assert header == b"PROXY TCP4 192.0.2.1 198.51.100.2 40000 1000\r\n"
                else:
                    assert header.startswith(b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c")
            client.close()
            await until(lambda: accepted.fileno() < 0)


@pytest.mark.parametrize("transport", ["call", "mux"])
async def test_a_client_that_has_left_makes_no_call(tmp_path: Path, transport: str) -> None:
    fake = FakeClient(tmp_path, "serve")
    async with transports_over(fake.command) as (transports, _):
        client, accepted = tcp_pair()
        with accepted:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
            assert "not connected" in await error_of(transports, config(80, transport=transport), accepted)
    assert fake.calls == []


@pytest.mark.parametrize("transport", ["call", "mux"])
async def test_a_client_program_that_is_not_there_is_a_refusal(transport: str) -> None:
    async with transports_over(("/nonexistent/client",)) as (transports, _):
        client, accepted = tcp_pair()
        with client, accepted:
            error = await error_of(transports, config(80, transport=transport), accepted)
            assert "cannot start /nonexistent/client: No such" in error


async def error_of(transports: Transports, chosen: ListenerConfig, accepted: socket.socket) -> str:
    with trio.fail_after(BOUND_S):
        try:
            ending = await transports.carry(Guest(chosen, accepted, ORIGIN))
        except OSError as error:
            return str(error)
    assert ending.error is not None
    return ending.error


@pytest.mark.parametrize("mode", ["exit126", "exit127"])
@pytest.mark.parametrize("transport", ["call", "mux"])
async def test_after_a_refusal_a_new_configuration_asks_again(
    tmp_path: Path, transport: str, mode: str
) -> None:
    fake, chosen = FakeClient(tmp_path, mode), config(80, transport=transport)
    async with transports_over(fake.command, NEVER_AGAIN) as (transports, _):

        async def ask() -> None:
            client, accepted = tcp_pair()
            with client, accepted:
                assert await error_of(transports, chosen, accepted)

        for _ in range(3):
            await ask()
        assert len(fake.calls) == 1
        transports.reconfigured([chosen])
        await ask()
        assert len(fake.calls) == 2


# A listener's life


def mux_calls_of(listener: Listener) -> int:
    return sum(len(pool.mux_calls) for pool in listener.transports.pools.values())


async def test_a_reload_touches_no_stream(tmp_path: Path, server: socket.socket) -> None:
    """docs/behaviours.md, 29."""
    port, directory, client = free_port(), tmp_path / "config", FakeClient(tmp_path, "serve")
    write_config(directory, port, port_of(server), transport="mux")
    async with running_listener(directory, client.command) as listener:  # noqa: SIM117
        async with await connect(port) as near, await accept(server) as far:
            for turn in range(10):
                write_config(
                    directory, port, port_of(server), transport="mux", srchosts=f"127.0.0.0/{8 + turn % 2}"
                )
                listener.reload()
                await echo_once(near, far)
    assert len(client.calls) == 1


async def test_a_removed_forward_cuts_or_drains_as_it_says(tmp_path: Path, server: socket.socket) -> None:
    ports, directory = {"cut": free_port(), "drain": free_port()}, tmp_path / "config"
    for how, port in ports.items():
        options = {"on_expire": how, "transport": "mux", "key": f"fwd.work.{how}"}
        write_config(directory, port, port_of(server), **options)
    async with running_listener(directory, FakeClient(tmp_path, "serve").command) as listener:  # noqa: SIM117
        async with await connect(ports["cut"]) as cut, await accept(server) as cut_far:
            async with await connect(ports["drain"]) as drained, await accept(server) as far:
                await echo_once(cut, cut_far)
                for how in ports:
                    (directory / f"fwd.work.{how}").unlink()
                listener.reload()
                assert await is_reset(cut)
                assert await is_reset(cut_far)
                assert not can_connect(ports["drain"])
                await echo_once(drained, far)


async def test_mux_calls_that_no_forward_needs_end_with_their_streams(
    tmp_path: Path, server: socket.socket
) -> None:
    port, directory = free_port(), tmp_path / "config"
    write_config(directory, port, port_of(server), transport="mux", on_expire="drain")
    async with running_listener(directory, FakeClient(tmp_path, "serve").command) as listener:
        async with await connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            calls = listener.transports.calls
            (directory / "fwd.work.web").unlink()
            listener.reload()
            assert mux_calls_of(listener) == 0
            await echo_once(near, far)
            assert calls.calls == 1
        await until(lambda: calls.calls == 0)


async def test_stopping_ends_the_mux_calls_with_the_last_stream(
    tmp_path: Path, server: socket.socket
) -> None:
    """docs/behaviours.md, 31: neither their linger nor the drain's deadline is waited for."""
    port, directory = free_port(), tmp_path / "config"
    write_config(directory, port, port_of(server), transport="mux")
    listener = Listener(FileSource(directory), FakeClient(tmp_path, "serve").command, drain_s=1000)
    with trio.fail_after(BOUND_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(listener.run)
            async with await connect(port) as near, await accept(server) as far:
                await echo_once(near, far)
                listener.stop()
                await until(lambda: not is_listening(port))
                await echo_once(near, far)
                await near.send_eof()
                assert await far.receive_some() == b""
                await far.send_eof()
                assert await near.receive_some() == b""


async def test_while_it_drains_no_new_mux_call_is_opened_for_a_trial(
    tmp_path: Path, server: socket.socket
) -> None:
    """It would be one more question to dom0, and hold up the end for as long as an idle mux call is kept."""
    directory, client = tmp_path / "config", FakeClient(tmp_path, "serve")
    port = free_port()
    write_config(directory, port, port_of(server), transport="mux")
    write_config(directory, free_port(), 1, transport="mux", key="fwd.work.other")
    listener = Listener(FileSource(directory), client.command, drain_s=1000)
    with trio.fail_after(BOUND_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(listener.run)
            async with await connect(port) as near, await accept(server) as far:
                await echo_once(near, far)
                listener.stop()
                await until(lambda: not is_listening(port))
                trial = await listener.try_out("fwd.work.other")
                assert trial.answer is Answer.REFUSED
                assert len(client.calls) == 1
                await near.send_eof()
                assert await far.receive_some() == b""
                await far.send_eof()
                assert await near.receive_some() == b""


async def test_the_drain_has_a_deadline(tmp_path: Path, server: socket.socket) -> None:
    port, directory = free_port(), tmp_path / "config"
    write_config(directory, port, port_of(server), transport="mux")
    listener = Listener(FileSource(directory), FakeClient(tmp_path, "serve").command, drain_s=0.1)
    async with trio.open_nursery() as nursery:
        await nursery.start(listener.run)
        async with await connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            listener.stop()
            assert await is_reset(near)
            assert await is_reset(far)
