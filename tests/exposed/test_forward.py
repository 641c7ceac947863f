# SPDX-License-Identifier: GPL-2.0-or-later
"""Over `relay_over_call` as it is: endings as the direct connection has them, and what `OpenForward` adds."""

import contextlib
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
from endings import CLIENT_ABORTS, SCRIPTS, Saw, Script, pattern, play, play_directly
from fakeclient import FakeClient
from helpers import (
    BOUND_S,
    accept,
    accept_socket,
    calls_of,
    connect,
    echo_once,
    free_port,
    is_reset,
    nobody,
    port_of,
    running_listener,
    tcp_pair,
    until,
    write_config,
)

from qubes_fwd_qrexec.common.config import ListenerConfig
from qubes_fwd_qrexec.exposed import call, connectiontable, forward, singlecalls
from qubes_fwd_qrexec.exposed.call import CallTimeouts
from qubes_fwd_qrexec.exposed.callwaits import CallWaits
from qubes_fwd_qrexec.exposed.forward import Means, OpenForward
from qubes_fwd_qrexec.exposed.singlecalls import SingleCalls
from qubes_fwd_qrexec.exposed.transports import Transports
from qubes_fwd_qrexec.relay.copy import undelivered_bytes
from qubes_fwd_qrexec.relay.thread import open_relay_thread


async def play_relayed(script: Script, server: socket.socket, directory: Path) -> Saw:
    port = free_port()
    write_config(directory / "config", port, port_of(server))
    async with running_listener(directory / "config", FakeClient(directory, "serve").command):
        return await play(script, ("127.0.0.1", port), server)


@pytest.fixture(autouse=True)
def _patience(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an abort the call's status comes, however long a busy machine takes to end a program."""
    if "abort" in request.node.name:
        monkeypatch.setattr(call, "STATUS_WAIT_S", BOUND_S)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
async def test_both_sides_see_what_they_see_directly(
    tmp_path: Path, server: socket.socket, script: Script
) -> None:
    directly = await play_directly(script, server)
    relayed = await play_relayed(script, server, tmp_path)
    assert relayed == directly


@pytest.mark.parametrize("script", CLIENT_ABORTS, ids=lambda script: script.__name__)
async def test_a_clients_abort_ends_its_call_with_violence(
    tmp_path: Path, server: socket.socket, script: Script
) -> None:
    """Here the call's client is the service itself; tests/test_endings.py has what raw qrexec makes of it."""
    directly = await play_directly(script, server)
    relayed = await play_relayed(script, server, tmp_path)
    assert directly.server[-1] == "RST"
    assert relayed == directly


async def test_streams_at_once_keep_their_bytes_apart(tmp_path: Path, server: socket.socket) -> None:
    port = free_port()
    write_config(tmp_path / "config", port, port_of(server))

    async def echo(stream: trio.SocketStream) -> None:
        try:
            async with stream:
                async for chunk in stream:
                    await stream.send_all(chunk)
                await stream.send_eof()
        except trio.BrokenResourceError:
            pass

    async def serve() -> None:
        async with trio.open_nursery() as streams:
            while True:
                await trio.lowlevel.wait_readable(server)
                sock, _ = server.accept()
                sock.setblocking(False)
                streams.start_soon(echo, trio.SocketStream(trio.socket.from_stdlib_socket(sock)))

    async def converse(number: int) -> None:
        sent = pattern(200_000, number)
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream, trio.open_nursery() as both:

            async def upload() -> None:
                await stream.send_all(sent)
                await stream.send_eof()

            if number % 4 == 3:  # this one aborts in mid-stream
                await stream.send_all(sent[:50_000])
                assert sent.startswith(await stream.receive_some())
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                return
            both.start_soon(upload)
            got = b""
            async for chunk in stream:
                got += chunk
            assert got == sent

    with trio.fail_after(3 * BOUND_S):
        async with running_listener(tmp_path / "config", FakeClient(tmp_path, "serve").command):  # noqa: SIM117
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve)
                async with trio.open_nursery() as clients:
                    for number in range(12):
                        clients.start_soon(converse, number)
                nursery.cancel_scope.cancel()


