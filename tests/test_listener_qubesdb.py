# SPDX-License-Identifier: GPL-2.0-or-later
"""The listener over QubesDB: what dom0 sets there is open, and nothing else notices."""

import itertools
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from fake_qubesdb import FakeQubesDB
from fakeclient import FakeClient
from helpers import (
    BOUND_S,
    accept,
    can_connect,
    connect,
    echo_once,
    free_port,
    is_listening,
    is_reset,
    listening_socket,
    no_fds_left,
    port_of,
    until,
)

from qubes_fwd_qrexec.exposed import listener as listener_module
from qubes_fwd_qrexec.exposed import unopened
from qubes_fwd_qrexec.exposed.listener import Listener
from qubes_fwd_qrexec.listener import main
from qubes_fwd_qrexec.system.qubesdbsource import open_qubesdb

pytestmark = pytest.mark.usefixtures("mux_call_home")
WEB = "fwd.work.web"


def line(listen_port: int, target_port: int, **options: str) -> bytes:
    given = {
        "version": "1",
        "service": "qubes.ForwardTCP",
        "transport": "mux",
        "side": "outer",
        "listen": "127.0.0.1",
        "srcports": f"{listen_port}-{listen_port}",
        "dstports": f"{target_port}-{target_port}",
        "srchosts": "127.0.0.0/8",
    } | {name.replace("_", "-"): value for name, value in options.items()}
    return " ".join(f"{name}={value}" for name, value in given.items()).encode()


@asynccontextmanager
async def listening(qubesdb: FakeQubesDB, client: FakeClient) -> AsyncIterator[Listener]:
    with open_qubesdb(qubesdb, start_s=BOUND_S, backoff_s=(0.0, 0.001)) as source:
        listener = Listener(source, client.command, is_whole=False)
        async with trio.open_nursery() as nursery:
            await nursery.start(listener.run)
            yield listener
            listener.stop()
            listener.stop()


async def test_what_is_set_opens_and_what_is_removed_closes(tmp_path: Path, server: socket.socket) -> None:
    port, qubesdb = free_port(), FakeQubesDB()
    with no_fds_left():
        async with listening(qubesdb, FakeClient(tmp_path, "serve")):
            assert not can_connect(port)
            qubesdb.set(WEB, line(port, port_of(server)))
            await until(lambda: is_listening(port))
            async with await connect(port) as near, await accept(server) as far:
                await echo_once(near, far)
            qubesdb.remove(WEB)
            await until(lambda: not can_connect(port))


async def test_what_is_removed_is_cut_or_drained_as_it_says(tmp_path: Path, server: socket.socket) -> None:
    ports = {"cut": free_port(), "drain": free_port()}
    qubesdb = FakeQubesDB(
        {f"fwd.work.{how}": line(port, port_of(server), on_expire=how) for how, port in ports.items()}
    )
    async with listening(qubesdb, FakeClient(tmp_path, "serve")):  # noqa: SIM117
        async with await connect(ports["cut"]) as cut, await accept(server) as cut_far:
            await echo_once(cut, cut_far)
            async with await connect(ports["drain"]) as drained, await accept(server) as far:
                for how in ports:
                    qubesdb.remove(f"fwd.work.{how}")
                assert await is_reset(cut)
                await until(lambda: not can_connect(ports["drain"]))
                await echo_once(drained, far)


async def test_changes_one_after_the_other_are_noticed_by_no_connection_of_others(
    tmp_path: Path, server: socket.socket
) -> None:
    port, others, stop = free_port(), [free_port() for _ in range(3)], trio.Event()
    qubesdb, client = FakeQubesDB({WEB: line(port, port_of(server))}), FakeClient(tmp_path, "serve")
    served = 0

    async def converse() -> None:
        nonlocal served
        while not stop.is_set():
            async with await connect(port) as near:
                await near.send_all(b"x")
                async with await accept(server) as far:
                    assert await far.receive_some() == b"x"
                    await far.send_all(b"y")
                    assert await near.receive_some() == b"y"
            served += 1

    async with listening(qubesdb, client) as listener:  # noqa: SIM117
        async with await connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(converse)
                for turn in range(20):
                    before, served_before = listener.source.stamp(), served
                    if turn % 2:
                        for number in range(3):
                            qubesdb.remove(f"fwd.work.o{number}")
                    else:
                        for number, other in enumerate(others):
                            qubesdb.set(f"fwd.work.o{number}", line(other, 1))
                    qubesdb.set(WEB, line(port, port_of(server), srchosts=f"127.0.0.0/{8 + turn % 2}"))
                    await until(lambda before=before: listener.source.stamp() != before)
                    await until(lambda: sorted(qubesdb.entries) == keys_read(listener))
                    listener.reload()
                    assert all(is_listening(other) is not bool(turn % 2) for other in others)
                    await echo_once(near, far)
                    await until(lambda served_before=served_before: served > served_before)
                stop.set()
            assert served >= 20
    assert client.calls == [f"work qubes.ForwardTCP+{port_of(server)}+mux"]


