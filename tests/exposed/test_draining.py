# SPDX-License-Identifier: GPL-2.0-or-later
"""Closed forwards whose connections go on are reported, and have an end."""

import socket
from pathlib import Path

import pytest
from fakeclient import FakeClient
from handclock import HandClock
from helpers import (
    accept,
    can_connect,
    children,
    connect,
    echo_once,
    free_port,
    is_reset,
    port_of,
    running_listener,
    until,
    write_config,
)
from udp_clients import UdpClient, free_udp_port
from udp_forwards import is_bound, write_udp_config

from qubes_fwd_qrexec.common.report import DrainingReport
from qubes_fwd_qrexec.common.values import QubeName, RuleName
from qubes_fwd_qrexec.exposed import draining
from qubes_fwd_qrexec.exposed.draining import DRAIN_MAX_S


@pytest.mark.parametrize("transport", ["call", "mux"])
@pytest.mark.usefixtures("mux_call_home")
async def test_a_drain_is_reported_until_it_is_over_and_is_cut_in_the_end(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    clock = HandClock(monkeypatch, draining)
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server), on_expire="drain", transport=transport)
    async with running_listener(config, FakeClient(tmp_path, "serve").command) as listener:
        async with await connect(port) as first, await accept(server) as first_far:
            async with await connect(port) as second, await accept(server) as second_far:
                await echo_once(first, first_far)
                await echo_once(second, second_far)
                (config / "fwd.work.web").unlink()
                await until(lambda: not listener.report().forwards)
                assert not can_connect(port)
                await clock.advance(60)
                report = DrainingReport(
                    target=QubeName("work"),
                    name=RuleName("web"),
                    connections=2,
                    left_s=int(DRAIN_MAX_S) - 60,
                )
                assert listener.report().draining == (report,)
                await echo_once(first, first_far)
            await until(lambda: [one.connections for one in listener.report().draining] == [1])
            await clock.advance(DRAIN_MAX_S)
            assert await is_reset(first)
        await until(lambda: not listener.report().draining)


async def test_what_is_cut_or_has_no_connection_does_not_drain(tmp_path: Path, server: socket.socket) -> None:
    ports, config = {"cut": free_port(), "drain": free_port()}, tmp_path / "config"
    for how, port in ports.items():
        write_config(config, port, port_of(server), key=f"fwd.work.{how}", on_expire=how)
    async with running_listener(config, FakeClient(tmp_path, "serve").command) as listener:  # noqa: SIM117
        async with await connect(ports["cut"]) as near, await accept(server):
            for how in ports:
                (config / f"fwd.work.{how}").unlink()
            assert await is_reset(near)
            await until(lambda: not listener.report().forwards)
            await until(lambda: not listener.report().draining)


@pytest.mark.usefixtures("no_hurry")
async def test_a_flow_that_drains_is_cut_in_the_end_though_its_server_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its call ends with it."""
    clock = HandClock(monkeypatch, draining)
    port, client = free_udp_port(), FakeClient(tmp_path, "flows")
    file = write_udp_config(tmp_path / "config", port, on_expire="drain")
    async with running_listener(tmp_path / "config", client.command) as listener:
        with UdpClient(port) as near:
            assert await near.ask(b"x") == b"x"
            file.unlink()
            await until(lambda: not listener.report().forwards)
            await clock.advance(DRAIN_MAX_S - 1)
            assert await near.ask(b"still") == b"still"
            (report,) = listener.report().draining
            assert (report.connections, report.left_s) == (1, 1)
            assert children()
            await clock.advance(1)
            await until(lambda: not listener.report().draining)
            assert not is_bound(port)
            await until(lambda: not children())
    assert len(client.calls) == 1