async def test_what_came_before_an_abort_is_delivered_to_a_slow_client(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than the client's own buffer holds is still in ours when the server's abort is known."""
    monkeypatch.setattr(singlecalls, "DELIVERY_S", BOUND_S)
    port = free_port()
    write_config(tmp_path / "config", port, port_of(server))
    sent = pattern(150_000)  # fits the send buffer that `acceptloop` sets
    async with running_listener(tmp_path / "config", FakeClient(tmp_path, "serve").command) as listener:
        with trio.socket.socket() as client, trio.fail_after(BOUND_S):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            await client.connect(("127.0.0.1", port))
            far = await accept_socket(server)
            far_stream = trio.SocketStream(trio.socket.from_stdlib_socket(far))
            await far_stream.send_all(sent)
            far_stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            await until(lambda: undelivered_bytes(far) == 0)
            far_stream.socket.close()
            await until(lambda: calls_of(listener) == 0)  # the call is over, and all is here
            got = b""
            with pytest.raises(ConnectionResetError):  # noqa: PT012
                while True:
                    chunk = await client.recv(4096)
                    assert chunk, "an end of file"
                    got += chunk
            assert got == sent


async def test_what_a_client_still_sends_is_read_while_its_last_bytes_wait() -> None:
    client, accepted = tcp_pair()
    with client, accepted:
        with contextlib.suppress(BlockingIOError):
            while True:
                accepted.send(bytes(65536))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(singlecalls.delivered, accepted, BOUND_S)
            left = 16 << 20  # more than all buffers of the kernel hold

            def all_taken() -> bool:
                nonlocal left
                with contextlib.suppress(BlockingIOError):
                    left -= client.send(bytes(min(left, 65536)))
                return not left

            await until(all_taken)
            nursery.cancel_scope.cancel()


async def test_a_client_that_never_reads_holds_an_abort_up_for_a_moment_only(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(singlecalls, "DELIVERY_S", 0.1)
    port = free_port()
    write_config(tmp_path / "config", port, port_of(server))
    async with running_listener(tmp_path / "config", FakeClient(tmp_path, "serve").command) as listener:
        (serving,) = listener.forwards.values()
        async with await trio.open_tcp_stream("127.0.0.1", port):
            with trio.fail_after(BOUND_S):
                far_stream = await accept(server)
                with trio.move_on_after(0.3):
                    await far_stream.send_all(bytes(30 << 20))
                far_stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                far_stream.socket.close()
                serving.close()
                await until(lambda: not serving.live)


def config(port: int, **options: str) -> ListenerConfig:
    given = {"listen": "127.0.0.1", "srchosts": "127.0.0.0/8", "dstports": "80-80"} | options
    text = " ".join(f"{name.replace('_', '-')}={value}" for name, value in given.items())
    return ListenerConfig.parse(
        "fwd.work.web",
        f"version=1 service=qubes.ForwardTCP transport=call side=outer srcports={port}-{port} {text}",
    )


@asynccontextmanager
async def means(client: tuple[str, ...]) -> AsyncIterator[Means]:
    async with open_relay_thread() as relays, trio.open_nursery() as tasks:
        tasks.start_soon(relays.watch)
        yield Means(Transports(client, relays, tasks, 32, CallTimeouts()))
        tasks.cancel_scope.cancel()


async def test_what_drains_after_a_narrowing_is_cut_when_its_time_is_over(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is allowed again meanwhile, to the same port of the target, goes on."""
    clock = [time.monotonic()]
    monkeypatch.setattr(connectiontable, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(connectiontable, "TICK_S", 0.01)
    port = free_port()
    wide = {"srchosts": "127.0.0.0/8", "dstports": f"{port_of(server)}-{port_of(server)}"}
    async with means(FakeClient(tmp_path, "serve").command) as having:
        serving = OpenForward(config(port, **wide), having)
        async with await connect(port) as client, await accept(server) as far:
            await echo_once(client, far)
            for change in ({"srchosts": "127.0.0.2/32"}, {}, {"dstports": "1-1"}):
                serving.reconfigure(config(port, **(wide | change), on_expire="drain"))
                clock[0] += forward.DRAIN_MAX_S - 1 if change else forward.DRAIN_MAX_S
                await echo_once(client, far)
            # Nor does an unrelated change give it more time.
            changed = config(port, **(wide | {"dstports": "1-1"}), on_expire="drain", limits="rate:9")
            serving.reconfigure(changed)
            clock[0] += 2
            assert await is_reset(client)
        serving.close()


async def test_connections_that_are_not_carried_are_logged_once_whatever_the_target_says(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A target has many words, and the log remembers what it has said."""
    port, client = free_port(), FakeClient(tmp_path, "babble")
    write_config(tmp_path / "config", port, 80, transport="mux")
    waits = CallWaits(again_s=0.0)
    async with running_listener(tmp_path / "config", client.command, waits=waits) as listener:
        for number in range(1, 4):
            async with await connect(port) as near:
                assert await is_reset(near)
            refused = {"no-call": number}
            await until(lambda: listener.report().forwards[0].refused == refused)  # noqa: B023
            assert len(client.calls) == number
    assert len([message for message in caplog.messages if "unknown frame type" in message]) == 1


@pytest.mark.usefixtures("bugs_are_wanted")
async def test_a_bug_ends_its_connection_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(SingleCalls, "relay", fail)
    port = free_port()
    async with means(("unused",)) as having:
        serving = OpenForward(config(port), having)
        for _ in range(2):
            async with await trio.open_tcp_stream("127.0.0.1", port) as near:
                with trio.fail_after(BOUND_S), pytest.raises(trio.BrokenResourceError):
                    await near.receive_some()
        await until(lambda: not serving.live)
        serving.close()
        assert having.transports.relays.loop.bugs.count == 2
    (record,) = (record for record in caplog.records if "a bug" in record.message)
    assert record.exc_info is not None


async def test_a_failed_relay_thread_is_the_end_of_all(tmp_path: Path) -> None:

    def crash() -> None:
        raise SystemExit("a bug of the loop itself")

    port = free_port()
    with pytest.raises(BaseException) as caught:  # noqa: PT011, PT012
        async with means(FakeClient(tmp_path, "hang").command) as having:
            serving = OpenForward(config(port), having)
            try:
                async with await trio.open_tcp_stream("127.0.0.1", port):
                    await until(lambda: having.transports.relays.waiting)
                    having.transports.relays.order(crash, nobody)
                    with trio.fail_after(BOUND_S):
                        await trio.sleep_forever()
            finally:
                serving.stop_listening()
    found = caught.value
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert "relay thread has failed" in str(found)


async def test_a_new_configuration_with_the_old_expiry_does_not_put_it_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    boot = [50.0]
    monkeypatch.setattr(time, "clock_gettime", lambda which: boot[0])
    wall = [1000.0]
    monkeypatch.setattr(time, "time", lambda: wall[0])
    port = free_port()
    async with means(("unused",)) as having:
        serving = OpenForward(config(port, expire="1010"), having)
        wall[0] = 0  # set back, and then a reload for another reason
        serving.reconfigure(config(port, expire="1010", srchosts="127.0.0.0/9"))
        boot[0] = 60
        assert serving.expiry.is_over()
        serving.reconfigure(config(port, expire="2000"))
        assert not serving.expiry.is_over()
        serving.close()
