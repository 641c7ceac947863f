# SPDX-License-Identifier: GPL-2.0-or-later
"""A listener says who is connected, and cuts whom it is told to cut."""

import contextlib
import logging
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
    accept,
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
from udp_forwards import KEY, forward_of, write_udp_config

from qubes_fwd_qrexec.common.clientreport import ClientReport, CutReport, WhichClients
from qubes_fwd_qrexec.common.errors import ConfigError
from qubes_fwd_qrexec.common.report import ListenerReport
from qubes_fwd_qrexec.common.values import Proto, address_text
from qubes_fwd_qrexec.exposed import listener as listener_module
from qubes_fwd_qrexec.exposed.listener import Listener
from qubes_fwd_qrexec.exposed.statussockets import CLIENTS, CUT, STATUS

pytestmark = pytest.mark.usefixtures("mux_call_home")

WEB = "fwd.work.web"
ALL = WhichClients()
Ends = tuple[trio.SocketStream, trio.SocketStream]


def clients_of(listener: Listener) -> tuple[ClientReport, ...]:
    clients = listener.report(with_clients=True).clients
    assert clients is not None
    return clients


def name(client: trio.SocketStream | UdpClient) -> str:
    sock = client.sock if isinstance(client, UdpClient) else client.socket
    return address_text(*sock.getsockname()[:2])


def names(listener: Listener) -> set[str]:
    return {address_text(client.address, client.port) for client in clients_of(listener)}


@asynccontextmanager
async def connected(port: int, server: socket.socket) -> AsyncIterator[Ends]:
    """A client and the server's end of its connection, with a byte each way."""
    async with await connect(port) as near, await accept(server) as far:
        await echo_once(near, far)
        yield near, far


# Who is connected


@pytest.mark.parametrize("transport", ["call", "mux"])
async def test_each_connection_is_told_with_what_it_has_moved(
    tmp_path: Path, server: socket.socket, transport: str
) -> None:
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server), transport=transport)
    async with running_listener(config, FakeClient(tmp_path, "serve").command) as listener:
        assert clients_of(listener) == ()
        async with connected(port, server) as (near, far):
            await near.send_all(b"12")
            assert await far.receive_some() == b"12"
            await until(lambda: (clients_of(listener)[0].sent, clients_of(listener)[0].received) == (3, 1))
            (client,) = clients_of(listener)
            assert (client.target, client.name, client.proto) == ("work", "web", Proto.TCP)
            assert (client.address, client.port) == (ip_address("127.0.0.1"), near.socket.getsockname()[1])
            assert listener.report().since <= client.since
            assert not client.is_draining
        await until(lambda: clients_of(listener) == ())


async def test_each_flow_is_told_with_what_it_has_moved(tmp_path: Path) -> None:
    port = free_udp_port()
    write_udp_config(tmp_path / "config", port)
    async with running_listener(tmp_path / "config", FakeClient(tmp_path, "flows").command) as listener:
        with UdpClient(port) as near, UdpClient(port) as other:
            assert await near.ask(b"who?") == b"who?"
            assert await other.ask(b"me") == b"me"
            await until(lambda: {(c.sent, c.received) for c in clients_of(listener)} == {(4, 4), (2, 2)})
            assert names(listener) == {name(near), name(other)}
            assert {(c.target, c.name, c.proto) for c in clients_of(listener)} == {("work", "dns", Proto.UDP)}


async def test_addresses_leave_the_listener_only_when_they_are_asked_for(
    tmp_path: Path, server: socket.socket
) -> None:
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server))
    async with (
        running_listener(config, FakeClient(tmp_path, "serve").command) as listener,
        connected(port, server),
    ):
        assert listener.report().clients is None
        assert "127.0.0.1" not in str(listener.report().as_json())


# Cutting


@pytest.mark.parametrize("transport", ["call", "mux"])
async def test_one_client_is_cut_both_ends_see_rst_and_the_others_go_on(
    tmp_path: Path, server: socket.socket, transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server), transport=transport)
    async with (
        running_listener(config, FakeClient(tmp_path, "serve").command) as listener,
        connected(port, server) as (near, far),
        connected(port, server) as (other, other_far),
    ):
        cut = name(near)
        assert await listener.cut(WEB, WhichClients.parse(cut)) == 1
        assert names(listener) == {name(other)}
        assert await is_reset(near)
        assert await is_reset(far)
        await echo_once(other, other_far)
        assert await listener.cut(WEB, WhichClients.parse(cut)) == 0
        async with connected(port, server):  # it may connect again
            assert await listener.cut(WEB, ALL) == 2
        assert await is_reset(other)
    ends = [line for line in caplog.messages if line.startswith("connection=end")]
    assert [("how=cut-by-admin " in line, "client=127.0.0.1:" in line) for line in ends] == [(True, True)] * 3
    assert f"cut: {WEB}: 1 of {cut}" in caplog.messages
    assert f"cut: {WEB}: 2 of all clients" in caplog.messages


