# SPDX-License-Identifier: GPL-2.0-or-later
"""From a client's socket to a server's: the listener and the real service, over a stand-in for qrexec."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio
from fakeclient import FakeClient
from helpers import BOUND_S, running_listener, until
from udp_clients import UdpClient, free_udp_port
from udp_forwards import forward_of, write_udp_config

from qubes_fwd_qrexec.common.allowance import Allowance, Revoked
from qubes_fwd_qrexec.exposed.callwaits import CallWaits
from qubes_fwd_qrexec.target import callnotes, revocation

pytestmark = pytest.mark.usefixtures("no_hurry", "mux_call_home")


class UdpServer:
    """A server in the target, at a port of loopback."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.setblocking(False)
        self.sock.bind((host, 0))
        self.heard = 0
        self.port = int(self.sock.getsockname()[1])

    async def hear(self) -> tuple[bytes, tuple[str, int]]:
        with trio.fail_after(BOUND_S):
            await trio.lowlevel.wait_readable(self.sock)
        return self.sock.recvfrom(1 << 16)

    async def answer(self, data: bytes | None = None) -> bytes:
        """Hear a datagram, and say something back, by default the same; returns what was heard."""
        heard, client = await self.hear()
        self.heard += 1
        self.sock.sendto(heard if data is None else data, client)
        return heard

    async def answer_for_ever(self) -> None:
        while True:
            await self.answer()


@pytest.fixture
def udp_server() -> Iterator[UdpServer]:
    server = UdpServer()
    with server.sock:
        yield server


async def test_datagrams_reach_the_server_and_its_answers_the_client(
    tmp_path: Path, udp_server: UdpServer
) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "serve")
    write_udp_config(tmp_path / "config", port, udp_server.port)
    async with running_listener(tmp_path / "config", client.command):
        with UdpClient(port) as near, UdpClient(port) as other:
            for size in (1, 0, 1472, 65507):
                near.send(bytes(size))
                assert await udp_server.answer(bytes(size)) == bytes(size)
                assert await near.hear() == bytes(size)
            near.send(b"a")
            other.send(b"b")
            heard = dict([await udp_server.hear(), await udp_server.hear()])
            udp_server.sock.sendto(b"to b", heard[b"b"])
            udp_server.sock.sendto(b"to a", heard[b"a"])
            assert (await near.hear(), await other.hear()) == (b"to a", b"to b")
    assert len(client.calls) == 1


async def test_a_thousand_questions_at_once_are_all_answered(tmp_path: Path, udp_server: UdpServer) -> None:
    """Each from a port of its own, as resolvers ask. They come as fast as the server takes them, whose own
    buffer in the kernel has room for no more."""
    port, client = free_udp_port(), FakeClient(tmp_path, "serve")
    write_udp_config(tmp_path / "config", port, udp_server.port)
    async with running_listener(tmp_path / "config", client.command) as listener:
        with ExitStack() as stack:
            clients = [stack.enter_context(UdpClient(port)) for _ in range(1000)]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(udp_server.answer_for_ever)
                for start in range(0, 1000, 100):
                    for number in range(start, start + 100):
                        clients[number].send(b"%d" % number)
                    await until(lambda: udp_server.heard == start + 100)  # noqa: B023
                for number, near in enumerate(clients):
                    assert await near.hear() == b"%d" % number
                nursery.cancel_scope.cancel()
            (report,) = listener.report().forwards
            assert (report.total, report.dropped, report.refused) == (1000, {}, {})
    assert len(client.calls) == 1


async def test_a_closed_port_ends_the_flow_and_the_client_hears_nothing(tmp_path: Path) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "serve")
    write_udp_config(tmp_path / "config", port, free_udp_port())
    async with running_listener(tmp_path / "config", client.command) as listener:
        with UdpClient(port) as near:
            near.send(b"x")
            await until(lambda: forward_of(listener).table.counters.refusals == {"server": 1})
            assert forward_of(listener).connections == 0
            with pytest.raises(BlockingIOError):
                near.sock.recv(10)


