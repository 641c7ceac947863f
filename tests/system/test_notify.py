# SPDX-License-Identifier: GPL-2.0-or-later
"""What systemd is notified of, and when."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from fakeclient import FakeClient
from helpers import BOUND_S, free_port, running_listener, write_config

from qubes_fwd_qrexec.system import notify as notifying
from qubes_fwd_qrexec.system.notify import notify, reloading
from qubes_fwd_qrexec.target.handover import listen_on
from qubes_fwd_qrexec.target.singleservice import SingleService


class Manager:
    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def told(self) -> list[str]:
        return self._sock.recv(4096).decode().split("\n")

    async def next(self) -> list[str]:
        with trio.fail_after(BOUND_S):
            await trio.lowlevel.wait_readable(self._sock)
        return self.told()

    async def hears(self, *lines: str) -> None:
        """This is the next message."""
        assert await self.next() == [*lines]

    async def hears_reload(self) -> None:
        """A reload begins, and is over."""
        assert (await self.next())[0] == "RELOADING=1"
        await self.hears("READY=1")


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Manager]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        name = f"{tmp_path}/notify"
        sock.bind(name if request.param == "path" else f"\0{name}")
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", name if request.param == "path" else f"@{name}")
        yield Manager(sock)


def test_what_is_said_is_one_message(manager: Manager) -> None:
    notify("READY=1", "STATUS=all is well")
    assert manager.told() == ["READY=1", "STATUS=all is well"]
    notify(*reloading())
    first, second = manager.told()
    assert first == "RELOADING=1"
    assert second.removeprefix("MONOTONIC_USEC=").isdigit()


def test_a_service_manager_that_reads_nothing_holds_up_nobody(
    manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifying, "_PATIENCE_S", 0.001)
    queue = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
    for _ in range(queue + 10):  # more than the kernel keeps for it
        notify("STATUS=x")


def test_without_a_service_manager_notifying_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent/socket")
    notify("READY=1")


async def test_a_listener_notifies_of_start_reload_problems_and_end(manager: Manager, tmp_path: Path) -> None:
    config = tmp_path / "config"
    write_config(config, free_port(), 80)
    async with running_listener(config, FakeClient(tmp_path, "hang").command) as listener:
        await manager.hears("READY=1", "STATUS=1 forwards open")
        (config / "fwd.work.bad\n").write_text("bad")
        await manager.hears_reload()
        await manager.hears("STATUS=1 forwards open; not as configured: fwd.work.bad\\n")
        (config / "fwd.work.web").unlink()
        await manager.hears_reload()
        await manager.hears("STATUS=0 forwards open; not as configured: fwd.work.bad\\n")
        listener.stop()
        await manager.hears("STOPPING=1", "STATUS=closed, connections may finish")


def test_a_service_notifies_of_start_and_end(manager: Manager, tmp_path: Path) -> None:
    service = SingleService(listen_on(tmp_path / "service"))
    service.loop.soon(service.stop, service.stop)
    service.run()
    assert manager.told() == ["READY=1"]
    assert manager.told() == ["STOPPING=1"]
