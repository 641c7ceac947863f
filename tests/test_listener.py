# SPDX-License-Identifier: GPL-2.0-or-later
import math
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from fakeclient import FakeClient
from helpers import (
    BOUND_S,
    NEVER_AGAIN,
    accept,
    calls_of,
    can_connect,
    connect,
    echo_once,
    free_port,
    is_listening,
    is_reset,
    no_fds_left,
    port_of,
    running_listener,
    until,
    write_config,
)

from qubes_fwd_qrexec.exposed.callwaits import CallWaits
from qubes_fwd_qrexec.exposed.listener import Listener
from qubes_fwd_qrexec.relay.acceptloop import BindError
from qubes_fwd_qrexec.relay.thread import RelayThread
from qubes_fwd_qrexec.system.configsource import FileSource


async def test_a_connection_reaches_the_port_that_the_configuration_says(
    tmp_path: Path, server: socket.socket
) -> None:
    port, client = free_port(), FakeClient(tmp_path, "serve")
    write_config(tmp_path / "config", port, port_of(server))
    with no_fds_left():
        async with running_listener(tmp_path / "config", client.command):  # noqa: SIM117
            async with await connect(port) as near, await accept(server) as far:
                await echo_once(near, far)
    assert client.calls == [f"work qubes.ForwardTCP+{port_of(server)}"]