async def test_all_of_an_address_are_cut_and_no_other(tmp_path: Path, server: socket.socket) -> None:
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server), transport="mux")
    async with (
        running_listener(config, FakeClient(tmp_path, "serve").command) as listener,
        connected(port, server) as (near, _),
        connected(port, server) as (second, _),
    ):
        with socket.socket() as sock:
            sock.bind(("127.0.0.2", 0))
            sock.connect(("127.0.0.1", port))
            await until(lambda: len(names(listener)) == 3)
            assert await listener.cut(WEB, WhichClients.parse("127.0.0.1")) == 2
            assert names(listener) == {address_text(*sock.getsockname())}
        assert await is_reset(near)
        assert await is_reset(second)


async def test_another_forward_is_not_touched(tmp_path: Path, server: socket.socket) -> None:
    ports, config = {key: free_port() for key in ("web", "ssh")}, tmp_path / "config"
    for key, port in ports.items():
        write_config(config, port, port_of(server), key=f"fwd.work.{key}")
    async with (
        running_listener(config, FakeClient(tmp_path, "serve").command) as listener,
        connected(ports["web"], server),
        connected(ports["ssh"], server) as (near, far),
    ):
        assert await listener.cut("fwd.work.web", ALL) == 1
        assert await listener.cut("fwd.home.web", ALL) == 0
        assert await listener.cut("udp.work.ssh", ALL) == 0
        await echo_once(near, far)
        with pytest.raises(ConfigError):
            await listener.cut("work.ssh", ALL)


async def test_two_that_cut_at_once_count_each_client_once(tmp_path: Path, server: socket.socket) -> None:
    port, config, counts = free_port(), tmp_path / "config", list[int]()
    write_config(config, port, port_of(server))
    async with (
        running_listener(config, FakeClient(tmp_path, "serve").command) as listener,
        connected(port, server),
    ):

        async def cut() -> None:
            counts.append(await listener.cut(WEB, ALL))

        async with trio.open_nursery() as both:
            both.start_soon(cut)
            both.start_soon(cut)
    assert sorted(counts) == [0, 1]


async def test_a_cut_flow_is_forgotten_and_the_next_datagram_begins_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    port = free_udp_port()
    write_udp_config(tmp_path / "config", port)
    async with running_listener(tmp_path / "config", FakeClient(tmp_path, "flows").command) as listener:
        with UdpClient(port) as near, UdpClient(port) as other:
            assert await near.ask(b"a") == await other.ask(b"a") == b"a"
            assert await listener.cut(KEY, WhichClients.parse(name(near))) == 1
            assert names(listener) == {name(other)}
            assert await near.ask(b"b") == b"b"
            assert forward_of(listener).report().total == 3
            assert await listener.cut(KEY, ALL) == 2
            assert clients_of(listener) == ()
    ends = [line for line in caplog.messages if line.startswith("connection=end")]
    assert ["how=cut-by-admin " in line for line in ends] == [True] * 3


# Those that drain


def draining(listener: Listener) -> set[tuple[str, Proto, bool]]:
    return {(client.name, client.proto, client.is_draining) for client in clients_of(listener)}


@pytest.mark.parametrize("transport", ["call", "mux"])
async def test_what_drains_after_its_forward_has_closed_is_told_and_can_be_cut(
    tmp_path: Path, server: socket.socket, transport: str
) -> None:
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server), transport=transport, on_expire="drain")
    async with (
        running_listener(config, FakeClient(tmp_path, "serve").command) as listener,
        connected(port, server) as (near, far),
    ):
        (config / WEB).unlink()
        listener.look()
        assert listener.report().forwards == ()
        assert draining(listener) == {("web", Proto.TCP, True)}
        await echo_once(near, far)
        assert await listener.cut(WEB, WhichClients.parse(name(near))) == 1
        assert await is_reset(near)
        assert await is_reset(far)
        assert listener.report().draining == ()


async def test_a_flow_that_drains_is_told_and_can_be_cut(tmp_path: Path) -> None:
    port, config = free_udp_port(), tmp_path / "config"
    write_udp_config(config, port, on_expire="drain")
    async with running_listener(config, FakeClient(tmp_path, "flows").command) as listener:
        with UdpClient(port) as near:
            assert await near.ask(b"a") == b"a"
            assert draining(listener) == {("dns", Proto.UDP, False)}
            (config / KEY).unlink()
            listener.look()
            assert draining(listener) == {("dns", Proto.UDP, True)}
            assert await near.ask(b"b") == b"b"
            assert await listener.cut(KEY, ALL) == 1
            assert listener.report().draining == ()


