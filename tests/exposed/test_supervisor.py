# SPDX-License-Identifier: GPL-2.0-or-later
"""A restart has the ports at once, and connections of before it may finish."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
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
    port_of,
    until,
    write_config,
)

from qubes_fwd_qrexec.exposed.statussockets import STATUS


@contextmanager
def supervised(tmp_path: Path, *more: str) -> "Iterator[subprocess.Popen[bytes]]":
    """The program as its unit starts it; whatever is left of it is ended."""
    client = " ".join(FakeClient(tmp_path, "serve").command)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "qubes_fwd_qrexec.listener", "--leave-drain"),
            *("--config", str(tmp_path / "config"), "--qrexec-client", client),
            *("--status-dir", str(tmp_path / "status"), *more),
        ],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=BOUND_S)


@pytest.mark.parametrize("transport", ["call", "mux"])
@pytest.mark.usefixtures("mux_call_home")
async def test_the_next_listener_serves_while_the_last_one_drains(
    tmp_path: Path, server: socket.socket, transport: str
) -> None:
    port, status = free_port(), tmp_path / "status"
    write_config(tmp_path / "config", port, port_of(server), transport=transport)
    with supervised(tmp_path) as last:
        await until(lambda: is_listening(port))
        async with await connect(port) as old, await accept(server) as old_far:
            await echo_once(old, old_far)
            last.send_signal(signal.SIGTERM)
            assert last.wait(BOUND_S) == 0
            assert not is_listening(port)
            assert not (status / STATUS).exists()
            with supervised(tmp_path) as following:
                await until(lambda: is_listening(port) and (status / STATUS).exists())
                async with await connect(port) as new, await accept(server) as new_far:
                    await echo_once(new, new_far)
                    await echo_once(old, old_far)
                    await old.send_eof()
                    assert await old_far.receive_some() == b""
                    await old_far.aclose()
                    assert await old.receive_some() == b""
                    await echo_once(new, new_far)
                    assert (status / STATUS).exists()
                following.send_signal(signal.SIGTERM)
                assert following.wait(BOUND_S) == 0


async def test_what_was_left_behind_is_cut_when_dom0_says_so(tmp_path: Path, server: socket.socket) -> None:
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server))
    with supervised(tmp_path) as last:
        await until(lambda: is_listening(port))
        async with await connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            last.send_signal(signal.SIGTERM)
            assert last.wait(BOUND_S) == 0
            (config / "fwd.work.web").unlink()
            assert await is_reset(near)


async def test_a_listener_whose_supervisor_dies_aborts_all_and_leaves_the_ports(
    tmp_path: Path, server: socket.socket
) -> None:
    port = free_port()
    write_config(tmp_path / "config", port, port_of(server))
    with supervised(tmp_path) as last:
        await until(lambda: is_listening(port))
        async with await connect(port) as near, await accept(server) as far:
            await echo_once(near, far)
            last.kill()
            assert await is_reset(near)
            await until(lambda: not can_connect(port))


async def test_its_exit_status_is_that_of_the_listener(tmp_path: Path) -> None:
    with supervised(tmp_path) as none:  # there is no configuration
        _, stderr = none.communicate(timeout=BOUND_S)
        assert none.returncode == 1
        assert str(tmp_path / "config") in stderr.decode()


async def test_a_reload_reaches_the_listener(tmp_path: Path, server: socket.socket) -> None:
    port, other = free_port(), free_port()
    write_config(tmp_path / "config", port, port_of(server))
    with supervised(tmp_path) as process:
        await until(lambda: is_listening(port))
        write_config(tmp_path / "config", other, port_of(server), key="fwd.work.more")
        process.send_signal(signal.SIGHUP)
        await until(lambda: is_listening(other))