async def test_the_relay_thread_is_waited_for_once_however_many_forwards_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it moves many bytes each turn takes a while, and nothing else happens here meanwhile."""
    ports = [free_port() for _ in range(10)]
    for number, port in enumerate(ports):
        write_config(tmp_path / "config", port, 80, transport="mux", key=f"fwd.work.n{number}")
    waits: list[object] = []
    real = RelayThread.do_now

    def do_now(self: RelayThread, what: Callable[[], object]) -> object:
        waits.append(what)
        return real(self, what)

    async with running_listener(tmp_path / "config", FakeClient(tmp_path, "hang").command) as listener:
        monkeypatch.setattr(RelayThread, "do_now", do_now)
        assert len(listener.report(with_clients=True).forwards) == len(ports)
        assert len(waits) == 1
        listener.reload()
        assert len(waits) == 1
        listener.stop()
        await until(lambda: not any(is_listening(port) for port in ports))
    # Once for the ports, and for the connections that are left as often as it is told to end them.
    assert len(waits) <= 5 < len(ports)


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("exit126", "policy refuses"),
        ("exit127", "does not have the service"),
        ("exit125", "cannot be reached"),
        ("serve", "refused the connection"),
    ],
)
async def test_a_call_that_fails_is_a_reset_and_a_line_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str, words: str
) -> None:
    port = free_port()
    write_config(tmp_path / "config", port, free_port())
    async with running_listener(tmp_path / "config", FakeClient(tmp_path, mode).command):  # noqa: SIM117
        async with await connect(port) as near:
            await near.send_all(b"x")
            assert await is_reset(near)
    assert len([m for m in caplog.messages if words in m]) == 1


@pytest.mark.usefixtures("said_once")
async def test_a_client_program_that_is_not_there_is_a_reset_and_the_listener_lives(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    write_config(tmp_path / "config", port, 1)
    async with running_listener(tmp_path / "config", ("/nonexistent/client",)):
        for _ in range(3):
            async with await connect(port) as near:
                assert await is_reset(near)
    assert len([m for m in caplog.messages if "cannot start /nonexistent/client" in m]) == 1


async def test_refused_connections_do_not_flood_dom0(tmp_path: Path) -> None:
    port, client = free_port(), FakeClient(tmp_path, "exit126")
    write_config(tmp_path / "config", port, 1)
    async with running_listener(tmp_path / "config", client.command, waits=NEVER_AGAIN):
        for _ in range(20):
            async with await connect(port) as near:
                assert await is_reset(near)
    assert len(client.calls) == 1


async def test_a_stranger_is_reset_before_any_call(tmp_path: Path) -> None:
    port, client = free_port(), FakeClient(tmp_path, "serve")
    write_config(tmp_path / "config", port, 1, srchosts="192.168.1.0/24,127.0.0.2/32")
    async with running_listener(tmp_path / "config", client.command), await connect(port) as near:
        assert await is_reset(near)
    assert client.calls == []


async def test_a_reload_touches_no_live_connection(tmp_path: Path, server: socket.socket) -> None:
    port, other = free_port(), free_port()
    config = tmp_path / "config"
    write_config(config, port, port_of(server))
    async with running_listener(config, FakeClient(tmp_path, "serve").command) as listener:  # noqa: SIM117
        async with await connect(port) as near, await accept(server) as far:
            for turn in range(20):
                write_config(config, port, port_of(server), srchosts=f"127.0.0.0/{8 + turn % 2}")
                if turn % 2:
                    write_config(config, other, 1, key="fwd.work.other")
                else:
                    (config / "fwd.work.other").unlink(missing_ok=True)
                listener.reload()
                assert can_connect(other) is bool(turn % 2)
                await echo_once(near, far)


async def test_changes_are_noticed_without_a_signal(tmp_path: Path) -> None:
    port, config = free_port(), tmp_path / "config"
    config.mkdir()
    async with running_listener(config, FakeClient(tmp_path, "hang").command):
        assert not can_connect(port)
        write_config(config, port, 1)
        await until(lambda: can_connect(port))
        (config / "fwd.work.web").unlink()
        await until(lambda: not can_connect(port))


async def test_a_bad_new_configuration_leaves_the_old_one_and_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port, new, config = free_port(), free_port(), tmp_path / "config"
    write_config(config, port, 1)
    async with running_listener(config, FakeClient(tmp_path, "hang").command) as listener:
        (config / "fwd.work.web").write_bytes(b"version=1 \0\xff\n")
        (config / "fwd.nonsense").write_text("x")
        write_config(config, new, 1, key="fwd.work.new")
        write_config(config, free_port(), 1, key="fwd.work.lim", limits="connections:0")
        listener.reload()
        assert can_connect(port)
        assert can_connect(new)
        refused = [m for m in caplog.messages if m.startswith("refused: ")]
        assert len(refused) == 3
        assert any("fwd.nonsense" in m for m in refused)


async def test_a_directory_that_disappears_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, 1)
    async with running_listener(config, FakeClient(tmp_path, "hang").command) as listener:
        config.rename(tmp_path / "away")
        listener.reload()
        assert can_connect(port)
        assert any("not reloaded" in m for m in caplog.messages)
        (tmp_path / "away").rename(config)
        (config / "fwd.work.web").unlink()
        listener.reload()
        assert not can_connect(port)


async def test_two_forwards_may_exchange_their_ports(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two, config = free_port(), free_port(), tmp_path / "config"
    client = FakeClient(tmp_path, "exit125")
    write_config(config, one, 1, key="fwd.a.x")
    write_config(config, two, 2, key="fwd.b.x")
    async with running_listener(config, client.command) as listener:
        write_config(config, two, 1, key="fwd.a.x")
        write_config(config, one, 2, key="fwd.b.x")
        listener.reload()
        async with await connect(two) as near:
            assert await is_reset(near)
        async with await connect(one) as near:
            assert await is_reset(near)
    assert client.calls == ["a qubes.ForwardTCP+1", "b qubes.ForwardTCP+2"]
    assert not [m for m in caplog.messages if "not opened" in m]


async def test_a_first_configuration_that_cannot_be_bound_starts_nothing(
    tmp_path: Path, server: socket.socket
) -> None:
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, 1, key="fwd.a.good")
    write_config(config, port_of(server), 1, key="fwd.b.bad")
    with no_fds_left():
        with pytest.raises(BaseException) as caught:  # noqa: PT011 - in groups, as deep as trio nests them
            await Listener(FileSource(config)).run()
        found = caught.value
        while isinstance(found, BaseExceptionGroup):
            (found,) = found.exceptions
        assert isinstance(found, BindError)
    assert not can_connect(port)


async def test_a_removed_forward_cuts_or_drains_as_it_says(tmp_path: Path, server: socket.socket) -> None:
    ports, config = {"cut": free_port(), "drain": free_port()}, tmp_path / "config"
    for how, port in ports.items():
        write_config(config, port, port_of(server), key=f"fwd.work.{how}", on_expire=how)
    async with running_listener(config, FakeClient(tmp_path, "serve").command) as listener:  # noqa: SIM117
        async with await connect(ports["cut"]) as cut, await accept(server):
            async with await connect(ports["drain"]) as drained, await accept(server) as far:
                for how in ports:
                    (config / f"fwd.work.{how}").unlink()
                listener.reload()
                assert await is_reset(cut)
                assert not can_connect(ports["cut"])
                assert not can_connect(ports["drain"])
                await echo_once(drained, far)


async def test_an_expired_forward_is_closed_and_stays_so_when_the_clock_is_set_back(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    port, config, client = free_port(), tmp_path / "config", FakeClient(tmp_path, "serve")
    real = time.time
    offset = [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])
    write_config(config, port, port_of(server), expire=str(int(real()) + 1000))
    async with running_listener(config, client.command) as listener:  # noqa: SIM117
        async with await connect(port) as near, await accept(server):
            offset[0] = 1001
            assert await is_reset(near)
            assert not can_connect(port)
            (problem,) = listener.report().problems
            assert problem.key == "fwd.work.web"
            assert problem.text.startswith("its time is over by this qube's clock, which says ")
            offset[0] = 0
            listener.reload()
            assert not can_connect(port)
            assert [problem.key for problem in listener.report().problems] == ["fwd.work.web"]
            (config / "fwd.work.web").unlink()
            listener.reload()
            assert listener.report().problems == ()


async def test_stopping_closes_the_ports_and_lets_connections_finish(
    tmp_path: Path, server: socket.socket
) -> None:
    port, other, config = free_port(), free_port(), tmp_path / "config"
    write_config(config, port, port_of(server))
    listener = Listener(FileSource(config), FakeClient(tmp_path, "serve").command)
    async with trio.open_nursery() as nursery:
        await nursery.start(listener.run)
        async with await connect(port) as near, await accept(server) as far:
            listener.stop()
            await until(lambda: not is_listening(port))
            write_config(config, other, port_of(server))
            listener.reload()
            assert not can_connect(other)
            await echo_once(near, far)
            await near.send_eof()
            assert await far.receive_some() == b""
            await far.send_eof()
            assert await near.receive_some() == b""
            await until(lambda: not nursery.child_tasks)


async def test_the_drain_has_a_deadline(tmp_path: Path, server: socket.socket) -> None:
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server))
    command = FakeClient(tmp_path, "serve").command
    listener = Listener(FileSource(config), command, drain_s=0.1)
    async with trio.open_nursery() as nursery:
        await nursery.start(listener.run)
        async with await connect(port) as near, await accept(server):
            listener.stop()
            assert await is_reset(near)


async def test_stopping_twice_ends_now(tmp_path: Path, server: socket.socket) -> None:
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server))
    async with trio.open_nursery() as nursery:
        listener = Listener(FileSource(config), FakeClient(tmp_path, "serve").command)
        await nursery.start(listener.run)
        async with await connect(port) as near, await accept(server):
            listener.stop()
            listener.stop()
            assert await is_reset(near)


async def test_stopping_or_reloading_before_the_start_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    listener = Listener(FileSource(tmp_path / "config"))
    listener.reload()
    listener.stop()
    listener.stop()
    with trio.fail_after(BOUND_S):
        await listener.run()


async def test_a_cancelled_listener_leaves_no_descriptor(tmp_path: Path, server: socket.socket) -> None:
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server))
    with no_fds_left():
        async with trio.open_nursery() as nursery:
            listener = Listener(FileSource(config), FakeClient(tmp_path, "serve").command)
            await nursery.start(listener.run)
            async with await connect(port), await accept(server):
                nursery.cancel_scope.cancel()


async def test_many_connections_leave_nothing(tmp_path: Path, server: socket.socket) -> None:
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server))
    # Calls begin four at a time, and a busy machine takes seconds to start each: one may wait for that.
    patient = CallWaits(wait_s=math.inf)
    async with running_listener(config, FakeClient(tmp_path, "serve").command, waits=patient) as listener:

        async def converse() -> None:
            async with await connect(port) as near:
                await near.send_all(b"x")
                assert await near.receive_some() == b"y"
                await near.send_eof()
                assert await near.receive_some() == b""

        async def serve(count: int) -> None:
            for _ in range(count):
                async with await accept(server) as far:
                    assert await far.receive_some() == b"x"
                    await far.send_all(b"y")
                    await far.send_eof()
                    assert await far.receive_some() == b""

        with trio.fail_after(4 * BOUND_S), no_fds_left():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve, 10)
                for _ in range(10):
                    nursery.start_soon(converse)
            await until(lambda: not any(forward.connections for forward in listener.forwards.values()))


async def test_a_client_that_leaves_while_it_waits_makes_no_call(
    tmp_path: Path, server: socket.socket
) -> None:
    port, config, client = free_port(), tmp_path / "config", FakeClient(tmp_path, "serve")
    write_config(config, port, port_of(server))
    async with running_listener(config, client.command, calls_max=1) as listener:
        async with await connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            waiting = await connect(port)
            calls = listener.transports.calls
            await until(lambda: calls.waiting == 1)
            waiting.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            waiting.socket.close()
        await until(lambda: not calls.waiting and not calls_of(listener))
    assert len(client.calls) == 1