def keys_read(listener: Listener) -> list[str]:
    return sorted(f"/vm-config/{config.key}" for config in listener.source.read().forwards.values())


async def test_a_bad_new_entry_keeps_the_old_one_and_is_named_alone(
    tmp_path: Path, server: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    port, new, qubesdb = free_port(), free_port(), FakeQubesDB()
    qubesdb.set(WEB, line(port, port_of(server)))
    async with listening(qubesdb, FakeClient(tmp_path, "serve")) as listener:
        async with await connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            qubesdb.set(WEB, b"version=1 srcports=0-70000")
            qubesdb.set("fwd.work.newer", line(free_port(), 1, mark="7"))
            qubesdb.set("fwd.work.later", line(free_port(), 1, version="2"))
            qubesdb.set("fwd.nonsense", b"")
            qubesdb.set("fwd.work.good", line(new, 1))
            await until(lambda: is_listening(new))
            await echo_once(near, far)
        assert is_listening(port)
        refused = {WEB, "fwd.work.newer", "fwd.work.later", "fwd.nonsense"}
        assert set(listener.problems) == refused
        assert all(key in listener.problems[key] for key in refused)
        assert "option 'mark'" in listener.problems["fwd.work.newer"]
        assert "'version=2', written for another version" in listener.problems["fwd.work.later"]
        for key in refused:
            assert any(m.startswith("refused: ") and key in m for m in caplog.messages)
        for key in ("fwd.work.newer", "fwd.work.later", "fwd.nonsense"):
            qubesdb.remove(key)
        qubesdb.set(WEB, line(port, port_of(server)))
        await until(lambda: not listener.problems)


async def test_the_loss_of_qubesdb_leaves_what_is_open_and_is_shown(
    tmp_path: Path, server: socket.socket
) -> None:
    port, new, qubesdb = free_port(), free_port(), FakeQubesDB()
    qubesdb.set(WEB, line(port, port_of(server)))
    async with listening(qubesdb, FakeClient(tmp_path, "serve")) as listener:
        qubesdb.end()
        await until(lambda: listener.problems.get("QubesDB", "").endswith("Connection refused"))
        listener.reload()
        async with await connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            qubesdb.entries = {}
            qubesdb.set("fwd.work.new", line(new, 1))
            qubesdb.begin()
            await until(lambda: is_listening(new))
            assert await is_reset(near)
        assert not is_listening(port)
        assert listener.problems == {}


async def test_a_port_that_cannot_be_opened_stops_no_other_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listener_module, "LOOK_S", 0.005)
    monkeypatch.setattr(unopened, "RETRY_FIRST_S", 0.0)
    port, qubesdb = free_port(), FakeQubesDB()
    with listening_socket() as taken:
        qubesdb.set("fwd.a.first", line(port_of(taken), 1))
        qubesdb.set(WEB, line(port, 1))
        async with listening(qubesdb, FakeClient(tmp_path, "serve")) as listener:
            assert is_listening(port)
            assert "the port is in use" in listener.problems["fwd.a.first"]
            tries = itertools.count()
            monkeypatch.setattr(listener, "look", lambda look=listener.look: (next(tries), look()))
            await until(lambda: next(tries) > 3)
            taken.close()
            await until(lambda: not listener.problems)
            qubesdb.remove("fwd.a.first")
            await until(lambda: listener.forwards.keys() == {WEB})
    assert len([m for m in caplog.messages if "cannot be opened" in m]) == 1


async def test_an_expired_forward_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unopened, "RETRY_FIRST_S", 0.0)
    qubesdb = FakeQubesDB()
    with listening_socket() as taken:
        qubesdb.set(WEB, line(port_of(taken), 1))
        async with listening(qubesdb, FakeClient(tmp_path, "serve")) as listener:
            assert set(listener.problems) == {WEB}
            monkeypatch.setattr(listener, "_is_expired", lambda config: True)
            listener.look()
            assert listener.problems == {}


def test_without_a_directory_the_program_asks_qubesdb(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 1
    (said,) = capfd.readouterr().err.splitlines()
    assert "QubesDB: the Python package 'qubesdb' is missing" in said