async def test_what_dom0_ends_passes_no_more_datagram(tmp_path: Path, udp_server: UdpServer) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "serve")
    write_udp_config(tmp_path / "config", port, udp_server.port)
    async with running_listener(tmp_path / "config", client.command) as listener:
        with UdpClient(port) as near:
            near.send(b"x")
            heard, flow = await udp_server.hear()
            udp_server.sock.sendto(b"y", flow)
            assert (heard, await near.hear()) == (b"x", b"y")
            ended = await trio.to_thread.run_sync(revocation.revoke, Allowance(), callnotes.directory())
            assert ended == Revoked(1, 0)
            await until(lambda: not forward_of(listener).connections)
            udp_server.sock.sendto(b"late", flow)
            with pytest.raises(BlockingIOError):
                near.sock.recv(10)
            await until(lambda: not listener.report().forwards[0].mux_calls)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_the_server_may_be_at_either_loopback_address(tmp_path: Path, host: str) -> None:
    server = UdpServer(host)
    port, client = free_udp_port(), FakeClient(tmp_path, "serve")
    write_udp_config(tmp_path / "config", port, server.port)
    async with running_listener(tmp_path / "config", client.command):
        with UdpClient(port) as near, server.sock:
            near.send(b"x")
            assert await server.answer(b"y") == b"x"
            assert await near.hear() == b"y"


async def test_the_server_is_told_who_writes_in_front_of_each_datagram(
    tmp_path: Path, udp_server: UdpServer
) -> None:
    port, client = free_udp_port(), FakeClient(tmp_path, "serve")
    write_udp_config(tmp_path / "config", port, udp_server.port, proxy="v2")
    async with running_listener(tmp_path / "config", client.command):
        with UdpClient(port) as near:
            for data in (b"one", b"two"):
                near.send(data)
                heard = await udp_server.answer(b"ok")
                assert heard[:12] == b"\r\n\r\n\0\r\nQUIT\n"
                assert heard[12:16] == b"\x21\x12\0\x0c"
                own, own_port = near.sock.getsockname()
                assert heard[16:20] == socket.inet_aton(own)
                assert int.from_bytes(heard[24:26], "big") == own_port
                assert heard[28:] == data
                assert await near.hear() == b"ok"


async def test_a_flow_begins_anew_when_the_header_in_front_of_its_datagrams_changes(
    tmp_path: Path, udp_server: UdpServer
) -> None:
    port, client, config = free_udp_port(), FakeClient(tmp_path, "serve"), tmp_path / "config"
    write_udp_config(config, port, udp_server.port, on_expire="drain")
    async with running_listener(config, client.command) as listener:
        with UdpClient(port) as near:
            near.send(b"x")
            heard, flow = await udp_server.hear()
            assert heard == b"x"
            write_udp_config(config, port, udp_server.port, on_expire="drain", proxy="v2")
            listener.reload()
            near.send(b"y")
            heard, new_flow = await udp_server.hear()
            assert (heard[:12], heard[28:]) == (b"\r\n\r\n\0\r\nQUIT\n", b"y")
            udp_server.sock.sendto(b"late", flow)
            udp_server.sock.sendto(b"z", new_flow)
            assert await near.hear() == b"z"
        assert forward_of(listener).table.counters.total == 1
    assert len(client.calls) == 1


async def test_a_flow_outlives_the_lease_of_its_call(tmp_path: Path, udp_server: UdpServer) -> None:
    """The target ends the call, which is not renewed; the next datagram asks dom0 for another one."""
    port, client = free_udp_port(), FakeClient(tmp_path, "leased")
    write_udp_config(tmp_path / "config", port, udp_server.port)
    waits = CallWaits(again_s=0.0)
    async with running_listener(tmp_path / "config", client.command, waits=waits) as listener:
        with UdpClient(port) as near:
            near.send(b"x")
            assert await udp_server.answer() == await near.hear() == b"x"
            client.over.touch()
            await until(lambda: not listener.report().forwards[0].mux_calls)
            client.over.unlink()
            assert forward_of(listener).connections == 1
            near.send(b"y")
            assert await udp_server.answer() == await near.hear() == b"y"
        (report,) = listener.report().forwards
        assert (report.total, report.refused, report.dropped) == (1, {}, {})
    assert len(set(client.calls)) == 1
