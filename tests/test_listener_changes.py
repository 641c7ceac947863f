# SPDX-License-Identifier: GPL-2.0-or-later
"""Changes of an open forward apply at once, even if one of its new ports cannot be opened."""

import socket
import time
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from fakeclient import FakeClient
from helpers import (
    accept,
    can_connect,
    connect,
    echo_once,
    free_port,
    is_reset,
    port_of,
    running_listener,
    until,
    write_config,
)


def listening_addresses(port: int) -> list[str]:
    """IPv4 addresses on which the port is listened on, as the kernel tells."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    found = [line[1].split(":")[0] for line in lines if line[1].endswith(f":{port:04X}") and line[3] == "0A"]
    return [str(IPv4Address(bytes.fromhex(text)[::-1])) for text in found]


@pytest.mark.parametrize(("before", "after"), [("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "0.0.0.0")])
async def test_another_address_of_the_same_port_is_taken_at_once(
    tmp_path: Path, server: socket.socket, before: str, after: str
) -> None:
    """An address and the wildcard of its family exclude each other: the old one must go first."""
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server), listen=before)
    async with running_listener(config, FakeClient(tmp_path, "serve").command) as listener:  # noqa: SIM117
        async with await connect(port) as near, await accept(server) as far:
            write_config(config, port, port_of(server), listen=after)
            listener.reload()
            assert listening_addresses(port) == [after]
            assert listener.problems == {}
            await echo_once(near, far)


async def test_a_forward_takes_an_address_that_another_gives_up(tmp_path: Path) -> None:
    """In whatever order they are opened: the one that takes it comes first by its name."""
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, 1, key="fwd.b.wide", listen="0.0.0.0")
    async with running_listener(config, FakeClient(tmp_path, "hang").command) as listener:
        write_config(config, port, 1, key="fwd.b.wide", listen="127.0.0.2")
        write_config(config, port, 1, key="fwd.a.narrow", listen="127.0.0.1")
        listener.reload()
        assert sorted(listening_addresses(port)) == ["127.0.0.1", "127.0.0.2"]
        assert listener.problems == {}


async def test_if_a_new_port_is_in_use_everything_else_applies_and_the_old_port_is_closed(
    tmp_path: Path, server: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    """What dom0 narrows or ends must not wait for a port that somebody has."""
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server))
    async with running_listener(config, FakeClient(tmp_path, "serve").command) as listener:  # noqa: SIM117
        async with await connect(port) as near, await accept(server):
            with socket.create_server(("127.0.0.1", 0)) as holder:
                taken = port_of(holder)
                write_config(config, taken, port_of(server), srchosts="192.0.2.1/32")
                listener.reload()
                assert not can_connect(port)
                assert list(listener.problems) == ["fwd.work.web"]
                assert any(f"127.0.0.1:{taken}: the port is in use" in m for m in caplog.messages)
                assert await is_reset(near)
            await until(lambda: listening_addresses(taken) == ["127.0.0.1"])
            assert listener.problems == {}
            async with await connect(taken) as stranger:
                assert await is_reset(stranger)


async def test_a_forward_whose_new_port_is_in_use_still_takes_its_new_expiry(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    wall = [time.time()]
    monkeypatch.setattr(time, "time", lambda: wall[0])
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server))
    async with running_listener(config, FakeClient(tmp_path, "serve").command) as listener:  # noqa: SIM117
        async with await connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            with socket.create_server(("127.0.0.2", port)):
                ends, listen = str(int(wall[0]) + 1000), "127.0.0.1,127.0.0.2"
                write_config(config, port, port_of(server), expire=ends, listen=listen)
                listener.look()
                await echo_once(near, far)
                wall[0] += 1001
                assert await is_reset(near)
            await until(lambda: "in use" not in str(listener.problems))


KEPT = [{"srchosts": "127.0.0.1/32"}, {"limits": "connections:1"}, {"listen": "0.0.0.0"}, {"side": "vifs"}]
NARROWED = [
    {"srchosts": "127.0.0.2/32"},
    {"srchosts": "any", "listen": "127.0.0.2"},
    {"dstports": "1-1"},
    {"srcports": "1-1"},
]


@pytest.mark.parametrize("on_expire", ["cut", "drain"])
@pytest.mark.parametrize("change", [*KEPT, *NARROWED])
async def test_what_a_changed_forward_allows_no_more_is_cut_unless_it_may_drain(
    tmp_path: Path, server: socket.socket, change: dict[str, str], on_expire: str
) -> None:
    """Loopback is admitted at every side, so that a connection by it outlives a change of side."""
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server))
    async with running_listener(config, FakeClient(tmp_path, "serve").command) as listener:  # noqa: SIM117
        async with await connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            write_config(config, port, port_of(server), on_expire=on_expire, **change)
            listener.reload()
            if change in KEPT or on_expire == "drain":
                await echo_once(near, far)
            else:
                assert await is_reset(near)