async def test_what_drains_as_its_forward_lets_it_in_no_more_is_told_and_can_be_cut(
    tmp_path: Path, server: socket.socket
) -> None:
    port, config = free_port(), tmp_path / "config"
    write_config(config, port, port_of(server), on_expire="drain")
    async with (
        running_listener(config, FakeClient(tmp_path, "serve").command) as listener,
        connected(port, server) as (near, _),
    ):
        write_config(config, port, port_of(server), on_expire="drain", srchosts="127.0.0.2")
        listener.look()
        assert draining(listener) == {("web", Proto.TCP, True)}
        assert await listener.cut(WEB, ALL) == 1
        assert await is_reset(near)


# Asked from outside


async def asked(path: Path, request: bytes = b"") -> bytes:
    """What is answered to a request and an end of file, until the connection ends."""
    received = b""
    with trio.fail_after(BOUND_S), contextlib.suppress(trio.BrokenResourceError):
        async with await trio.open_unix_socket(str(path)) as stream:
            if request:
                await stream.send_all(request)
                await stream.send_eof()
            async for chunk in stream:
                received += chunk
    return received


async def test_who_is_connected_is_told_at_a_socket_of_its_own_and_cut_at_another(
    tmp_path: Path, server: socket.socket
) -> None:
    port, config, place = free_port(), tmp_path / "config", tmp_path / "sockets"
    write_config(config, port, port_of(server))
    async with (
        running_listener(config, FakeClient(tmp_path, "serve").command, status_dir=place),
        connected(port, server) as (near, _),
    ):
        (client,) = ListenerReport.parse(await asked(place / CLIENTS)).clients or ()
        assert client.port == near.socket.getsockname()[1]
        assert ListenerReport.parse(await asked(place / STATUS)).clients is None
        line = b"fwd.work.web 127.0.0.1:%d\n" % client.port
        assert CutReport.parse(await asked(place / CUT, line)) == CutReport(1)
        assert ListenerReport.parse(await asked(place / CLIENTS)).clients == ()
        assert CutReport.parse(await asked(place / CUT, line)) == CutReport(0)
        assert await is_reset(near)


async def test_who_is_connected_is_told_of_what_is_configured_now(
    tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "LOOK_S", 3600.0)
    port, config, place = free_port(), tmp_path / "config", tmp_path / "sockets"
    write_config(config, port, port_of(server), on_expire="drain")
    async with (
        running_listener(config, FakeClient(tmp_path, "serve").command, status_dir=place),
        connected(port, server),
    ):
        (config / WEB).unlink()
        (client,) = ListenerReport.parse(await asked(place / CLIENTS)).clients or ()
        assert client.is_draining


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"nonsense \n", "'nonsense' is not fwd.TARGET.NAME"),
        (b"fwd.work.web home\n", "'home' is not an IPv4 or IPv6 address"),
        (b"fwd.work.web \x1b\n", "'\\x1b' is not an IPv4 or IPv6 address"),
        (b"fwd.work.web \xff\n", "'\\\\xff' is not an IPv4 or IPv6 address"),
    ],
)
async def test_a_line_that_is_not_understood_cuts_nobody_and_is_named(
    tmp_path: Path, server: socket.socket, line: bytes, problem: str
) -> None:
    port, config, place = free_port(), tmp_path / "config", tmp_path / "sockets"
    write_config(config, port, port_of(server))
    async with (
        running_listener(config, FakeClient(tmp_path, "serve").command, status_dir=place),
        connected(port, server) as (near, far),
    ):
        done = CutReport.parse(await asked(place / CUT, line))
        assert done.cut == 0
        assert problem in str(done.problem)
        await echo_once(near, far)


@pytest.mark.parametrize("line", [b"fwd.work.web 127.0.0.1", b"fwd.work.web ", b"f" * 200 + b"\n"])
async def test_a_line_without_an_end_cuts_nobody(tmp_path: Path, server: socket.socket, line: bytes) -> None:
    port, config, place = free_port(), tmp_path / "config", tmp_path / "sockets"
    write_config(config, port, port_of(server))
    async with (
        running_listener(config, FakeClient(tmp_path, "serve").command, status_dir=place),
        connected(port, server) as (near, far),
    ):
        assert await asked(place / CUT, line) == b""
        await echo_once(near, far)
